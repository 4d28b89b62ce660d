"""Bytes on disk: one encoding, one digest, and files that are whole or absent."""

import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_kdguard import files
from mlflow_kdguard.errors import UsageError
from requirements import require

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(st.binary(max_size=100))
def test_digest_is_sha256(data: bytes) -> None:
    assert files.sha256(data) == hashlib.sha256(data).hexdigest()


def test_digest_of_a_file_longer_than_one_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"tail"
    (tmp_path / "x").write_bytes(data)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@given(JSON)
def test_canonical_json_is_read_back_and_is_one_encoding(value: object) -> None:
    data = files.canonical_json(value)
    assert json.loads(data) == value
    assert files.canonical_json(json.loads(data)) == data


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.canonical_json({"b": 1, "a": [1, 2]}) == b'{"a":[1,2],"b":1}'
    assert files.digest_json({"b": 1, "a": 2}) == files.digest_json({"a": 2, "b": 1})
    assert files.canonical_json({"é": "ü"}) == '{"é":"ü"}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_encoding(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical_json({"figure": [value]})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "x.json", {"figure": value})
    assert list(tmp_path.iterdir()) == []


def test_write_creates_folders_and_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.bin"
    files.write_bytes(path, b"first")
    files.write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.bin"]


def test_written_files_have_the_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "x", b"1")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_json_for_people_keeps_its_order_and_letters(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"b": "ä", "a": 1})
    assert (tmp_path / "x.json").read_text("utf-8") == '{\n  "b": "ä",\n  "a": 1\n}\n'


def test_read_says_what_is_wrong_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name, why in [("absent", "No such file"), ("empty", "empty"), ("folder", "directory")]:
        with pytest.raises(UsageError, match=why) as caught:
            files.read_bytes(tmp_path / name, what="the key")
        assert str(tmp_path / name) in caught.value.message
        assert "the key" in caught.value.message
        assert caught.value.remedy
    (tmp_path / "x").write_bytes(b"1")
    assert files.read_bytes(tmp_path / "x", what="the key") == b"1"


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(UsageError, match="cannot write"):
        files.write_bytes(tmp_path / "file" / "x", b"1")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        files.write_bytes(tmp_path / "taken", b"1")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def _in_a_process_of_its_own(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mlflow_kdguard import files
from mlflow_kdguard.errors import UsageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
path = Path(sys.argv[1]) / "x.bin"
try:
    files.write_bytes(path, b"n" * 100_000)
except UsageError as error:
    sys.stdout.write(str(error))
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the kernel refuses part of the write."""
    assert resource.RLIM_INFINITY  # the module exists on this platform
    files.write_bytes(tmp_path / "x.bin", b"old")
    done = _in_a_process_of_its_own(FULL_DISK, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stdout
    assert str(tmp_path / "x.bin") in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.bin"]
    assert (tmp_path / "x.bin").read_bytes() == b"old"


UNWRITABLE = """
import os, sys
from pathlib import Path
from mlflow_kdguard import files
from mlflow_kdguard.errors import UsageError
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    files.write_bytes(Path(sys.argv[1]) / "x.bin", b"new")
except UsageError as error:
    sys.stdout.write(str(error))
    sys.exit(error.exit_code)
"""


def test_an_unwritable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "x.bin").write_bytes(b"old")
    for parent in [tmp_path, *tmp_path.parents][:3]:  # pytest's own folders are closed to others
        if parent.stat().st_uid == os.geteuid() and parent.name != "tmp":
            parent.chmod(parent.stat().st_mode | 0o055)
    folder.chmod(0o555)
    try:
        done = _in_a_process_of_its_own(UNWRITABLE, folder)
    finally:
        folder.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stdout
    assert [entry.name for entry in folder.iterdir()] == ["x.bin"]
    assert (folder / "x.bin").read_bytes() == b"old"


KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow_kdguard import files
real = os.fsync
def struck(handle):
    real(handle)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = struck
files.write_bytes(Path(sys.argv[1]) / "x.bin", b"new" * 1000)
"""


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    require("posix", os.name == "posix", "SIGKILL is POSIX")
    files.write_bytes(tmp_path / "x.bin", b"old")
    done = _in_a_process_of_its_own(KILLED, tmp_path)
    assert done.returncode == -9
    assert (tmp_path / "x.bin").read_bytes() == b"old"
    left = [entry.name for entry in tmp_path.iterdir() if entry.name != "x.bin"]
    assert all(name.startswith(".x.bin.") and name.endswith(".tmp") for name in left)


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    """A rename onto /dev/stdout would put a plain file in its place, for everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for place in (pipe, link):
        with pytest.raises(UsageError, match="no plain file"):
            files.write_bytes(place, b"x")
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert files.read_bytes(file, what="the file", at_most=5) == b"12345"
    for path in (file, Path("/dev/zero")):
        with pytest.raises(UsageError, match="has more than 4 bytes"):
            files.read_bytes(path, what="the file", at_most=4)

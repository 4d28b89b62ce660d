"""What is finished stays finished, what is not is never taken for finished."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mlflow_kdguard.errors import KDGuardError, UsageError
from mlflow_kdguard.ledger import Entry, Ledger


def _finish(ledger: Ledger, name: str, inputs: dict[str, object], text: str = "bytes") -> Entry:
    entry = ledger.open(name, inputs)
    entry.path("file.txt").write_text(text)
    return ledger.finish(entry, ["file.txt"], {"figure": 0.5})


def test_a_finished_stage_is_found_with_its_record(tmp_path: Path) -> None:
    _finish(Ledger(tmp_path), "export", {"a": 1})
    again = Ledger(tmp_path).open("export", {"a": 1})
    assert again.recorded == {"figure": 0.5}
    assert again.path("file.txt").read_text() == "bytes"


def test_reading_an_unfinished_stage_is_an_error(tmp_path: Path) -> None:
    entry = Ledger(tmp_path).open("export", {"a": 1})
    with pytest.raises(KDGuardError, match="export was read before it was finished"):
        _ = entry.recorded


def test_other_inputs_run_the_stage_again_and_clear_what_it_left(tmp_path: Path) -> None:
    _finish(Ledger(tmp_path), "export", {"a": 1})
    again = Ledger(tmp_path).open("export", {"a": 2})
    assert again.record is None
    assert not again.path("file.txt").exists()


@pytest.mark.parametrize("harm", ["alter", "delete", "corrupt"])
def test_harmed_files_run_the_stage_again(tmp_path: Path, harm: str) -> None:
    entry = _finish(Ledger(tmp_path), "export", {"a": 1})
    if harm == "alter":
        entry.path("file.txt").write_text("bytez")
    elif harm == "delete":
        entry.path("file.txt").unlink()
    else:
        entry.path("done.json").write_text('{"inputs": ')
    assert Ledger(tmp_path).open("export", {"a": 1}).record is None


def test_checkpoints_of_the_same_inputs_survive(tmp_path: Path) -> None:
    entry = Ledger(tmp_path).open("distill", {"a": 1})
    entry.path("checkpoint.pt").write_text("half way")
    again = Ledger(tmp_path).open("distill", {"a": 1})
    assert again.record is None
    assert again.path("checkpoint.pt").read_text() == "half way"


@pytest.mark.parametrize("body", ["[]", "{}", '{"inputs": 3, "files": 4, "record": 5}', "null"])
def test_a_done_file_of_another_shape_is_not_believed(tmp_path: Path, body: str) -> None:
    entry = _finish(Ledger(tmp_path), "export", {"a": 1})
    entry.path("done.json").write_text(body)
    assert Ledger(tmp_path).open("export", {"a": 1}).record is None


def test_a_finished_file_that_is_missing_cannot_be_declared(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    entry = ledger.open("export", {"a": 1})
    with pytest.raises(FileNotFoundError):
        ledger.finish(entry, ["absent.onnx"], {})
    assert ledger.open("export", {"a": 1}).record is None


def test_killed_anywhere_a_stage_is_finished_or_absent(tmp_path: Path) -> None:
    """A process that writes stages as fast as it can is killed; every done.json must be true."""
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from mlflow_kdguard.ledger import Ledger
        ledger = Ledger(Path(sys.argv[1]))
        print("ready", flush=True)
        for i in range(100000):
            entry = ledger.open("stage", {"i": i})
            entry.path("a.bin").write_bytes(bytes([i % 251]) * 4096)
            ledger.finish(entry, ["a.bin"], {"i": i})
        """
    )
    for delay in (0.01, 0.03, 0.08):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        done = tmp_path / "stage" / "done.json"
        if done.exists():
            i = json.loads(done.read_text())["record"]["i"]
            entry = Ledger(tmp_path).open("stage", {"i": i})
            assert entry.recorded == {"i": i}
            assert entry.path("a.bin").read_bytes() == bytes([i % 251]) * 4096


def test_killed_before_any_change_of_the_disk_the_next_run_goes_on(tmp_path: Path) -> None:
    """Neither old nor new inputs are refused, none is believed to be finished unless its file is
    whole, and what is left of the old checkpoints is not gone on from."""
    program = Path(__file__).parents[1] / "killed.py"
    ran = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 12  # it was killed at as many places


def test_files_that_no_stage_left_are_never_cleared(tmp_path: Path) -> None:
    own = tmp_path / "teacher" / "weights.pt"
    own.parent.mkdir()
    own.write_text("months of training")
    with pytest.raises(UsageError, match="in the way"):
        Ledger(tmp_path).open("teacher", {"a": 1})
    assert own.read_text() == "months of training"


@pytest.mark.parametrize("left", [(), (".inputs.sha256.x1.tmp",)])
def test_a_folder_that_a_kill_left_before_its_mark_is_ours(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    (tmp_path / "export").mkdir()
    for name in left:
        (tmp_path / "export" / name).touch()
    _finish(Ledger(tmp_path), "export", {"a": 1})
    assert Ledger(tmp_path).open("export", {"a": 1}).record is not None


def test_what_no_longer_holds_is_run_again(tmp_path: Path) -> None:
    entry = _finish(Ledger(tmp_path), "register", {"a": 1})
    assert Ledger(tmp_path).reopen(entry).record is None
    assert Ledger(tmp_path).open("register", {"a": 1}).record is None


def test_torn_writes_are_swept(tmp_path: Path) -> None:
    entry = Ledger(tmp_path).open("distill", {"a": 1})
    entry.path(".weights.safetensors.x1.tmp").touch()
    Ledger(tmp_path).open("distill", {"a": 1})
    assert not list(tmp_path.rglob("*.tmp"))

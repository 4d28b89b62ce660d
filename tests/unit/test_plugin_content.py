"""The content root: bytes under their digest, whole or absent, compared and never repaired."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from mlflow_kdguard.artifacts import ADDED_BY_CLIENT, bundle_digest, read_folder
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.plugin.server import content
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.settings import Content

FILES = {"model.onnx": b"the student", "MLmodel": b"flavors: {}\n"}
DIGEST = bundle_digest(FILES)


@pytest.fixture
def root(tmp_path: Path) -> Content:
    made = Content(root=f"file://{tmp_path}/content")
    content.prepare(made)
    return made


def _folder(root: Content) -> Path:
    return Place.of(root.root).path / DIGEST


def test_bytes_are_kept_once_and_taken_back(root: Content) -> None:
    uri = content.keep(FILES, DIGEST, root)
    assert uri == f"{root.root}/{DIGEST}"
    assert read_folder(_folder(root)) == FILES
    before = (_folder(root) / "model.onnx").stat()
    assert content.keep(FILES, DIGEST, root) == uri
    assert (_folder(root) / "model.onnx").stat() == before
    assert content.take(DIGEST, root) == FILES
    assert content.digest_at(Place.of(uri), root) == DIGEST
    assert content.digest_at(Place.of(f"{uri}/model.onnx"), root) is None
    assert content.digest_at(Place.of(root.root), root) is None
    assert not (_folder(root) / "model.onnx").stat().st_mode & 0o222


@pytest.mark.parametrize("change", ["edit", "add", "remove", "link"])
def test_a_change_is_told_and_not_repaired(root: Content, change: str) -> None:
    content.keep(FILES, DIGEST, root)
    file = _folder(root) / "model.onnx"
    if change == "add":
        (_folder(root) / "code.py").write_bytes(b"x")
    else:
        file.unlink()
    if change == "edit":
        file.write_bytes(b"another")
    if change == "link":
        (_folder(root).parent / "twin").write_bytes(FILES["model.onnx"])
        file.symlink_to(_folder(root).parent / "twin")
    for act in (lambda: content.keep(FILES, DIGEST, root), lambda: content.take(DIGEST, root)):
        with pytest.raises(Exception, match=r"other bytes|link"):
            act()


def test_the_note_of_mlflows_client_changes_nothing(root: Content) -> None:
    content.keep(FILES, DIGEST, root)
    (_folder(root) / ADDED_BY_CLIENT).write_bytes(b"model_name: digits\n")
    content.keep(FILES, DIGEST, root)
    assert content.take(DIGEST, root) == FILES


def test_an_interrupted_copy_leaves_nothing_under_the_digest(
    root: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(content, "_sync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(RegistryError, match="full"):
            content.keep(FILES, DIGEST, root)
    assert not list(_folder(root).parent.iterdir())
    content.keep(FILES, DIGEST, root)


def test_many_copies_at_once_are_one(root: Content) -> None:
    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            uris = set(pool.map(lambda _: content.keep(FILES, DIGEST, root), range(8)))
        assert len(uris) == 1
        assert [p.name for p in _folder(root).parent.iterdir()] == [DIGEST]
        shutil.rmtree(_folder(root))


def test_a_root_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RegistryError, match="content root"):
        content.prepare(Content(root=f"file://{tmp_path}/file/content"))
    with pytest.raises(RegistryError):
        content.take(DIGEST, Content(root=f"file://{tmp_path}/absent"))


def test_clients_are_sent_through_a_proxy_only_where_it_is_served(
    root: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxied = Content(root=root.root, clients="mlflow-artifacts:/kdguard-content")
    with pytest.raises(RegistryError, match="--app-name kdguard"):
        content.keep(FILES, DIGEST, proxied)
    monkeypatch.setattr(content, "_served", False)
    content.declare_served()
    uri = content.keep(FILES, DIGEST, proxied)
    assert uri == f"mlflow-artifacts:/kdguard-content/{DIGEST}"
    assert content.digest_at(Place.of(uri), proxied) == DIGEST


class _Bucket:
    """A store of objects that copies as MLflow's repositories do."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fails_after = 1000

    def list_artifacts(self, path: str | None = None) -> list[Any]:
        prefix = f"{path}/" if path else ""
        below = {k[len(prefix) :]: v for k, v in self.objects.items() if k.startswith(prefix)}
        files = [k for k in below if "/" not in k]
        folders = {k.partition("/")[0] for k in below if "/" in k}
        return [
            SimpleNamespace(path=prefix + k, is_dir=False, file_size=len(below[k])) for k in files
        ] + [SimpleNamespace(path=prefix + k, is_dir=True, file_size=None) for k in folders]

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> None:
        assert dst_path is not None
        place = Path(dst_path) / artifact_path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(self.objects[artifact_path])

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        if self.fails_after == 0:
            raise MlflowException("the connection was lost")  # a 500, which clients would repeat
        self.fails_after -= 1
        name = Path(local_file).name
        key = f"{artifact_path}/{name}" if artifact_path else name
        self.objects[key] = Path(local_file).read_bytes()


def test_an_object_store_is_filled_where_a_kill_left_it_and_never_overwritten() -> None:
    bucket, remote = _Bucket(), Content(root="s3://bucket/kdguard")
    files = FILES | {"inner/x": b"y"}
    digest = bundle_digest(files)

    def opened(_: str) -> _Bucket:
        return bucket

    bucket.fails_after = 1
    with pytest.raises(RegistryError, match="lost"):
        content.keep(files, digest, remote, opened=opened)
    with pytest.raises(RegistryError, match="other bytes"):
        content.take(digest, remote, opened=opened)
    bucket.fails_after = 1000
    assert content.keep(files, digest, remote, opened=opened) == f"s3://bucket/kdguard/{digest}"
    assert content.take(digest, remote, opened=opened) == files
    bucket.objects[f"{digest}/MLmodel"] = b"another"
    with pytest.raises(RegistryError, match="other bytes"):
        content.keep(files, digest, remote, opened=opened)
    assert bucket.objects[f"{digest}/MLmodel"] == b"another"

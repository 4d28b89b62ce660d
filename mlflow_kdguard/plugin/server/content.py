"""The content root: promoted bytes, under their own digest, where no server route can write.

What is stored are the bytes in memory that were hashed and judged; a later change of the version's
own folder changes nothing here. A folder that exists is read and compared, never trusted and never
repaired: bytes that differ there mean that somebody has write access who should not.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow_kdguard.artifacts import ADDED_BY_CLIENT, Store, digests, read_folder, read_store
from mlflow_kdguard.errors import KDGuardError, RegistryError
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.settings import Content

PROXIED = "mlflow-artifacts"
_REMEDY = "Check the content root (content.root in the server's settings)."
_served = False


def declare_served() -> None:
    """Say that this process serves reads of the content root, and refuses writes to it.

    The app plugin calls it. Without it, `content.clients: mlflow-artifacts:/…` would send clients
    to a folder that everybody may write to, and nothing is promoted.
    """
    global _served  # noqa: PLW0603  (one fact about the process)
    _served = True


def keep(
    files: Mapping[str, bytes],
    digest: str,
    content: Content,
    *,
    opened: Callable[[str], Store] | None = None,
) -> str:
    """Store a bundle under its digest, and return the URI under which clients read it.

    `digest` is artifacts.bundle_digest(files); `opened` gives the artifact repository of a URI, for
    a root that is no folder. Raises RegistryError where the root cannot be written, or holds other
    bytes under this digest.
    """
    if Place.of(content.served).scheme == PROXIED and not _served:
        raise RegistryError(
            f"content.clients is {content.served}, and this server does not run the app that "
            "serves it.",
            remedy="Start it with --app-name kdguard, or name another place.",
        )
    root = Place.of(content.root)
    if root.scheme == "file":
        _keep_folder(files, root.path / digest)
    elif opened is None:
        raise RegistryError(f"the content root {content.root} is no folder.", remedy=_REMEDY)
    else:
        _keep_remote(files, digest, opened(content.root), content.root)
    return f"{content.served.rstrip('/')}/{digest}"


def digest_at(place: Place, content: Content) -> str | None:
    """The bundle's digest where `place` lies directly in the content root; None elsewhere."""
    for root in (Place.of(content.root), Place.of(content.served)):
        if place.within(root) and len(place.parts) == len(root.parts) + 1:
            return place.parts[-1]
    return None


def take(
    digest: str, content: Content, *, opened: Callable[[str], Store] | None = None
) -> dict[str, bytes]:
    """The files that were kept under a digest; RegistryError where they are others by now.

    The note that MLflow's client leaves in a folder that it loads from is left out: the digest
    says what belongs there.
    """
    root = Place.of(content.root)
    with _answering(f"{content.root}/{digest}"):
        if root.scheme == "file":
            files = read_folder(root.path / digest)
        elif opened is None:
            raise RegistryError(f"the content root {content.root} is no folder.", remedy=_REMEDY)
        else:
            files = read_store(opened(content.root), content.root, below=digest)
    files.pop(ADDED_BY_CLIENT, None)
    if digest_json(digests(files)) != digest:
        raise _drifted(f"{content.root}/{digest}")
    return files


def prepare(content: Content) -> None:
    """Make the content root where it is a folder, and see that it can be written."""
    root = Place.of(content.root)
    if root.scheme == "file":
        with _answering(content.root):
            root.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root.path):
                pass


def _keep_folder(files: Mapping[str, bytes], place: Path) -> None:
    with _answering(str(place)):
        if not place.exists():
            draft = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
            try:
                _write(files, draft)
                draft.rename(place)
                _sync(place.parent)
            except OSError:
                if not place.exists():  # another worker was not faster
                    raise
            else:
                return
            finally:
                with suppress(FileNotFoundError):
                    shutil.rmtree(draft)
        _compare(files, read_folder(place), str(place))


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.chmod(0o444)
    folder.chmod(0o755)
    _sync(folder)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_remote(files: Mapping[str, bytes], digest: str, store: Store, root: str) -> None:
    """Upload what is missing; a kill in between leaves a part, which the next promotion fills."""
    where = f"{root}/{digest}"
    with _answering(where), tempfile.TemporaryDirectory() as folder:
        there = read_store(store, where, below=digest)
        _compare({name: files.get(name, b"") for name in there}, there, where)
        for name in sorted(files.keys() - there.keys()):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
            above = Path(name).parent.as_posix()
            store.log_artifact(str(path), digest if above == "." else f"{digest}/{above}")
        if files.keys() - there.keys():
            _compare(files, read_store(store, where, below=digest), where)


def _compare(files: Mapping[str, bytes], stored: Mapping[str, bytes], where: str) -> None:
    found = {name: data for name, data in stored.items() if name != ADDED_BY_CLIENT}
    if found != files:
        raise _drifted(where)


def _drifted(where: str) -> RegistryError:
    return RegistryError(
        f"{where} holds other bytes than its digest says: somebody has changed the content root.",
        remedy="Find out who; then remove that folder and promote the version anew.",
    )


@contextmanager
def _answering(where: str) -> Iterator[None]:
    try:
        yield
    except KDGuardError:
        raise
    except Exception as error:  # object stores raise the errors of their own clients
        first = (getattr(error, "strerror", None) or str(error).strip() or repr(error)).splitlines()
        raise RegistryError(
            f"the content root does not hold or take {where}: {first[0][:300]}.",
            remedy=_REMEDY,
        ) from error

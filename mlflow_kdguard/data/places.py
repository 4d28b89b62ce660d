"""Finding torchvision's folders under the data root, and downloading them on request only."""

from collections.abc import Sequence
from pathlib import Path

from mlflow_kdguard.data.collection import Places
from mlflow_kdguard.data.uri import Request


def folder(
    request: Request, places: Places, candidates: Sequence[str], *, torchvision: str | None
) -> Path:
    """The first of `candidates` (relative to the root) that is a folder.

    `torchvision` names the class that can download the set; it is asked only where the caller
    granted downloads and nothing is there yet. Raises DataError otherwise.
    """
    if places.root is None:
        raise request.error(
            f"{request.name} lies in a folder of data sets, and none was named",
            remedy=f"Name the one that holds {candidates[0]}: --data-root DIR.",
        )
    found = _first(places.root, candidates)
    if found is None and places.download:
        if torchvision is None:
            raise request.error(
                f"{request.name} cannot be downloaded: its owners ask for an agreement",
                remedy=f"Fetch it yourself and unpack it as {places.root / candidates[0]}.",
            )
        _download(request, places.root, torchvision)
        found = _first(places.root, candidates)
    if found is None:
        raise request.error(
            f"there is no folder {places.root / candidates[0]}",
            remedy="Check --data-root, or allow fetching it with --download.",
        )
    return found


def _first(root: Path, candidates: Sequence[str]) -> Path | None:
    return next((root / name for name in candidates if (root / name).is_dir()), None)


def _download(request: Request, root: Path, name: str) -> None:
    """Let torchvision fetch and verify (by its own MD5 list) both splits of a set."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise request.error(
            "downloading needs torchvision", remedy="Install it: pip install torchvision."
        ) from error
    kind = getattr(datasets, name)
    by_split = name in ("GTSRB", "Flowers102")
    try:
        if name.startswith("CIFAR"):
            # Unpacking is enough: the class itself would go on to unpickle the files.
            datasets.utils.download_and_extract_archive(
                kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5
            )
        else:
            for split in ("train", "test"):
                kind(root, download=True, **({"split": split} if by_split else {}))
    except (OSError, RuntimeError, ValueError) as error:
        raise request.error(
            f"downloading {name} failed: {error}", remedy="Check the network, or copy the files."
        ) from error

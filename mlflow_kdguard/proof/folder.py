"""A folder of proofs: one file an image, and an index that names them by their digests.

The index's own SHA-256 is what a certificate signs (`proofs`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.errors import CertificateError, UsageError
from mlflow_kdguard.files import canonical_json, read_bytes, sha256, write_bytes
from mlflow_kdguard.proof.check import Checker
from mlflow_kdguard.proof.container import LARGEST_FILE
from mlflow_kdguard.proof.document import Claim, Proof

INDEX = "proofs.json"
SCHEMA = "kdguard.proofs/1"
LARGEST_INDEX = 64 << 20
_SHARED = tuple(f.name for f in fields(Claim) if f.name not in ("image", "index", "upper"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One image's proof: its index in the data, its file's digest, and what it claims."""

    index: int
    sha256: str
    upper: float

    @property
    def file(self) -> str:
        """The file's name."""
        return name_of(self.index)


@dataclass(frozen=True, slots=True)
class Index:
    """All proofs of one run; `shared` is what their claims have in common."""

    shared: dict[str, Any]
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, claim: Claim, entries: Iterable[Entry]) -> "Index":
        """An index whose proofs all claim the like of `claim`."""
        shared = {name: getattr(claim, name) for name in _SHARED}
        return cls(shared, tuple(sorted(entries, key=lambda entry: entry.index)))

    def to_bytes(self) -> bytes:
        """The index file."""
        images = [{"index": e.index, "sha256": e.sha256, "upper": e.upper} for e in self.entries]
        return canonical_json({"schema": SCHEMA, **self.shared, "images": images})

    @property
    def digest(self) -> str:
        """What a certificate names."""
        return sha256(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Index":
        """Read an index; CertificateError where it is none."""
        try:
            value = json.loads(data)
            images = value.pop("images")
            schema = value.pop("schema")
            entries = tuple(Entry(e["index"], e["sha256"], e["upper"]) for e in images)
            index = cls(value, entries)
            known = schema == SCHEMA and value.keys() == set(_SHARED)
            same = known and index.to_bytes() == data
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _no_index() from error
        numbers = [e.index for e in entries]
        plain = all(
            type(e.index) is int and isinstance(e.sha256, str) and type(e.upper) is float
            for e in entries
        )
        if not same or not plain or numbers != sorted(set(numbers)):
            raise _no_index()
        return index


def name_of(index: int) -> str:
    """The file that holds the proof of image `index`."""
    return f"{index:06d}.kdproof"


def write_proof(folder: Path, proof: Proof) -> Entry:
    """Write one image's proof, whole or not at all."""
    data = proof.to_bytes()
    write_bytes(folder / name_of(proof.claim.index), data)
    return Entry(proof.claim.index, sha256(data), proof.claim.upper)


def write_index(folder: Path, index: Index) -> str:
    """Write the index, last of all; its digest."""
    write_bytes(folder / INDEX, index.to_bytes())
    return index.digest


def read_index(folder: Path, digest: str) -> Index:
    """The index of a folder, if it has this digest; else CertificateError."""
    path = folder / INDEX
    if not path.is_file():
        raise CertificateError(
            f"{folder} holds no {INDEX}, and the certificate names proofs.",
            remedy="Name the folder with --proofs, or ask the certificate's issuer for it.",
        )
    data = _read(path, what="the index of proofs", at_most=LARGEST_INDEX)
    if sha256(data) != digest:
        raise CertificateError(
            f"{path} is another index than the certified one: its SHA-256 is {sha256(data)}, "
            f"certified is {digest}.",
            remedy="Ask the certificate's issuer for the proofs that were signed.",
        )
    return Index.from_bytes(data)


def check_entry(
    checker: Checker, folder: Path, index: Index, entry: Entry, image: NDArray[np.float32]
) -> float:
    """The bound of one image, derived from its proof; CertificateError where anything differs."""
    path = folder / entry.file
    if not path.is_file():
        raise CertificateError(
            f"{path} is missing, and the certificate rests on it.",
            remedy="Ask the certificate's issuer for the whole folder.",
        )
    data = _read(path, what="the proof", at_most=LARGEST_FILE)
    if sha256(data) != entry.sha256:
        raise CertificateError(
            f"{path} is another proof than the certified one: its SHA-256 is {sha256(data)}, "
            f"certified is {entry.sha256}.",
            remedy="Restore the original file.",
        )
    proof = Proof.from_bytes(data)
    claimed = Index.of(proof.claim, [Entry(proof.claim.index, entry.sha256, proof.claim.upper)])
    if claimed != Index(index.shared, (entry,)):
        raise CertificateError(
            f"{path} claims something else than the index says.",
            remedy="The proofs do not belong together; do not believe them.",
        )
    return checker.check(proof, image)


def _read(path: Path, *, what: str, at_most: int) -> bytes:
    """A file that a certificate rests on: what cannot be read is not what was certified."""
    try:
        return read_bytes(path, what=what, at_most=at_most)
    except UsageError as error:
        raise CertificateError(
            error.message, remedy="Ask the certificate's issuer for the original file."
        ) from error


def _no_index() -> CertificateError:
    return CertificateError(
        f"the index of proofs is not one of {SCHEMA}.",
        remedy="Ask the certificate's issuer for the original file.",
    )

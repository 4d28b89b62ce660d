"""One image's proof: what it claims about which bytes, and the trees from which that follows."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.files import sha256
from mlflow_kdguard.proof import container
from mlflow_kdguard.proof.arithmetic import Array
from mlflow_kdguard.proof.container import Arrays, refused
from mlflow_kdguard.proof.trees import LARGEST_CELLS, Trees

SCHEMA = "kdguard.proof/1"
_HEX = frozenset("0123456789abcdef")
_TREE_TYPES = {
    "number": "<u4", "splits": "<u4", "node": "<u4", "column": "<u4", "value": "<f8",
    "evaluations": "<u4", "at": "<u4", "free": "<u4", "theta": "<u2", "fixed": "<u4",
}  # fmt: skip
# <u2 stays what it is in memory; all others take twice their room or more.
_GAP_TYPES = {"where": "<u2", "steep": "<f4", "weights": "<f4"}


def sha256_of(image: NDArray[np.float32]) -> str:
    """Digest of an image's pixels: float32, little-endian, row by row."""
    return sha256(np.ascontiguousarray(image, dtype="<f4").tobytes())


@dataclass(frozen=True, slots=True)
class Claim:
    """gap <= `upper` for image `index` of a data set, whose pixels (`sha256_of`) and networks have
    these digests.

    The gap is max |p_student,k - p_reference,k| over the ball cut to [0, 1], where k is the
    reference's class at the image (`top`), or any class (`all`).
    """

    reference: str
    student: str
    data: str
    image: str
    index: int
    norm: Literal["linf", "l2"]
    eps: float
    classes: Literal["all", "top"]
    upper: float


@dataclass(frozen=True, slots=True, eq=False)
class Gaps:
    """Trees of gaps: number 2k asks for p_S,k - p_R,k, 2k + 1 for the opposite.

    Multipliers of each evaluation: `where` (E×m: the tangent point's place in the box, of 65535),
    `steep` (E), `weights` (E×m).
    """

    trees: Trees
    where: NDArray[np.uint16]
    steep: Array
    weights: Array


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """A claim, trees of hidden switches by operation, of margins (reference, student), of gaps.

    Margin trees: number 2(k K + j) bounds logit j - logit k from above, one more from below.
    """

    claim: Claim
    hidden: dict[int, Trees]
    margins: tuple[Trees, Trees]
    gaps: Gaps

    def to_bytes(self) -> bytes:
        """The file."""
        groups = {f"hidden.{index}": trees for index, trees in self.hidden.items()}
        groups |= {"reference": self.margins[0], "student": self.margins[1]}
        groups["gap"] = self.gaps.trees
        arrays = {
            f"{group}/{name}": getattr(trees, name).astype(kind)
            for group, trees in groups.items()
            for name, kind in _TREE_TYPES.items()
        }
        for name, kind in _GAP_TYPES.items():
            arrays[f"gap/{name}"] = getattr(self.gaps, name).astype(kind)
        claim = {item.name: getattr(self.claim, item.name) for item in fields(Claim)}
        return container.pack({"schema": SCHEMA, **claim}, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Proof":
        """Read a file; CertificateError where it is not a proof of this version."""
        header, arrays = container.unpack(data)
        if header.pop("schema", None) != SCHEMA:
            raise refused(f"its schema is not {SCHEMA}")
        claim = _claim(header)
        groups = {name.partition("/")[0] for name in arrays}
        hidden = {_operation(group): group for group in groups if group.startswith("hidden.")}
        read = {group: _trees(arrays, group) for group in sorted(groups)}
        if groups != {"reference", "student", "gap", *hidden.values()}:
            raise refused("it holds other trees than a proof does")
        gaps = Gaps(
            read["gap"],
            _taken(arrays, "gap/where", "<u2", 2),
            _taken(arrays, "gap/steep", "<f4", 1).astype(np.float64),
            _taken(arrays, "gap/weights", "<f4", 2).astype(np.float64),
        )
        if arrays:
            raise refused(f"it holds the unknown array {min(arrays)!r}")
        trees = {index: read[group] for index, group in sorted(hidden.items())}
        return cls(claim, trees, (read["reference"], read["student"]), gaps)


def _claim(header: dict[str, Any]) -> Claim:
    if header.keys() != {item.name for item in fields(Claim)}:
        raise refused("its header does not have the keys of a claim")
    claim = Claim(**header)
    digests = (claim.reference, claim.student, claim.data, claim.image)
    ok = (
        all(isinstance(d, str) and len(d) == 64 and _HEX.issuperset(d) for d in digests)
        and type(claim.index) is int
        and claim.index >= 0
        and claim.norm in ("linf", "l2")
        and claim.classes in ("all", "top")
        and type(claim.eps) is float
        and type(claim.upper) is float
        and 0.0 < claim.eps < np.inf
        and 0.0 <= claim.upper <= 1.0
    )
    if not ok:
        raise refused("its claim is malformed")
    return claim


def _operation(group: str) -> int:
    text = group.removeprefix("hidden.")
    if not (text.isascii() and text.isdigit()) or str(int(text[:9])) != text:
        raise refused(f"it holds trees of {group[:40]!r}")
    return int(text)


def _trees(arrays: Arrays, group: str) -> Trees:
    taken = {
        name: _taken(arrays, f"{group}/{name}", kind, 2 if name == "theta" else 1)
        for name, kind in _TREE_TYPES.items()
    }
    wide: dict[str, Any] = {
        name: array.astype(np.int64) if array.dtype.str == "<u4" else array
        for name, array in taken.items()
    }
    return Trees(**wide)


def _taken(arrays: Arrays, name: str, kind: str, axes: int) -> NDArray[Any]:
    array = arrays.pop(name, None)
    if array is None or array.dtype.str != kind or array.ndim != axes:
        raise refused(f"its array {name!r} is missing, or of another type or shape")
    if kind != "<u2" and array.size > LARGEST_CELLS:
        raise refused(f"its array {name!r} has {array.size} numbers, more than {LARGEST_CELLS}")
    return array

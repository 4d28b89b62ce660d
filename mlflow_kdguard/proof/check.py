"""The checker: derives a proof's bound anew from the networks' bytes, and compares.

It shares no code with what searched for the bound, and believes nothing that the proof says but
which parts there are and with which multipliers to bound them: any multipliers give a bound.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import graph
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.graph import float32
from mlflow_kdguard.proof import boxes, confidence
from mlflow_kdguard.proof.arithmetic import Array, Indices, down, exp, gamma, sigmoid, up
from mlflow_kdguard.proof.confidence import Part
from mlflow_kdguard.proof.document import Proof, sha256_of
from mlflow_kdguard.proof.lower import joined
from mlflow_kdguard.proof.net import Net
from mlflow_kdguard.proof.passes import Known, Region, highest
from mlflow_kdguard.proof.search import Class, Search, folded
from mlflow_kdguard.proof.trees import Trees, evaluated


@dataclass(frozen=True, slots=True, eq=False)
class Checker:
    """Both networks, ready to check proofs about them."""

    reference: graph.Graph
    student: graph.Graph
    net: Net

    @classmethod
    def of(cls, reference: bytes, student: bytes) -> "Checker":
        """From ONNX bytes; ModelError for what cannot be read."""
        graphs = (
            graph.read(reference, where="the reference"),
            graph.read(student, where="the student"),
        )
        return cls(*graphs, joined(*graphs))

    def bound(self, proof: Proof, image: NDArray[np.float32]) -> float:
        """The bound that a proof's trees give for an image (C×H×W), whatever it claims.

        CertificateError where they give none, or were altered: what a file says twice must be the
        same both times.
        """
        self._check_trees(proof)
        for trees in (*proof.hidden.values(), *proof.margins, proof.gaps.trees):
            trees.unaltered(self.net.width)
        return self.derived(proof, image).bound

    def derived(self, proof: Proof, image: NDArray[np.float32]) -> "Derived":
        """The bound, and what each part of the trees contributes, in whatever form they are."""
        claim = proof.claim
        _check_image(image, self.reference)
        if (claim.reference, claim.student) != self.net.digests:
            raise CertificateError(
                "the proof is about other networks than these.",
                remedy="Name the reference and the student that were certified.",
            )
        if claim.image != sha256_of(image):
            raise CertificateError(
                f"the proof of image {claim.index} is about other pixels than these.",
                remedy="Name the data that were certified.",
            )
        self._check_trees(proof)
        centre = image.astype(np.float64).reshape(-1)
        region = Region.around(centre, claim.eps, claim.norm)
        # What overflows or is no number bounds nothing, and is looked for where it matters.
        with np.errstate(all="ignore"):
            known = boxes.bounded(self.net, region, proof.hidden)
            top = int(graph.evaluate(self.reference, image[None].astype(np.float64))[0].argmax())
            return _Judge(known, proof, top).derived()

    def _check_trees(self, proof: Proof) -> None:
        for trees in (*proof.hidden.values(), *proof.margins):
            trees.checked(self.net, 0)
        proof.gaps.trees.checked(self.net, 1 + self.net.classes)
        if not proof.hidden.keys() <= self.net.columns.keys():
            raise CertificateError("the proof holds trees of an operation without switches.")

    def float32_margin(
        self, image: NDArray[np.float32], *, eps: float, norm: Literal["linf", "l2"], classes: str
    ) -> float:
        """What float32 inference may add to a bound of the real functions around an image."""
        region = Region.around(image.astype(np.float64).reshape(-1), eps, norm)
        lo, hi = region.lo.reshape(image.shape), region.hi.reshape(image.shape)
        margins = float32.gap_margin(self.reference, self.student, lo, hi)[0]
        if classes == "all":
            return float(margins.max())
        top = int(graph.evaluate(self.reference, image[None].astype(np.float64))[0].argmax())
        return float(margins[top])

    def check(self, proof: Proof, image: NDArray[np.float32]) -> float:
        """The bound, if it is at most what the proof claims; else CertificateError."""
        bound = self.bound(proof, image)
        if not bound <= proof.claim.upper:
            raise CertificateError(
                f"image {proof.claim.index}: the proof claims a gap of at most "
                f"{proof.claim.upper:.9g}, and shows {bound:.9g}.",
                remedy="The proof was altered, or is about another image; do not believe it.",
            )
        return bound


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """The bound that follows from a proof; bounds of all evaluations of the gaps' trees, and what
    bounds each of their nodes anyway."""

    bound: float
    values: Array
    known: Array


def _check_image(image: NDArray[np.float32], model: graph.Graph) -> None:
    inside = image.dtype == np.float32 and bool(((image >= 0.0) & (image <= 1.0)).all())
    if image.shape != model.input_shape or not inside:
        raise CertificateError(
            f"the image is not float32 {model.input_shape} within [0, 1].",
            remedy="Name the data that were certified.",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Judge:
    """What is left to do once the networks are bounded around one image."""

    known: Known
    proof: Proof
    top: int

    def derived(self) -> Derived:
        """The largest gap over all classes that the claim speaks of."""
        gaps, classes = self.proof.gaps, self.known.net.classes
        if bool((gaps.trees.number >= 2 * classes).any()):
            raise CertificateError("the proof holds a tree for a class that there is not.")
        asked = sorted({self.top, *(gaps.trees.number // 2).tolist()})
        boxes_of = {k: self._class(k) for k in asked}
        caps = self._caps(boxes_of[self.top])
        values, plain, parent = Search(self.known, gaps, boxes_of).values()
        roots = [
            min(float(caps[n // 2]), _plain(boxes_of[n // 2], n))
            for n in gaps.trees.number.tolist()
        ]
        plain = np.minimum(plain, np.repeat(roots, gaps.trees.sizes))
        trees = gaps.trees.bounds(values, parent, plain)
        found = dict(zip(gaps.trees.number.tolist(), trees.tolist(), strict=True))
        bounds = [self._both(self.top, found, boxes_of[self.top])]
        if self.proof.claim.classes == "all":
            bounds += [
                min(float(caps[k]), self._both(k, found, boxes_of[k]) if k in boxes_of else 1.0)
                for k in range(classes)
                if k != self.top
            ]
        bound = max(*bounds, 0.0) + 4.0 * gamma(64 + 8 * classes)
        # What is no number is no bound.
        sound = bound <= 1.0 and not any(np.isnan(bounds))
        return Derived(bound if sound else 1.0, values, plain)

    def _caps(self, box: Class) -> Array:
        """Of each class, what its confidence is at most in both networks: float64 K."""
        classes = self.known.net.classes
        caps = [1.0 if k == self.top else _cap(box, self.top, k) for k in range(classes)]
        return np.array(caps)

    def _both(self, k: int, found: dict[int, float], box: Class) -> float:
        """Both directions of one class."""
        return max(min(found.get(n, np.inf), _plain(box, n)) for n in (2 * k, 2 * k + 1))

    def _class(self, k: int) -> "Class":
        """Margins of both networks to class k: passes, their difference, and trees."""
        net, known = self.known.net, self.known
        rows = folded(k, net.classes)
        both = np.concatenate((rows, -rows))
        ends = {}
        for output in {net.reference, net.student}:
            above, negative = highest(known, {output: both}).reshape(2, -1)
            ends[output] = (-negative, above)
        if net.reference == net.student:
            apart = (np.zeros(len(rows)), np.zeros(len(rows)))
        else:
            seeds = {net.reference: both, net.student: -both}
            above, negative = highest(known, seeds).reshape(2, -1)
            apart = (-negative, above)
        (r_lo, r_hi), (s_lo, s_hi) = ends[net.reference], ends[net.student]
        linked = (
            (np.maximum(r_lo, down(s_lo + apart[0])), np.minimum(r_hi, up(s_hi + apart[1]))),
            (np.maximum(s_lo, down(r_lo - apart[1])), np.minimum(s_hi, up(r_hi - apart[0]))),
        )
        parts = [
            _cut(known, trees, output, k, box)
            for trees, output, box in zip(
                self.proof.margins, (net.reference, net.student), linked, strict=True
            )
        ]
        return Class(parts[0], parts[1], (apart[0][None], apart[1][None]))


def _plain(box: Class, number: int) -> float:
    """What the margins themselves say of a direction; what is no number says nothing."""
    high, low, least, _ = box.direction(number)
    gaps = confidence.plain_gap(high, low), confidence.linked_gap(high, low, least)
    return float(np.nan_to_num(np.concatenate(gaps), nan=np.inf).min())


def _cut(known: Known, trees: Trees, output: int, k: int, box: tuple[Array, Array]) -> Part:
    """A box of margins, cut to what the trees of class k say."""
    lo, hi = box
    classes = known.net.classes
    pair, side = trees.number // 2, np.where(trees.number % 2 == 0, 1.0, -1.0)
    own, other = pair // classes, pair % classes
    if bool((pair >= classes * classes).any()) or bool((own == other).any()):
        raise CertificateError("the proof holds a tree for a margin that there is not.")
    mine = own == k
    if not mine.any():
        return Part.of(np.minimum(lo, hi)[None], np.maximum(lo, hi)[None])
    chosen = trees.take(mine)
    other, side = other[mine], side[mine]

    def rows(which: Indices) -> dict[int, Array]:
        tree = chosen.owner[which]
        seeds = np.zeros((len(which), classes))
        each = np.arange(len(which))
        seeds[each, other[tree]], seeds[each, k] = side[tree], -side[tree]
        return {output: seeds}

    bound = chosen.bounds(evaluated(known, chosen, rows))
    place, lo, hi = other - (other > k), lo.copy(), hi.copy()
    high = side > 0
    hi[place[high]] = np.minimum(hi[place[high]], bound[high])
    lo[place[~high]] = np.maximum(lo[place[~high]], -bound[~high])
    return Part.of(np.minimum(lo, hi)[None], np.maximum(lo, hi)[None])


def _cap(box: Class, top: int, k: int) -> float:
    """Upper bound of class k's confidence in both networks, from the margins to class `top`."""
    j = k - (k > top)
    caps = []
    for part in (box.reference, box.student):
        mass = exp(part.lo[0])
        rest = 1.0 + np.delete(mass, j).sum() * (1.0 - 1e-12)
        caps.append(float(sigmoid(part.hi[0, j] - np.log(rest))) + 1e-9)
    return max(caps)

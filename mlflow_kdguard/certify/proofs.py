"""From what a search kept to proofs: one an image, whose claim is what the checker derives."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.keep import Grown, Ints, Kept
from mlflow_kdguard.certify.prune import pruned
from mlflow_kdguard.certify.relax import PROVABLE
from mlflow_kdguard.certify.report import Question
from mlflow_kdguard.errors import ConfigError, SoundnessError, UsageError
from mlflow_kdguard.proof import Checker, Claim, Gaps, Proof, Trees
from mlflow_kdguard.proof.document import sha256_of
from mlflow_kdguard.proof.folder import INDEX, Entry, Index, write_index, write_proof
from mlflow_kdguard.records import CertifyReport, Model

RAISED = 1e-9
"""By how much a claim exceeds what the checker derived here: far more than another order of sums
can move it."""
NONE: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Writer:
    """Makes proofs about one pair of networks and one data set."""

    checker: Checker
    joint: Joint
    claim: Claim

    def write(self, kept: Kept, place: int, index: int, image: NDArray[np.float32]) -> Proof:
        """The proof of the image at `place` of a batch, which is image `index` of the data."""
        claim = replace(self.claim, index=index, image=sha256_of(image), upper=1.0)
        proof = Proof(
            claim, self._hidden(kept, place), self._margins(kept, place), self._gaps(kept, place)
        )
        found = self.checker.derived(proof, image)
        claim = replace(claim, upper=min(found.bound + RAISED, 1.0))
        proof = replace(proof, claim=claim)
        # That no gap exceeds 1 needs no tree.
        within = claim.upper - RAISED / 100.0 if claim.upper < 1.0 else np.inf
        return pruned(proof, found.values, found.known, within)

    def _hidden(self, kept: Kept, place: int) -> dict[int, Trees]:
        """Trees by the first switch operation that reads what they are about."""
        groups: dict[int, list[Trees]] = {}
        for grown in kept.hidden:
            reader = next(
                index
                for index, op in enumerate(self.joint.ops)
                if isinstance(op, ops.Clip) and op.inputs == (grown.index,)
            )
            trees = self._trees(grown, place)
            if len(trees.number):
                groups.setdefault(reader, []).append(trees)
        return {index: _together(parts) for index, parts in groups.items()}

    def _margins(self, kept: Kept, place: int) -> tuple[Trees, Trees]:
        reference, student = (
            _together([self._trees(g, place) for g in kept.margins if g.index == output])
            for output in (self.joint.reference, self.joint.student)
        )
        return reference, student

    def _gaps(self, kept: Kept, place: int) -> Gaps:
        parts = [self._trees(grown, place) for grown in kept.gaps]
        extra = [_extra(grown, place) for grown in kept.gaps]
        where, steep, weights = (np.concatenate(p) for p in zip(*extra, strict=True))
        numbers = np.concatenate([p.number for p in parts])
        if len(np.unique(numbers)) < len(numbers):
            raise SoundnessError("a class was searched twice; this is a bug, please report it.")
        return Gaps(_together(parts), where, steep, weights)

    def _trees(self, grown: Grown, place: int) -> Trees:
        """The trees of one image, in the checker's numbering of switches."""
        net, columns = self.checker.net, grown.setting.columns
        width, intervals = columns.width, 1 + net.classes
        target = np.zeros(width + intervals, dtype=np.int64)
        for index, where in columns.place.items():
            target[where] = np.arange(net.columns[index].start, net.columns[index].stop)
        target[width:] = net.width + np.arange(intervals)
        mine = grown.image == place
        rank = np.cumsum(mine) - 1
        tree, node, column, value = grown.splits.columns()
        split = mine[tree]
        owner, at, theta, _ = _evaluations(grown, mine)
        open_ = np.flatnonzero(grown.setting.exact.open_[place].cpu().numpy())
        count = int(mine.sum())
        return Trees(
            grown.number[mine],
            np.bincount(rank[tree[split]], minlength=count).astype(np.int64),
            node[split], target[column[split]], value[split],
            np.bincount(rank[owner], minlength=count).astype(np.int64),
            at, target[open_], theta[:, open_], NONE,
        )  # fmt: skip


def _evaluations(
    grown: Grown, mine: NDArray[np.bool_]
) -> tuple[Ints, Ints, NDArray[np.uint16], Ints]:
    """Tree, node, parameters and place of the evaluations of some trees, tree by tree."""
    owner, at = np.concatenate(grown.tree), np.concatenate(grown.at)
    theta = np.concatenate(grown.theta)
    some = np.flatnonzero(mine[owner])
    order: Ints = some[np.lexsort((at[some], owner[some]))].astype(np.int64)
    return owner[order], at[order], theta[order], order


def _extra(grown: Grown, place: int) -> tuple[NDArray[np.generic], ...]:
    _, _, _, order = _evaluations(grown, grown.image == place)
    return tuple(np.concatenate(p)[order] for p in zip(*grown.extra, strict=True))


def _together(parts: list[Trees]) -> Trees:
    """Trees about the same operation, with the columns of all of them."""
    if not parts:
        theta = np.zeros((0, 0), dtype=np.uint16)
        return Trees(NONE, NONE, NONE, NONE, np.zeros(0), NONE, NONE, NONE, theta, NONE)
    # Networks that give the same logits are bounded twice over; once is enough.
    seen = np.zeros(0, dtype=np.int64)
    for place, part in enumerate(parts):
        parts[place] = part.take(~np.isin(part.number, seen))
        seen = np.concatenate((seen, part.number))
    free = np.unique(np.concatenate([p.free for p in parts]))
    theta = np.zeros((sum(len(p.at) for p in parts), len(free)), dtype=np.uint16)
    start = 0
    for part in parts:
        theta[start : start + len(part.at), np.searchsorted(free, part.free)] = part.theta
        start += len(part.at)
    joined = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in ("number", "splits", "node", "column", "value", "evaluations", "at")
    }
    return Trees(**joined, free=free, theta=theta, fixed=NONE).told()


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """A folder that proofs are written to: one an image, and an index at the end."""

    place: Path
    writer: Writer
    entries: dict[int, Entry] = field(default_factory=dict)

    @classmethod
    def begun(
        cls, place: Path, joint: Joint, networks: tuple[bytes, bytes], question: Question
    ) -> "Folder":
        """Begin; ConfigError for a method without proofs, UsageError for a folder that has some."""
        config, method = question.config, question.method
        if method not in PROVABLE:
            raise ConfigError(
                f"bounds of {method!r} have no proofs.",
                remedy=f"Choose one of {', '.join(PROVABLE)}, or leave --proofs away.",
            )
        if (place / INDEX).exists():
            raise UsageError(
                f"{place} holds the proofs of another certification.",
                remedy="Name a new folder, or remove that one.",
            )
        checker = Checker.of(*networks)
        # What all claims have in common; `Writer.write` says which image each is about.
        digests = (*checker.net.digests, question.data, "")
        claim = Claim(*digests, 0, config.norm, config.eps, config.classes, 1.0)
        return cls(place, Writer(checker, joint, claim))

    def write(
        self, kept: Kept, indices: tuple[int, ...], x: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Write the proofs of a batch of images; what they claim: float64 B."""
        claims = np.ones(len(indices))
        for place, index in enumerate(indices):
            proof = self.writer.write(kept, place, index, x[place])
            self.entries[index] = write_proof(self.place, proof)
            claims[place] = proof.claim.upper
        return claims

    def finished(self, report: CertifyReport) -> CertifyReport:
        """The report, which names the index that is now written."""
        index = Index.of(self.writer.claim, self.entries.values())
        digest = write_index(self.place, index)
        return report.model_copy(update={"proofs": Model(sha256=digest)})

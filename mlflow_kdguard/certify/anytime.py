"""The order of work: cheap roots of all images, trees for those that stay open, then the search.

After its root every image has a sound bound. An image whose root is within what the search would
stop at ends there: trees cost more than anything else where switches are many. Whatever ends the
rest early (`budget`), each image has the least bound that was finished. What is kept for a proof is
always of the one bound that is returned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import gap, margins, trees
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.branch import HIDDEN_ROUNDS, Search, narrowed, roots_of, rounds
from mlflow_kdguard.certify.budget import Aim, Budget, Limit, Reached, nothing_ends
from mlflow_kdguard.certify.keep import Kept
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.setting import Setting


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Of B images: sound upper bounds (float64 B in [0, 1]), nodes an image, and the points of the
    largest gaps found (B×C×H×W). `stopped`: by which limit each image's search was ended, if by
    any."""

    upper: Tensor
    nodes: int
    best: Tensor
    stopped: tuple[Limit | None, ...]


def bounds(
    relaxed: Relaxed, classes: Tensor | None, budget: Budget, floor: Tensor | None = None
) -> Outcome:
    """Upper bounds of the gap of one class of each image, or of all (None).

    All classes: the reference's class first; then, together, whatever else can exceed its bound.
    `floor` (B): gaps that are known to be attained.
    """
    centre = relaxed.ball.centre
    nothing = torch.zeros(len(centre), dtype=torch.float64, device=centre.device)
    top = classes if classes is not None else relaxed.joint.logits(centre)[0].argmax(1)
    order = _Order(relaxed, top, classes is None, budget)
    roots = order.roots(nothing if floor is None else floor)
    if bool(roots.closed.all()):
        return roots.outcome(0)
    return order.searched(roots)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What one stage found about B images.

    `upper`: sound bounds; `rest`: of all classes but the first alone; `closed`: which need no more;
    `floor`: gaps known to be attained, `best`: where; `searches`: the first class's, and that of
    the others if there was any. `borrowed`: whose other classes are bounded by their roots.
    """

    upper: Tensor
    rest: Tensor
    closed: Tensor
    floor: Tensor
    best: Tensor
    searches: tuple[Search, ...]
    borrowed: Tensor
    stopped: tuple[Limit | None, ...]

    @property
    def spent(self) -> int:
        return sum(search.spent for search in self.searches)

    def outcome(self, before: int) -> Outcome:
        """What is told; `before`: nodes of other stages."""
        nodes = (before + self.spent) // len(self.upper)
        return Outcome(self.upper, nodes, self.best, self.stopped)

    def keep(self, *images: Tensor) -> None:
        """Leave of the notes for proofs, search by search, what is about these images (bool B)."""
        for search, which in zip(self.searches, images, strict=False):
            if search.kept is not None:
                search.kept.grown.keep(which)


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """What is asked about some images: the class `top` of each (B), or `every` one."""

    relaxed: Relaxed
    top: Tensor
    every: bool
    budget: Budget

    def roots(self, floor: Tensor) -> _Found:
        """Every question as one node, without trees; at a limit, as the planes at hand bound it."""
        relaxed, reached = self.relaxed, self.budget.limits.reached
        items = Items(torch.arange(len(floor), device=floor.device), self.top)
        start = gap.directions(relaxed, items, refining=False)
        searches = [_search(relaxed, start, floor, self.budget.aim, reached)]
        found = searches[0].run(0)
        upper = gap.sound(found.upper, relaxed)
        closed, rest = upper <= self.budget.aim.enough(searches[0].floor), torch.zeros_like(upper)
        if self.every:
            # Of all classes, this much is attained or the first one's bound anyway.
            known = torch.maximum(upper, searches[0].floor)
            # At a limit no other class is looked at.
            least = upper if reached() is None else torch.ones_like(upper)
            others, rest, most = _others(start, items, least)
            if len(others.image):
                start = gap.directions(relaxed, others, refining=False)
                searches.append(_search(relaxed, start, known, self.budget.aim, reached))
                above = gap.sound(searches[1].run(0).upper, relaxed)
                rest = torch.minimum(torch.maximum(rest, above), most)
                known = searches[1].floor
            closed &= rest <= self.budget.aim.enough(known)
        return _Found(
            torch.maximum(upper, rest), rest, closed, searches[0].floor, found.best,
            tuple(searches), torch.zeros_like(closed), (None,) * len(floor),
        )  # fmt: skip

    def searched(self, roots: _Found) -> Outcome:
        """Trees and the search for what the roots leave open."""
        open_ = ~roots.closed
        found = self._searched(roots, open_)
        if found.searches is roots.searches:
            return found.outcome(0)
        better = open_ & (found.upper <= roots.upper)
        roots.keep(~better, ~better | found.borrowed)
        found.keep(better, better)
        best = torch.where(open_.view(-1, 1, 1, 1), found.best, roots.best)
        upper = torch.where(better, found.upper, roots.upper)
        return replace(found, upper=upper, best=best).outcome(roots.spent)

    def _searched(self, roots: _Found, open_: Tensor) -> _Found:
        """The same for all classes of the open images; the roots where a limit comes before."""
        notes = _Notes.of(self.relaxed.kept)
        items = Items(open_.nonzero()[:, 0], self.top[open_])
        try:
            self.budget.go_on()
            relaxed = replace(self.relaxed, go_on=self.budget.go_on)
            relaxed = trees.refined(relaxed, rounds(self.budget.nodes, HIDDEN_ROUNDS), open_)
            first, start = self._begun(relaxed, items, roots.floor)
        except Reached as end:
            notes.restore()
            return replace(roots, stopped=_named(open_, end.limit))
        found = first.run(self.budget.nodes * len(open_) - roots.searches[0].spent)
        upper = gap.sound(found.upper, relaxed)
        whole = _Found(
            upper, torch.zeros_like(upper), ~open_, first.floor, found.best, (first,),
            torch.zeros_like(open_), _named(found.left, first.stopped or "nodes"),
        )  # fmt: skip
        return self._with_others(relaxed, items, start, whole, roots) if self.every else whole

    def _with_others(
        self, relaxed: Relaxed, items: Items, start: gap.Directions, first: _Found, roots: _Found
    ) -> _Found:
        """And the other classes, where the first one's bound does not hold for them anyway."""
        others, rest, _ = _others(start, items, first.upper)
        if not len(others.image):
            return first
        notes = _Notes.of(self.relaxed.kept)
        try:
            known = torch.maximum(first.upper, first.floor)
            search, _ = self._begun(relaxed, others, known)
        except Reached as end:
            notes.restore()
            which = torch.zeros_like(first.closed)
            which[others.image] = True
            rest = torch.where(which, torch.maximum(rest, roots.rest), rest)
            return replace(
                first, upper=torch.maximum(first.upper, rest), borrowed=which,
                stopped=_either(first.stopped, _named(which, end.limit)),
            )  # fmt: skip
        spent = roots.searches[1].spent if len(roots.searches) > 1 else 0
        found = search.run(self.budget.nodes * len(first.upper) - spent)
        above = gap.sound(found.upper, relaxed)
        raised = (found.upper > first.upper).view(-1, 1, 1, 1)
        return replace(
            first, upper=torch.maximum(first.upper, above),
            best=torch.where(raised, found.best, first.best), searches=(*first.searches, search),
            stopped=_either(first.stopped, _named(found.left, search.stopped or "nodes")),
        )  # fmt: skip

    def _begun(
        self, relaxed: Relaxed, items: Items, floor: Tensor
    ) -> tuple[Search, gap.Directions]:
        """A search with the margins' trees behind it; Reached where a limit comes first."""
        self.budget.go_on()
        start = gap.directions(relaxed, items, refining=False)
        start = narrowed(relaxed, items, start, self.budget.nodes)
        return _search(relaxed, start, floor, self.budget.aim, self.budget.limits.reached), start


@dataclass(frozen=True, slots=True, eq=False)
class _Notes:
    """How much a proof's notes held: trees that a limit cut short are no part of it."""

    kept: Kept | None
    hidden: int = 0
    margins: int = 0

    @classmethod
    def of(cls, kept: Kept | None) -> "_Notes":
        return cls(None) if kept is None else cls(kept, len(kept.hidden), len(kept.margins))

    def restore(self) -> None:
        if self.kept is not None:
            del self.kept.hidden[self.hidden :], self.kept.margins[self.margins :]


def _search(
    relaxed: Relaxed,
    start: gap.Directions,
    floor: Tensor,
    aim: Aim,
    reached: Callable[[], Limit | None] = nothing_ends,
) -> Search:
    setting = Setting.of(relaxed, (relaxed.joint.student, relaxed.joint.reference))
    return Search(setting, roots_of(setting, start), floor, reached=reached, aim=aim)


def _others(start: gap.Directions, items: Items, upper: Tensor) -> tuple[Items, Tensor, Tensor]:
    """The other classes that can exceed `upper` (B), what bounds all those that cannot (B), and
    what bounds all other classes (B).

    `start`: margins of the first class of each image, `items`.
    """
    caps = torch.maximum(margins.caps(start.reference, items), margins.caps(start.student, items))
    caps = caps.nan_to_num(1.0).clamp(max=1.0)
    wanted = caps > upper[items.image][:, None]
    row, klass = wanted.nonzero(as_tuple=True)
    rest, most = torch.zeros_like(upper), torch.zeros_like(upper)
    rest[items.image] = caps.masked_fill(wanted, 0.0).amax(1)
    most[items.image] = caps.amax(1)
    return Items(items.image[row], klass), rest, most


def _named(which: Tensor, limit: Limit) -> tuple[Limit | None, ...]:
    return tuple(limit if one else None for one in which.tolist())


def _either(
    first: tuple[Limit | None, ...], second: tuple[Limit | None, ...]
) -> tuple[Limit | None, ...]:
    return tuple(a or b for a, b in zip(first, second, strict=True))

"""What was asked about patches, what was found, and the report of it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlflow_kdguard import graph
from mlflow_kdguard.certify import flips
from mlflow_kdguard.certify.contents import Scene
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.region import Region, whole
from mlflow_kdguard.config import PatchSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import sha256
from mlflow_kdguard.graph.float32 import lead_margin
from mlflow_kdguard.records import (
    Flips,
    Model,
    PatchPlace,
    PatchReport,
    PatchSample,
    PatchWitness,
    Rate,
    Source,
    Status,
)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What was asked: the network, the squares, the class, and the images that were drawn.

    `indices`, `ranks` (among the `population` images of other classes) and `answers` (the network's
    class for the image as it is) go together.
    """

    model: graph.Graph
    joint: Joint
    quick: Joint
    student: str
    data: Dataset
    target: int
    regions: tuple[Region, ...]
    config: PatchSection
    nonce: str
    device: torch.device
    indices: tuple[int, ...]
    ranks: tuple[int, ...]
    population: int
    answers: tuple[int, ...]
    began: float = field(default_factory=time.monotonic)

    def scene(self, region: Region, part: Sequence[int], *, quick: bool = False) -> Scene:
        """The images at `part` (places in `indices`), in float64, or in float32 to search in."""
        x, _ = self.data.batch([self.indices[i] for i in part])
        images = torch.from_numpy(x).to(self.device, torch.float32 if quick else torch.float64)
        joint = self.quick if quick else self.joint
        errors = images.new_zeros((len(part), self.model.classes - 1), dtype=torch.float64)
        if not quick:
            errors = self.float32_errors(region, images)
        return Scene(joint, images, region, self.target, self.config.margin, errors)

    def float32_errors(self, region: Region, images: Tensor) -> Tensor:
        """What onnxruntime's rounding may add to z_t - z_k for any content: float64 B×(K-1)."""
        ball = region.box(images, *whole(region, images))
        ends = ball.lo.cpu().numpy(), ball.hi.cpu().numpy()
        return torch.from_numpy(lead_margin(self.model, *ends, self.target)).to(images.device)

    def generator(self, region: Region, first: int) -> torch.Generator:
        """Where the random starts of one batch come from."""
        told = (self.student, self.data.sha256, str(self.target), str(region), str(region.size))
        text = "\x1f".join((*told, self.nonce, str(first)))
        return torch.Generator().manual_seed(int(sha256(text.encode())[:15], 16))

    @property
    def effort(self) -> flips.Effort:
        """How long to search for contents that flip."""
        return flips.Effort(self.config.pgd_steps, self.config.restarts)


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One image at one position; `contents` is that of the largest lead found.

    `bound` of the lead speaks of the real function, `upper` of what onnxruntime computes.
    """

    proved: bool
    flipped: bool
    lead: float
    bound: float
    upper: float
    nodes: int
    seconds: float
    contents: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Overall:
    """One patch for all images at one position: images that it flips, and that any can."""

    contents: Tensor
    flipped: int
    most: int


def report(
    question: Question,
    judged: Mapping[Region, list[Judged | None]],
    overall: Mapping[Region, Overall],
    *,
    complete: bool,
) -> PatchReport:
    """The report over all drawn images; what was not judged counts as unproved."""
    count = len(question.indices)
    rows = [[items[place] for items in judged.values()] for place in range(count)]
    samples = tuple(_sample(question, place, row) for place, row in enumerate(rows))
    places = tuple(
        _place(region, [row[number] for row in rows], overall.get(region))
        for number, region in enumerate(question.regions)
    )
    return PatchReport(
        student=Model(sha256=question.student),
        data=Source(uri=question.data.uri, sha256=question.data.sha256),
        target=question.target,
        size=question.config.size,
        channels=question.data.shape[0],
        margin=question.config.margin,
        nodes=question.config.nodes,
        population=question.population,
        selection="uniform-seeded",
        nonce=question.nonce,
        device=str(question.device),
        complete=complete,
        clean=Rate(k=question.answers.count(question.target), n=count),
        each=_flips([sample.status for sample in samples]),
        universal=Flips(
            attack=max(place.universal.attack for place in places),
            certified=max(place.universal.certified for place in places),
            n=count,
        ),
        places=places,
        samples=samples,
        seconds=time.monotonic() - question.began,
    )


def status(item: Judged | None) -> Status:
    """PROVED: no content flips the image; REFUTED: one that does is known."""
    if item is None:
        return Status.UNDECIDED
    if item.proved:
        return Status.PROVED
    return Status.REFUTED if item.flipped else Status.UNDECIDED


def _sample(question: Question, place: int, row: list[Judged | None]) -> PatchSample:
    at = tuple(status(item) for item in row)
    both = Status.PROVED if set(at) == {Status.PROVED} else Status.UNDECIDED
    known = [(i, item) for i, item in enumerate(row) if item is not None]
    number, best = max(known, key=lambda pair: pair[1].lead, default=(0, None))
    upper = max((item.upper for _, item in known), default=math.inf)
    bound = max((item.bound for _, item in known), default=math.inf)
    bounded = len(known) == len(row) and math.isfinite(upper)
    refuted = Status.REFUTED in at
    return PatchSample(
        index=question.indices[place],
        rank=question.ranks[place],
        label=int(question.data.y[question.indices[place]]),
        answer=question.answers[place],
        status=Status.REFUTED if refuted else both,
        at=at,
        lead=None if best is None else best.lead,
        bound=bound if bounded else None,
        upper=upper if bounded else None,
        nodes=sum(item.nodes for _, item in known),
        seconds=sum(item.seconds for _, item in known),
        witness=_witness(question.regions[number], best) if refuted else None,
    )


def _witness(region: Region, item: Judged | None) -> PatchWitness | None:
    if item is None:
        return None
    return PatchWitness(position=(region.row, region.column), pixels=_pixels(item.contents))


def _pixels(contents: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in contents.flatten())


def _place(region: Region, column: list[Judged | None], found: Overall | None) -> PatchPlace:
    each = _flips([status(item) for item in column])
    universal = each.model_copy(update={"attack": 0})
    if found is not None:
        universal = Flips(attack=found.flipped, certified=found.most, n=each.n)
    return PatchPlace(
        position=(region.row, region.column),
        each=each,
        universal=universal,
        patch=() if found is None else _pixels(found.contents),
    )


def _flips(statuses: list[Status]) -> Flips:
    return Flips(
        attack=statuses.count(Status.REFUTED),
        certified=len(statuses) - statuses.count(Status.PROVED),
        n=len(statuses),
    )

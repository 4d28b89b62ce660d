"""certify_patch(): how many images any patch in a family can send to a class.

Read `contents` for the bound of an image, `shared` for that of one patch on all images, `flips`
for the attacks beneath them; what the numbers mean is in `docs/reference/certify-patch.md`.
"""

import time

import numpy as np
import torch

from mlflow_kdguard import graph
from mlflow_kdguard.certify import contents, flips, shared
from mlflow_kdguard.certify.joint import join
from mlflow_kdguard.certify.parallel import in_order, workers
from mlflow_kdguard.certify.region import Region
from mlflow_kdguard.certify.relax import plain_arithmetic
from mlflow_kdguard.certify.tally import Judged, Overall, Question, report
from mlflow_kdguard.config import PatchSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import ConfigError, DataError, SoundnessError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import PatchReport, Progress, silent
from mlflow_kdguard.training.interrupt import Signals

_BATCH_PIXELS = 20_000
_BATCH = 25
_SHARED = 10
"""Boxes of one patch for all, times images that are open in them, for each node of the budget."""

Row = list[Judged | None]
Rows = dict[Region, Row]


def certify_patch(
    student: bytes,
    data: Dataset,
    *,
    target: int,
    config: PatchSection,
    nonce: str = "",
    device: torch.device | None = None,
    progress: Progress = silent,
) -> PatchReport:
    """Bounds on the share of images that patches of any content send to class `target`.

    `student`: ONNX bytes. Which images of other classes are judged follows from its digest, that
    of `data`, the target and `nonce`. Ctrl-C and SIGTERM end the work early: the report holds what
    was finished, and is not `complete`.
    Raises ModelError for a graph that cannot be bounded, DataError for images that do not fit it,
    ConfigError for a target or a position that does not, SoundnessError where a patch beats a
    bound.
    """
    place = device if device is not None else torch.device("cpu")
    question = _question(student, data, target, config, nonce=nonce, device=place)
    parts = [(region, part) for region in question.regions for part in _batches(question)]
    judged: Rows = {region: [] for region in question.regions}
    overall: dict[Region, Overall] = {}
    with Signals() as signals:

        def judge(part: tuple[Region, range]) -> Row:
            skipped: Row = [None] * len(part[1])
            return skipped if signals.struck else _judge(question, *part, signals)

        found = in_order(judge, parts, at_once=workers(question.device))
        for number, ((region, _), row) in enumerate(zip(parts, found, strict=True), 1):
            judged[region] += row
            progress("certify-patch", number, len(parts), {"proved": _share(judged)})
        for number, region in enumerate(question.regions, 1):
            items = [item for item in judged[region] if item is not None]
            if not signals.struck:
                overall[region] = _overall(question, region, items, signals)
            progress("one patch for all", number, len(question.regions), {})
        complete = not signals.struck
    return report(question, judged, overall, complete=complete)


def _share(judged: Rows) -> float:
    done = [item is not None and item.proved for items in judged.values() for item in items]
    return sum(done) / max(1, len(done))


def _question(
    student: bytes,
    data: Dataset,
    target: int,
    config: PatchSection,
    *,
    nonce: str,
    device: torch.device,
) -> Question:
    model = graph.read(student, where="the student")
    joint = join(model, model, device=device)
    if data.shape != model.input_shape:
        raise DataError(
            f"{data.uri} has images of shape {data.shape}, the network takes {model.input_shape}.",
            remedy="Certify on the data that the network was made for.",
        )
    if not 0 <= target < model.classes:
        raise ConfigError(
            f"there is no class {target} to aim at.", remedy=f"Name one of 0..{model.classes - 1}."
        )
    regions = tuple(Region.named(p, config.size, data.shape) for p in config.positions)
    if len(set(regions)) < len(regions):
        raise ConfigError("two positions are the same.", remedy="Name each of them once.")
    others = _others(data, target, model.classes)
    digest = sha256(student)
    ranks = draw(len(others), config.samples, digest, data.sha256, f"target={target}", nonce)
    indices = tuple(int(others[rank]) for rank in ranks)
    images, _ = data.batch(indices)
    answers = graph.evaluate(model, images.astype(np.float64)).argmax(1)
    return Question(
        model, joint, joint.cast(torch.float32, device), digest, data, target, regions, config,
        nonce, device, indices, ranks, len(others), tuple(int(answer) for answer in answers),
    )  # fmt: skip


def _others(data: Dataset, target: int, classes: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Places of the images of other classes: those that an attack on `target` is counted on."""
    if len(data) and (data.y.min() < 0 or data.y.max() >= classes):
        raise DataError(
            f"{data.uri} has labels outside 0..{classes - 1}.",
            remedy="Certify on labelled images: those of the target class are left out.",
        )
    others = np.flatnonzero(data.y != target)
    if len(others) == 0:
        raise DataError(
            f"{data.uri} has no image of a class other than {target}.", remedy="Name a test set."
        )
    return others


def _batches(question: Question) -> list[range]:
    """Places in `indices`, some at a time: the same whatever the number of threads."""
    size = max(1, min(_BATCH, _BATCH_PIXELS // int(np.prod(question.data.shape))))
    count = len(question.indices)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _judge(question: Question, region: Region, part: range, signals: Signals) -> Row:
    """Attack and bound a batch of images at one position."""
    began = time.perf_counter()
    scene, quick = question.scene(region, part), question.scene(region, part, quick=True)
    generator = question.generator(region, part.start)
    best = flips.single(quick, effort=question.effort, generator=generator)
    with plain_arithmetic(question.device):
        found = contents.search(
            scene, best, nodes=question.config.nodes, stopped=lambda: signals.struck
        )
    leads, flipped = flips.attained(question.model, scene, found.best)
    bounds = found.upper.tolist(), found.computed.tolist()
    seconds = (time.perf_counter() - began) / len(part)
    judged: Row = []
    for place, closed, flip, low, bound, up, nodes, content in zip(
        part, found.closed.tolist(), flipped, leads, *bounds, found.nodes.tolist(),
        found.best.cpu(), strict=True,
    ):  # fmt: skip
        item = Judged(closed, flip, float(low), bound, up, nodes, seconds, content)
        _check_sound(question, region, place, item)
        judged.append(item)
    return judged


def _check_sound(question: Question, region: Region, place: int, item: Judged) -> None:
    """No lead, evaluated in float64 with its own small error, may exceed the bound of all."""
    beyond = item.lead - item.bound
    if beyond > 1e-9 * (1.0 + abs(item.lead)) or (item.proved and item.flipped):
        raise SoundnessError(
            f"image {question.indices[place]}: a patch at {region} has a lead of {item.lead:.17g}, "
            f"above the bound {item.bound:.17g}.",
            remedy="This is a bug in the bound; please report it with the model.",
        )


def _overall(question: Question, region: Region, items: list[Judged], signals: Signals) -> Overall:
    """Attack and bound all images at one position with one content."""
    everything = range(len(question.indices))
    scene = question.scene(region, everything)
    quick = question.scene(region, everything, quick=True)
    known = torch.stack([item.contents for item in items if item.flipped] or [items[0].contents])
    generator = question.generator(region, -1)
    best = flips.universal(quick, known, effort=question.effort, generator=generator)
    repeated = best.expand(len(items), *best.shape)
    leads, flipped = flips.attained(question.model, scene, repeated)
    for place, (item, low, flip) in enumerate(zip(items, leads, flipped, strict=True)):
        at = Judged(item.proved, flip, float(low), item.bound, item.upper, 0, 0.0, best)
        _check_sound(question, region, place, at)
    open_ = torch.tensor([i for i, item in enumerate(items) if not item.proved], dtype=torch.int64)
    with plain_arithmetic(question.device):
        counted = shared.count(
            scene,
            open_.to(question.device),
            enough=sum(flipped),
            pairs=question.config.nodes * _SHARED,
            stopped=lambda: signals.struck,
        )
    if counted.most < sum(flipped):
        raise SoundnessError(
            f"a patch at {region} flips {sum(flipped)} images, and {counted.most} at most can be.",
            remedy="This is a bug in the bound; please report it with the model.",
        )
    return Overall(best.cpu(), sum(flipped), counted.most)

"""What clean networks would answer: the null distribution behind a p-value.

A conformal p-value, (1 + #{null >= statistic}) / (N + 1), is at most alpha with probability at most
alpha for a clean network that is exchangeable with the N calibration networks: same architecture,
same training regime, same amount of data. Nothing checks the regime of a network that was trained
elsewhere; the file says which regime its networks had, and whoever uses it vouches for the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from torch import nn

from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.audit.question import Question
from mlflow_kdguard.config import Loop, explain
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import read_bytes, write_json
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.nets.zoo import build
from mlflow_kdguard.records import Record, Source
from mlflow_kdguard.training import derive, fit

Statistic = Callable[[nn.Module], float]


class Regime(Record):
    """How the calibration networks were trained; eps 0 is plain training."""

    eps: float = Field(ge=0)
    pgd_steps: int = Field(ge=0)
    loop: Loop


class Calibration(Record):
    """Statistics of clean networks, and what they are statistics of (`kdguard.calibration/1`)."""

    schema_: Literal["kdguard.calibration/1"] = Field("kdguard.calibration/1", alias="schema")
    architecture: Architecture
    regime: Regime
    data: Source
    images: int = Field(ge=1)
    radius: float = Field(gt=0)
    steps: int = Field(ge=0)
    batch: int = Field(ge=1)
    seed: int
    null: tuple[float, ...] = Field(min_length=1)

    def p_value(self, statistic: float) -> float:
        """(1 + #{null >= statistic}) / (N + 1)."""
        return (1 + sum(each >= statistic for each in self.null)) / (len(self.null) + 1)

    def check(self, question: Question, where: str) -> None:
        """ConfigError where images or settings are not those of the calibration."""
        config, data = question.config, question.data
        pairs = {
            "radius": (self.radius, config.radius),
            "steps": (self.steps, config.steps),
            "batch": (self.batch, config.batch),
            "image shape": (self.architecture.shape, data.shape),
            "classes": (self.architecture.classes, data.classes),
            "number of images": (self.images, len(data)),
            "data digest": (self.data.sha256, data.sha256),
        }
        wrong = [
            f"{key} {had} there, {now} here" for key, (had, now) in pairs.items() if had != now
        ]
        if wrong:
            raise ConfigError(
                f"calibration {where} was made for something else: {'; '.join(wrong)}.",
                remedy="Make one with these settings and data (audit.shadows).",
            )


@dataclass(frozen=True, slots=True)
class Null:
    """A calibration that applies, or why there is none."""

    record: Calibration | None
    why: str = ""

    def document(self) -> dict[str, Any]:
        """For the finding's details."""
        if self.record is None:
            return {"why": self.why}
        return self.record.document()


def null_of(net: nn.Module, question: Question, statistic: Statistic) -> Null:
    """The calibration for `net`: from the file, else from fresh shadow networks, else none.

    With `config.calibration` and `config.shadows`, a file that is not there yet is made.
    Raises ConfigError for a file of other settings or data, UsageError for one that is missing.
    """
    config = question.config
    path = None if config.calibration is None else Path(config.calibration)
    if path is None and config.shadows == 0:
        return Null(None, "not calibrated: no calibration file and no shadow networks")
    known = getattr(net, "architecture", None)
    if not isinstance(known, Architecture):
        return Null(None, "not calibrated: the network's architecture is not known")
    record = None
    if path is not None and (path.exists() or config.shadows == 0):
        record = load(path)
        record.check(question, str(path))
    if record is None:
        record = calibrate(known, question, statistic)
        if path is not None:
            write_json(path, record.document())
    return _applicable(record, known, config.alpha)


def _applicable(record: Calibration, known: Architecture, alpha: float) -> Null:
    if record.architecture != known:
        made, asked = record.architecture.arch, known.arch
        return Null(None, f"not calibrated: the networks were {made}, this one is {asked}")
    if 1 / (len(record.null) + 1) > alpha:
        count = len(record.null)
        return Null(None, f"not calibrated: {count} networks cannot decide at level {alpha:g}")
    return Null(record)


def load(path: Path) -> Calibration:
    """Read a calibration file; UsageError or ConfigError names the path."""
    document = read_bytes(path, what="the calibration")
    try:
        return Calibration.model_validate_json(document)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a calibration: {explain(error)}",
            remedy="Make one with audit.shadows and audit.calibration.",
        ) from error


def calibrate(architecture: Architecture, question: Question, statistic: Statistic) -> Calibration:
    """Train `config.shadows` clean networks on the question's images and take their statistics."""
    config = question.config
    null = []
    kept: list[Path] = []
    for number in range(config.shadows):
        seed = derive(question.seed, "shadow", number)
        # The network in question was built from this architecture: its code is allowed already.
        shadow = build(architecture, seed=seed, trust_code=True)
        if question.folder is not None:
            kept.append(question.folder / f"shadow-{number:02d}.checkpoint.pt")
        fit(
            shadow,
            question.data,
            madry(eps=config.shadow_eps, steps=config.shadow_pgd_steps),
            config.shadow_loop,
            seed=seed,
            device=question.device,
            what=f"shadow {number + 1} of {config.shadows}",
            progress=question.progress,
            checkpoint=kept[-1] if kept else None,
            depends=f"madry {config.shadow_eps} {config.shadow_pgd_steps}",
        )
        null.append(statistic(shadow))
    for file in kept:
        file.unlink(missing_ok=True)
    return Calibration(
        architecture=architecture,
        regime=Regime(
            eps=config.shadow_eps, pgd_steps=config.shadow_pgd_steps, loop=config.shadow_loop
        ),
        data=Source(uri=question.data.uri, sha256=question.data.sha256),
        images=len(question.data),
        radius=config.radius,
        steps=config.steps,
        batch=config.batch,
        seed=question.seed,
        null=tuple(null),
    )

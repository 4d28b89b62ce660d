"""What clean networks would answer: the null distribution behind a p-value.

A conformal p-value, (1 + #{null >= statistic}) / (N + 1), is at most alpha with probability at most
alpha for a clean network that is exchangeable with the N calibration networks: same architecture,
same training regime, same amount of data. Nothing checks the regime of a network that was trained
elsewhere; the file says which regime its networks had, and whoever uses it vouches for the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from torch import nn

from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.audit.question import Question
from mlflow_kdguard.config import AuditSection, Loop, explain
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


class Origin(Record):
    """Which clean networks a calibration is made of, and which images and settings it is for."""

    architecture: Architecture
    regime: Regime
    data: Source
    images: int = Field(ge=1)
    steps: int = Field(ge=0)
    batch: int = Field(ge=1)
    seed: int

    def settings(self, config: AuditSection) -> dict[str, tuple[Any, Any]]:
        """What a calibration had and an audit has, by name, where they must agree."""
        return {"steps": (self.steps, config.steps), "batch": (self.batch, config.batch)}

    def check(self, question: Question, where: str) -> None:
        """ConfigError where images or settings are not those of the calibration."""
        data = question.data
        pairs = self.settings(question.config) | {
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


class Calibration(Origin):
    """Statistics of clean networks, and what they are statistics of (`kdguard.calibration/1`)."""

    schema_: Literal["kdguard.calibration/1"] = Field("kdguard.calibration/1", alias="schema")
    radius: float = Field(gt=0)
    null: tuple[float, ...] = Field(min_length=1)

    def p_value(self, statistic: float) -> float:
        """(1 + #{null >= statistic}) / (N + 1)."""
        return (1 + sum(each >= statistic for each in self.null)) / (len(self.null) + 1)

    def settings(self, config: AuditSection) -> dict[str, tuple[Any, Any]]:
        return {"radius": (self.radius, config.radius)} | super().settings(config)


Kept = TypeVar("Kept", bound=Origin)


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
    found = find(net, question, Calibration, lambda known: calibrate(known, question, statistic))
    if isinstance(found, str):
        return Null(None, found)
    count, alpha = len(found.null), question.config.alpha
    if 1 / (count + 1) > alpha:
        return Null(None, f"not calibrated: {count} networks cannot decide at level {alpha:g}")
    return Null(found)


def find(
    net: nn.Module, question: Question, kind: type[Kept], make: Callable[[Architecture], Kept]
) -> Kept | str:
    """The calibration for `net`, or why there is none.

    From the file, else made from fresh shadow networks (and written, where a file is named).
    Raises ConfigError for a file of other settings or data, UsageError for one that is missing.
    """
    config = question.config
    path = None if config.calibration is None else Path(config.calibration)
    if path is None and config.shadows == 0:
        return "not calibrated: no calibration file and no shadow networks"
    known = getattr(net, "architecture", None)
    if not isinstance(known, Architecture):
        return "not calibrated: the network's architecture is not known"
    if path is not None and (path.exists() or config.shadows == 0):
        record = load(path, kind)
        record.check(question, str(path))
    else:
        record = make(known)
        if path is not None:
            write_json(path, record.document())
    if record.architecture != known:
        made, asked = record.architecture.arch, known.arch
        return f"not calibrated: the networks were {made}, this one is {asked}"
    return record


def load(path: Path, kind: type[Kept]) -> Kept:
    """Read a calibration file of one kind; UsageError or ConfigError names the path."""
    document = read_bytes(path, what="the calibration")
    try:
        return kind.model_validate_json(document)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a calibration: {explain(error)}",
            remedy="Make one with audit.shadows and audit.calibration.",
        ) from error


def calibrate(architecture: Architecture, question: Question, statistic: Statistic) -> Calibration:
    """Train `config.shadows` clean networks on the question's images and take their statistics."""
    null = of_shadows(architecture, question, statistic)
    return Calibration(
        **origin(architecture, question), radius=question.config.radius, null=tuple(null)
    )


def origin(architecture: Architecture, question: Question) -> dict[str, Any]:
    """The fields of `Origin` for shadow networks that the question's settings tell how to train."""
    config, data = question.config, question.data
    return {
        "architecture": architecture,
        "regime": Regime(
            eps=config.shadow_eps, pgd_steps=config.shadow_pgd_steps, loop=config.shadow_loop
        ),
        "data": Source(uri=data.uri, sha256=data.sha256),
        "images": len(data),
        "steps": config.steps,
        "batch": config.batch,
        "seed": question.seed,
    }


Taken = TypeVar("Taken")


def of_shadows(
    architecture: Architecture, question: Question, take: Callable[[nn.Module], Taken]
) -> list[Taken]:
    """What `take` says of each of `config.shadows` clean networks, trained here."""
    config = question.config
    taken = []
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
        taken.append(take(shadow))
    for file in kept:
        file.unlink(missing_ok=True)
    return taken

"""The blocks of a policy; each field says beside its type which of two values is the tighter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tighter:
    """Which of two values of a field lets less pass (None, a waived rule, never does)."""

    of: Callable[[Any, Any], Any]


def _union(a: tuple[T, ...], b: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys((*a, *b)))


def _either(a: bool, b: bool) -> bool:
    return a or b


def _same(a: T, _b: T) -> T:
    return a  # options that differ here are never combined


def _last_of(*order: str) -> Tighter:
    return Tighter(lambda a, b: max(a, b, key=order.index))


def _sources(a: str, b: str) -> str:
    loosest = "recovered-or-supplied"
    if b in (a, loosest):
        return a
    return b if a == loosest else "recovered-and-supplied"


LEAST, MOST = Tighter(min), Tighter(max)
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PanelTrigger = Annotated[str, Field(pattern=r"^[0-9a-f]{64}(:[0-9]{1,9})?$")]
AtMost = Annotated[float | None, Field(ge=0, le=1), LEAST]
AtLeast = Annotated[float, Field(gt=0, le=1), MOST]
Names = Annotated[tuple[str, ...], Tighter(_union)]
Count = Annotated[int, Field(ge=1), MOST]


class Block(BaseModel):
    """Base of every block: frozen, closed to unknown keys, finite; fields know what is tighter."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        """YAML reads `yes` as true, and pydantic true as 1: a limit that lets everything pass."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} is {str(value).lower()}, which is no limit")
        return values

    def tightened(self, other: Self) -> Self:
        """The block that lets pass only what both let pass."""
        values = {}
        for name, field in type(self).model_fields.items():
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours is None or theirs is None:
                values[name] = theirs if ours is None else ours
            elif isinstance(ours, Block):
                values[name] = ours.tightened(theirs)
            else:
                rule = next(item for item in field.metadata if isinstance(item, Tighter))
                values[name] = rule.of(ours, theirs)
        return type(self)(**values)


class Guarded(Block):
    """Aliases and stages that only a passing version may carry."""

    aliases: Names
    stages: Names


class Data(Block):
    """Evaluation data that the operator pinned; `allow_unpinned` accepts any."""

    sha256: tuple[Digest, ...]
    allow_unpinned: bool

    def tightened(self, other: Self) -> Self:
        """What both accept: pins meet, and an allowance of one side is no pin of the other."""
        if self.allow_unpinned or other.allow_unpinned:
            return other if self.allow_unpinned else self
        both = tuple(digest for digest in self.sha256 if digest in other.sha256)
        return type(self)(sha256=both, allow_unpinned=False)


class Accuracy(Block):
    """Original teacher minus student, same images, one-sided 95 % bound."""

    drop_upper_at_most: Annotated[float | None, Field(ge=-1, le=1), LEAST]


class Asr(Block):
    """Attack success rates of the triggers that were recovered or supplied."""

    triggers: Annotated[
        Literal["recovered-or-supplied", "recovered", "supplied", "recovered-and-supplied"],
        Tighter(_sources),
    ]
    panel: Annotated[tuple[PanelTrigger, ...], Tighter(_union)]
    upper_at_most: AtMost
    lift_at_most: Annotated[float | None, Field(ge=-1, le=1), LEAST]
    changed_at_least: Annotated[float | None, Field(gt=0, le=1), MOST]


class Reference(Block):
    """Reference against original teacher, and reference against student."""

    gap_mean_at_most: AtMost
    distinct_from_student: Annotated[bool, Tighter(_either)]


class Option(Block):
    """What every way to be faithful asks for."""

    delta: Annotated[float, Field(gt=0, le=1), LEAST]
    share_lower_at_least: AtLeast
    samples_at_least: Count
    classes: Annotated[Literal["all", "top"], _last_of("top", "all")] = "all"
    selection: Annotated[Literal["uniform-seeded"], Tighter(_same)] = "uniform-seeded"
    below_constant_control: Annotated[bool, Tighter(_either)] = True


class Certified(Option):
    """A certified bound on the confidence gap in a ball of radius `eps`, in pixels."""

    method: Annotated[Literal["certified"], Tighter(_same)]
    norm: Annotated[Literal["linf", "l2"], Tighter(_same)]
    eps: Annotated[float, Field(gt=0), MOST]


class Smoothed(Option):
    """The same for networks smoothed with noise `sigma`, in a ball of radius `radius`."""

    method: Annotated[Literal["smoothed"], Tighter(_same)]
    norm: Annotated[Literal["l2"], Tighter(_same)]
    sigma: Annotated[float, Field(gt=0), Tighter(_same)]
    radius: Annotated[float, Field(gt=0), MOST]


AnyOption = Annotated[Certified | Smoothed, Field(discriminator="method")]


class Faithful(Block):
    """The student says what its reference says: at least one option must be met."""

    any_of: tuple[AnyOption, ...]

    def tightened(self, other: Self) -> Self:
        """Every pair of one kind, each as tight as both; without a pair nothing can pass."""
        pairs = [joined for a in self.any_of for b in other.any_of if (joined := _join(a, b))]
        options = tuple(dict.fromkeys(pairs))
        needed = [a for a in options if not any(a != b and _join(a, b) == a for b in options)]
        return type(self)(any_of=tuple(needed))


def _join(a: Certified | Smoothed, b: Certified | Smoothed) -> Certified | Smoothed | None:
    """Both demands in one, or None where no figure could meet both."""
    if isinstance(a, Certified) and isinstance(b, Certified) and a.norm == b.norm:
        return a.tightened(b)
    if isinstance(a, Smoothed) and isinstance(b, Smoothed) and a.sigma == b.sigma:
        return a.tightened(b)
    return None


Place = Annotated[
    tuple[Annotated[int, Field(ge=0, le=100_000)], Annotated[int, Field(ge=0, le=100_000)]],
    Field(description="row and column of a square's top left pixel"),
]


class Patch(Block):
    """Squares of any content: which of them, aimed at which classes, may flip how many images.

    `upper_at_most` is about a content of its own for every image; `universal_upper_at_most` about
    one content for all images, which is what a trigger usually is.
    """

    targets: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), Tighter(_union)
    ]
    size: Count
    positions: Annotated[tuple[Place, ...], Field(min_length=1), Tighter(_union)]
    upper_at_most: AtMost
    universal_upper_at_most: AtMost = None
    samples_at_least: Count = 100
    margin_at_least: Annotated[float, Field(ge=0), MOST] = 1e-4
    selection: Annotated[Literal["uniform-seeded"], Tighter(_same)] = "uniform-seeded"


Verdict = Annotated[Literal["ran", "clean"] | None, _last_of("ran", "clean")]


class Audit(Block):
    """Whether teacher and student were audited, and whether they must be clean."""

    teacher: Verdict
    student: Verdict


class Export(Block):
    """Exported graph against the trained network."""

    parity_at_most: AtMost


class CertificateRule(Block):
    """Who must have signed, who must have measured, and how old it may be."""

    figures_from: Annotated[Literal["any", "recomputed"], _last_of("any", "recomputed")]
    signers_at_least: Count
    expires_after_days: Annotated[float | None, Field(gt=0, le=36_500), LEAST]

"""What is proved about patches of any content: image by image, place by place."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mlflow_kdguard import intervals
from mlflow_kdguard.records.base import Count, Model, Rate, Record, Source
from mlflow_kdguard.records.bounds import Status

Corner = tuple[int, int]
"""Row and column of a patch's top left pixel."""


class Flips(Record):
    """Of `n` images, `attack` were sent to the target, and no more than `certified` can be.

    `upper` bounds the share of the population from above (one-sided Clopper–Pearson, 95 %).
    """

    derived = ("rate", "upper")

    attack: Count
    certified: Count
    n: Count

    @model_validator(mode="after")
    def _ordered(self) -> "Flips":
        if not self.attack <= self.certified <= self.n:
            raise ValueError(f"attack={self.attack}, certified={self.certified}, n={self.n}")
        return self

    @property
    def unproved(self) -> Rate:
        """Certified of n."""
        return Rate(k=self.certified, n=self.n)

    @property
    def rate(self) -> float:
        """The certified attack success rate on the images."""
        return self.unproved.rate

    @property
    def upper(self) -> float:
        """And in the population, at most."""
        return self.unproved.upper()

    def document(self) -> dict[str, Any]:
        return super().document() | {name: getattr(self, name) for name in self.derived}


class PatchWitness(Record):
    """A content that sends an image to the target: C·s·s pixels, row-major, and where it lies."""

    position: Corner
    pixels: tuple[float, ...]


class PatchSample(Record):
    """One image of another class than the target, which the network gives the class `answer`.

    `rank` is its number among all such images. `lead` is the largest z_target - max other logit
    that was found, `bound` what no content exceeds in real arithmetic, `upper` in onnxruntime's
    float32 (None where the work was stopped before); `at` says the same as `status`, a position
    each.
    """

    index: int
    rank: int
    label: int
    answer: int
    status: Status
    at: tuple[Status, ...]
    lead: float | None
    bound: float | None
    upper: float | None
    nodes: int = 0
    seconds: float = 0.0
    witness: PatchWitness | None = None


class PatchPlace(Record):
    """One position: images flipped by a content of their own, and by one content for all.

    `patch` is the universal content that flipped the most (C·s·s pixels, row-major).
    """

    position: Corner
    each: Flips
    universal: Flips
    patch: tuple[float, ...]

    def document(self) -> dict[str, Any]:
        own = {"each": self.each.document(), "universal": self.universal.document()}
        return super().document() | own


class PatchReport(Record):
    """Attack success of every patch in a family (`kdguard.patch/1`).

    The family: any content of a `size`×`size` square at one of the positions, aimed at `target`.
    `each` lets the attacker choose content and position for every image, `universal` one content
    and position for all; `clean` counts images that are sent there without any patch. A sample is
    PROVED if no content at any position makes the target's logit, as onnxruntime computes it, come
    within `margin` of the largest other one. `complete` is False where the work was stopped: what
    was not looked at counts as unproved.
    """

    derived = ("each_lower",)

    schema_: Literal["kdguard.patch/1"] = Field("kdguard.patch/1", alias="schema")
    student: Model
    data: Source
    target: int = Field(ge=0)
    size: int = Field(ge=1)
    channels: int = Field(ge=1)
    margin: float = Field(ge=0)
    nodes: int
    population: Count
    selection: str
    nonce: str
    device: str
    complete: bool
    clean: Rate
    each: Flips
    universal: Flips
    places: tuple[PatchPlace, ...]
    samples: tuple[PatchSample, ...]
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "each": self.each.document(),
            "universal": self.universal.document(),
        }
        own["places"] = [place.document() for place in self.places]
        return super().document() | own | {"each_lower": self.each_lower}

    @property
    def each_lower(self) -> float:
        """What a patch for each image reaches in the population, at least (one-sided, 95 %).

        Of `universal` there is no such bound: its patch was chosen on these very images.
        """
        return intervals.lower(self.each.attack, self.each.n)


class PatchFigure(Record):
    """The gated figure of a report: images that some patch may send to `target`.

    `each` lets every image have a patch of its own, `universal` one patch for all. `ranks` are
    the drawn images among the `population` of those of other classes.
    """

    student: Model
    target: int = Field(ge=0)
    size: int = Field(ge=1)
    positions: tuple[Corner, ...]
    margin: float = Field(ge=0)
    each: Flips
    universal: Flips
    selection: str
    population: Count
    nonce: str
    ranks: tuple[int, ...]
    data: Source

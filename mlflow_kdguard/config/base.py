"""What sections are made of: their base, limits of numbers, and training runs."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Epochs = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: frozen, closed to unknown keys, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Loop(Section):
    """One training run: SGD with Nesterov momentum under a schedule of learning rates."""

    epochs: Epochs = Field(10, description="passes over the data")
    batch: int = Field(128, ge=1, description="images a step")
    lr: Positive = Field(0.08, description="peak learning rate")
    schedule: Literal["one-cycle", "constant", "step", "cosine"] = Field(
        "one-cycle", description="learning rate over the run; step: a tenth at 1/2, again at 3/4"
    )
    warm_up: Share = Field(0.0, description="share of linear rise; one-cycle has its own")
    momentum: Share = Field(0.9, description="Nesterov momentum")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    augment: Literal["none", "shift", "shift-flip"] = Field("shift", description="augmentation")
    shift: int = Field(2, ge=0, description="largest shift in pixels")
    amp: Literal["off", "bfloat16", "float16"] = Field("off", description="autocast type")
    channels_last: bool = Field(False, description="memory format of images")
    checkpoint_seconds: Positive = Field(10.0, description="longest work that a kill can lose")


class Verifiable(Loop):
    """A training run with terms that make bounds on the network tight."""

    stability: float = Field(0.0, ge=0, description="weight of the ReLU stability loss")
    l1: float = Field(0.0, ge=0, description="weight of the sum of weights' sizes")
    bound_eps: float | None = Field(
        None, ge=0, description="l_inf radius of interval terms; null takes eps"
    )
    ramp: tuple[Share, ...] = Field(
        (0.1, 0.5),
        min_length=2,
        max_length=2,
        description="shares of the run between which interval terms grow from zero",
    )

    @field_validator("ramp")
    @classmethod
    def _rises(cls, ramp: tuple[float, ...]) -> tuple[float, ...]:
        if ramp[0] > ramp[1]:
            raise ValueError(f"it must not end ({ramp[1]:g}) before it begins ({ramp[0]:g})")
        return ramp

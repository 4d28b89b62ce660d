"""What must be known besides the weights to rebuild a classifier. Free of torch."""

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.records import Record

Side = int
_LARGEST_SIDE = 1024
_LARGEST_CLASSES = 100_000


class Architecture(Record):
    """Name of a row of the zoo, shape of its images, number of classes (`kdguard.architecture/1`).

    `shape` is (C, H, W). Images hold pixels in [0,1]; the network itself subtracts `mean` and
    divides by `std`, one number a channel. Left out, both are 0.5, so that pixels reach -1..1.
    """

    schema_: Literal["kdguard.architecture/1"] = Field("kdguard.architecture/1", alias="schema")
    arch: str = Field(min_length=1, max_length=200)
    shape: tuple[int, int, int]
    classes: int = Field(ge=1, le=_LARGEST_CLASSES)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @field_validator("shape")
    @classmethod
    def _sane_shape(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(1 <= side <= _LARGEST_SIDE for side in shape):
            raise ValueError(f"(C, H, W) must lie between 1 and {_LARGEST_SIDE}, not {shape}")
        return shape

    @model_validator(mode="before")
    @classmethod
    def _default_normalisation(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("shape"), list | tuple):
            return values
        channels = next(iter(values["shape"]), 0)
        if not isinstance(channels, int) or not 1 <= channels <= _LARGEST_SIDE:
            return values
        filled = {key: (0.5,) * channels for key in ("mean", "std") if not values.get(key)}
        return {**values, **filled}

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> "Architecture":
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(f"mean and std need one number for each of {self.shape[0]} channels")
        if not all(1e-3 <= deviation <= 1e3 for deviation in self.std):
            raise ValueError(f"std must lie between 0.001 and 1000, not {self.std}")
        return self


def parse(document: bytes, *, where: str) -> Architecture:
    """An architecture from its JSON bytes; ModelError names `where` and every wrong key."""
    try:
        return Architecture.model_validate_json(document)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'document'}: {item['msg']}"
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        )
        raise ModelError(
            f"{where} is not an architecture record: {wrong}.",
            remedy='It must hold {"schema": "kdguard.architecture/1", "arch", "shape", "classes"}.',
        ) from error

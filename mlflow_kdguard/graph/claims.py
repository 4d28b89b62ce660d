"""What a file claims about the shapes of values inside it (`value_info`): refused if it is not so.

A runtime believes these claims. One that fixes a batch size makes onnxruntime fold `Shape` into a
constant, and a reshape by it mixes the images of any other batch: right for one image at a time,
silently wrong for two.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import canon
from mlflow_kdguard.graph.walk import Activation, Size, Value, Walk

REMEDY = "Remove the claims, which no runtime needs: del model.graph.value_info[:]."


def check(walk: Walk, claims: Sequence[onnx.ValueInfoProto]) -> None:
    """Compare every claim with what was read; raises ModelError for one that does not hold."""
    seen: set[str] = set()
    for claim in claims:
        if claim.name in seen or claim.name not in walk.values:
            raise _refuse(walk, claim, "twice" if claim.name in seen else "and there is none")
        seen.add(claim.name)
        _check(walk, claim, walk.values[claim.name])


def _check(walk: Walk, claim: onnx.ValueInfoProto, value: Value) -> None:
    kind, shape = _computed(value)
    tensor = claim.type.tensor_type
    if not claim.type.HasField("tensor_type") or tensor.elem_type != kind:
        raise _refuse(walk, claim, f"as something else than {TensorProto.DataType.Name(kind)}")
    if not tensor.HasField("shape"):
        return
    claimed = [side.dim_value if side.HasField("dim_value") else None for side in tensor.shape.dim]
    if claimed != shape:
        raise _refuse(walk, claim, f"with sides {claimed}, where the graph gives {shape}")


def _computed(value: Value) -> tuple[int, list[int | None]]:
    """Element type and sides of a value, None for the batch size."""
    if isinstance(value, Activation):
        return TensorProto.FLOAT, [None, *value.shape]
    if isinstance(value, Size):
        return TensorProto.INT64, [] if value.scalar else [len(value.sides)]
    kind = TensorProto.FLOAT if np.issubdtype(value.dtype, np.floating) else TensorProto.INT64
    return kind, list(value.shape)


def _refuse(walk: Walk, claim: onnx.ValueInfoProto, how: str) -> ModelError:
    return canon.refuse(walk.where, f"the file describes a value {claim.name!r} {how}", REMEDY)

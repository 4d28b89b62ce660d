"""ONNX operators that act number by number, on the last axis, or on the shape alone."""

from math import prod

import numpy as np
import onnx

from mlflow_kdguard.graph import layers, sizes
from mlflow_kdguard.graph.canon import array
from mlflow_kdguard.graph.layers import Array, Shape
from mlflow_kdguard.graph.walk import Activation, Size, Walk


def constant(walk: Walk, node: onnx.NodeProto) -> None:
    """Constant: a tensor, or float and int attributes."""
    if len(node.attribute) != 1:
        raise walk.refuse(node, "needs exactly one attribute")
    attribute = node.attribute[0]
    given = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        walk.values[node.output[0]] = array(given, where=walk.where)
    elif attribute.name in ("value_float", "value_floats"):
        tensor = onnx.numpy_helper.from_array(np.array(given, dtype=np.float32), node.output[0])
        walk.values[node.output[0]] = array(tensor, where=walk.where)
    elif attribute.name in ("value_int", "value_ints"):
        walk.values[node.output[0]] = np.array(given, dtype=np.int64)
    else:
        raise walk.refuse(node, f"{attribute.name} is not supported")


def identity(walk: Walk, node: onnx.NodeProto) -> None:
    """Identity: another name for the same value."""
    walk.values[node.output[0]] = walk.value(node, 0)


def relu(walk: Walk, node: onnx.NodeProto) -> None:
    """Relu."""
    x = walk.activation(node, 0)
    walk.add(node, layers.Relu(walk.fresh(node.output[0]), (x.layer,), x.shape))


def clip(walk: Walk, node: onnx.NodeProto) -> None:
    """Clip by scalar constants; a missing one is infinite."""
    x = walk.activation(node, 0)
    low = _scalar(walk, node, 1) if walk.has(node, 1) else -np.inf
    high = _scalar(walk, node, 2) if walk.has(node, 2) else np.inf
    _add_clip(walk, node, x, low, high)


def _add_clip(walk: Walk, node: onnx.NodeProto, x: Activation, low: float, high: float) -> None:
    if low > high:
        raise walk.refuse(node, f"its lower limit {low} exceeds its upper limit {high}")
    walk.add(node, layers.Clip(walk.fresh(node.output[0]), (x.layer,), x.shape, low, high))


def _scalar(walk: Walk, node: onnx.NodeProto, place: int) -> float:
    value = walk.value(node, place)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != 0:
        raise walk.refuse(node, f"input {place} must be a float32 scalar constant")
    return float(value)


def add(walk: Walk, node: onnx.NodeProto) -> None:
    """Add of two activations, or of a constant."""
    place = _activations(walk, node)
    if place is None:
        _pair(walk, node, layers.Add)
    else:
        _scale(walk, node, place, np.ones(()), walk.floats(node, 1 - place))


def sub(walk: Walk, node: onnx.NodeProto) -> None:
    """Sub of two activations, of a constant, or from a constant."""
    place = _activations(walk, node)
    if place is None:
        _pair(walk, node, layers.Sub)
    elif place == 0:
        _scale(walk, node, 0, np.ones(()), -walk.floats(node, 1))
    else:
        _scale(walk, node, 1, -np.ones(()), walk.floats(node, 0))


def mul(walk: Walk, node: onnx.NodeProto) -> None:
    """Mul by a constant."""
    place = _activations(walk, node)
    if place is None:
        raise walk.refuse(node, "the product of two activations is not piecewise linear")
    _scale(walk, node, place, walk.floats(node, 1 - place), np.zeros(()))


def div(walk: Walk, node: onnx.NodeProto) -> None:
    """Div by a constant."""
    if _activations(walk, node) != 0:
        raise walk.refuse(node, "only division by a constant is supported")
    divisor = walk.floats(node, 1)
    if not divisor.all():
        raise walk.refuse(node, "division by zero", "Train or export again.")
    _scale(walk, node, 0, walk.bounded(node, 1.0 / divisor), np.zeros(()))


def _activations(walk: Walk, node: onnx.NodeProto) -> int | None:
    """Which of two inputs depends on the image; None if both do."""
    if len(node.input) != 2:
        raise walk.refuse(node, "needs two inputs")
    places = [place for place in (0, 1) if isinstance(walk.value(node, place), Activation)]
    if not places:
        raise walk.refuse(node, "computes on constants only", "Fold constants when exporting.")
    return None if len(places) == 2 else places[0]


def _pair(
    walk: Walk,
    node: onnx.NodeProto,
    kind: type[layers.Add] | type[layers.Sub] | type[layers.Maximum] | type[layers.Minimum],
) -> None:
    _chain(walk, node, kind, [walk.activation(node, 0), walk.activation(node, 1)])


def _chain(
    walk: Walk,
    node: onnx.NodeProto,
    kind: type[layers.Add] | type[layers.Sub] | type[layers.Maximum] | type[layers.Minimum],
    operands: list[Activation],
) -> None:
    total = operands[0]
    for place, operand in enumerate(operands[1:], start=2):
        if operand.shape != total.shape:
            raise walk.refuse(node, f"shapes {total.shape} and {operand.shape} differ")
        wish = node.output[0] if place == len(operands) else f"{node.output[0]}#{place}"
        total = walk.add(node, kind(walk.fresh(wish), (total.layer, operand.layer), total.shape))


def _scale(walk: Walk, node: onnx.NodeProto, place: int, factor: Array, offset: Array) -> None:
    x = walk.activation(node, place)
    factor, offset = (expand(walk, node, values, x.shape) for values in (factor, offset))
    name = walk.fresh(node.output[0])
    walk.add(node, layers.Scale(name, (x.layer,), x.shape, factor, offset))


def expand(walk: Walk, node: onnx.NodeProto, values: Array, shape: Shape) -> Array:
    """A constant broadcast to `shape` (a view, so that it costs no memory)."""
    if values.ndim == len(shape) + 1 and values.shape[0] == 1:
        values = values[0]
    try:
        return np.broadcast_to(values, shape)
    except ValueError as error:
        reason = f"a constant of shape {values.shape} does not fit images of shape {shape}"
        raise walk.refuse(node, reason) from error


def maximum(walk: Walk, node: onnx.NodeProto) -> None:
    """Max of activations, or of one and a constant that is the same everywhere."""
    _extremum(walk, node, layers.Maximum)


def minimum(walk: Walk, node: onnx.NodeProto) -> None:
    """Min of activations, or of one and a constant that is the same everywhere."""
    _extremum(walk, node, layers.Minimum)


def _extremum(
    walk: Walk, node: onnx.NodeProto, kind: type[layers.Maximum] | type[layers.Minimum]
) -> None:
    values = [walk.value(node, place) for place in range(len(node.input))]
    operands = [value for value in values if isinstance(value, Activation)]
    if len(operands) == len(values) >= 2:
        _chain(walk, node, kind, operands)
        return
    if len(operands) != 1 or len(values) != 2:
        raise walk.refuse(node, "needs activations, or one activation and one constant")
    place = values.index(operands[0]) if values[0] is operands[0] else 1
    limit = walk.floats(node, 1 - place)
    expand(walk, node, limit, operands[0].shape)
    if (limit != limit.flat[0]).any():
        raise walk.refuse(node, "the constant must be the same everywhere")
    low, high = (float(limit.flat[0]), np.inf), (-np.inf, float(limit.flat[0]))
    _add_clip(walk, node, operands[0], *(low if kind is layers.Maximum else high))


def gemm(walk: Walk, node: onnx.NodeProto) -> None:
    """Gemm: alpha · x B + beta · C, B and C constant."""
    options = walk.attributes(node, alpha=1.0, beta=1.0, transA=0, transB=0)
    if options["transA"]:
        raise walk.refuse(node, "transA would mix the batch")
    # Unbounded, alpha would lift weights that float32 holds with a few bits only (1e-42).
    alpha, beta = walk.bounded(node, np.array([options["alpha"], options["beta"]]))
    weight = walk.floats(node, 1)
    if weight.ndim != 2:
        raise walk.refuse(node, "its weight is not a matrix")
    weight = alpha * (weight if options["transB"] else weight.T)
    bias = beta * walk.floats(node, 2) if walk.has(node, 2) else np.zeros(())
    _affine(walk, node, weight, bias)


def matmul(walk: Walk, node: onnx.NodeProto) -> None:
    """MatMul by a constant matrix from the right."""
    weight = walk.floats(node, 1)
    if weight.ndim != 2:
        raise walk.refuse(node, "its right factor is not a constant matrix")
    _affine(walk, node, weight.T, np.zeros(()))


def _affine(walk: Walk, node: onnx.NodeProto, weight: Array, bias: Array) -> None:
    x = walk.activation(node, 0)
    if x.shape != (weight.shape[1],):
        raise walk.refuse(node, f"expects {weight.shape[1]} numbers an image, is given {x.shape}")
    shape = (weight.shape[0],)
    weight, bias = walk.bounded(node, weight), walk.bounded(node, bias)
    bias = np.array(expand(walk, node, bias, shape))
    walk.add(node, layers.Affine(walk.fresh(node.output[0]), (x.layer,), shape, weight, bias))


def flatten(walk: Walk, node: onnx.NodeProto) -> None:
    """Flatten of everything but the batch."""
    x = walk.activation(node, 0)
    axis = walk.attributes(node, axis=1)["axis"]
    if axis not in (1, -len(x.shape)):
        raise walk.refuse(node, f"axis {axis} would mix the batch with the image")
    _reshaped(walk, node, x, (prod(x.shape),))


def reshape(walk: Walk, node: onnx.NodeProto) -> None:
    """Reshape that leaves the batch axis alone."""
    x = walk.activation(node, 0)
    wanted = walk.integers(node, 1)
    if walk.attributes(node, allowzero=0)["allowzero"] and 0 in wanted:
        raise walk.refuse(node, "allowzero with a zero would empty the tensor")
    if len(wanted) < 2 or wanted[0] not in (0, -1) or wanted.count(-1) > 1:
        raise walk.refuse(node, f"shape {wanted} would mix the batch with the image")
    rest = []
    for place, side in enumerate(wanted[1:]):
        if side == 0 and place >= len(x.shape):
            raise walk.refuse(node, f"shape {wanted} copies an axis that is not there")
        rest.append(x.shape[place] if side == 0 else side)
    known = prod(side for side in rest if side != -1)
    if -1 in rest and known > 0:
        rest[rest.index(-1)] = prod(x.shape) // known
    if min(rest) < 1 or prod(rest) != prod(x.shape):
        raise walk.refuse(node, f"shape {wanted} would mix the batch with the image {x.shape}")
    _reshaped(walk, node, x, tuple(rest))


def squeeze(walk: Walk, node: onnx.NodeProto) -> None:
    """Squeeze of named axes of length one, never of the batch."""
    x = walk.activation(node, 0)
    rank = len(x.shape) + 1
    axes = {axis % rank if -rank <= axis < rank else 0 for axis in walk.integers(node, 1)}
    if not axes or 0 in axes or any(x.shape[axis - 1] != 1 for axis in axes):
        raise walk.refuse(node, f"axes {sorted(axes)} cannot be squeezed out of N×{x.shape}")
    kept = tuple(side for place, side in enumerate(x.shape, start=1) if place not in axes)
    _reshaped(walk, node, x, kept)


def unsqueeze(walk: Walk, node: onnx.NodeProto) -> None:
    """Unsqueeze at named axes behind the batch, or of a size."""
    source = walk.value(node, 0)
    if isinstance(source, Size):
        sizes.unsqueeze(walk, node, source)
        return
    x = walk.activation(node, 0)
    wanted = walk.integers(node, 1)
    rank = len(x.shape) + 1 + len(wanted)
    axes = {axis % rank if -rank <= axis < rank else 0 for axis in wanted}
    if not wanted or 0 in axes or len(axes) != len(wanted) or rank > 8:
        raise walk.refuse(node, f"axes {wanted} cannot be put into N×{x.shape}")
    sides = iter(x.shape)
    _reshaped(walk, node, x, tuple(1 if place in axes else next(sides) for place in range(1, rank)))


def _reshaped(walk: Walk, node: onnx.NodeProto, x: Activation, shape: Shape) -> None:
    if not shape:
        raise walk.refuse(node, "nothing but the batch axis would be left")
    walk.add(node, layers.Reshape(walk.fresh(node.output[0]), (x.layer,), shape))

"""Backward operations against the forward ones: <A, f(x)> = <f*(A), x> + <A, offset>."""

import numpy as np
import pytest
import torch
from torch import Tensor

import toygraphs
from mlflow_kdguard import graph
from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.confidence import Margins
from mlflow_kdguard.certify.forms import Form, add, clean, dense, one_hot
from mlflow_kdguard.certify.joint import Joint, join
from mlflow_kdguard.certify.lines import around
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.refine import Own
from mlflow_kdguard.certify.split import Rows
from mlflow_kdguard.errors import ModelError, NonFiniteError

CPU = torch.device("cpu")


def lowered(model: graph.Graph) -> Joint:
    return join(model, model, device=CPU)


def forward(joint: Joint, x: Tensor) -> list[Tensor]:
    values = [x]
    for op in joint.ops[1:]:
        values.append(op.value(*(values[i] for i in op.inputs)))
    return values


@pytest.mark.parametrize("kind", sorted(toygraphs.KINDS))
def test_lowered_graphs_compute_what_the_interpreter_computes(kind):
    model = toygraphs.KINDS[kind](3)
    x = np.random.default_rng(0).uniform(-0.5, 1.5, (5, *model.input_shape))
    reference, student = lowered(model).logits(torch.from_numpy(x))
    np.testing.assert_allclose(reference.numpy(), graph.evaluate(model, x), atol=1e-12)
    assert torch.equal(reference, student)


@pytest.mark.parametrize("kind", sorted(toygraphs.KINDS))
@pytest.mark.parametrize("windowed", [False, True])
def test_linear_operations_pull_their_adjoint(kind, windowed):
    """Also for windows at the border, whose outside must count for nothing."""
    joint = lowered(toygraphs.KINDS[kind](5))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((4, *joint.input_shape), generator=generator, dtype=torch.float64)
    values = forward(joint, x)
    for index, op in enumerate(joint.ops):
        if not isinstance(op, ops.Linear):
            continue
        size = int(np.prod(op.shape))
        neuron = torch.arange(size)
        image = neuron % 4
        form = one_hot(op.shape, image, neuron, torch.ones(size, dtype=torch.float64))
        form = form if windowed else dense(form, op.shape)
        pulled = op.pull(form)
        total = torch.zeros(size, dtype=torch.float64)
        for source, part in zip(op.inputs, pulled, strict=True):
            cleaned = clean(part, joint.ops[source].shape)
            total += cleaned.dot(values[source], image)
        if op.offset is not None:
            total += form.dot(op.offset, image)
        expected = values[index].flatten(1)[image, neuron]
        torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)


def test_windows_that_meet_add_up_like_dense_rows():
    shape = (2, 5, 5)
    neuron, image = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    signs = torch.ones(50, dtype=torch.float64)
    seed = one_hot(shape, image, neuron, signs)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand((2, 2, 3, 3), generator=generator, dtype=torch.float64)
    bias = torch.zeros(2, dtype=torch.float64)
    conv = ops.Conv((0,), shape, weight, bias, (1, 1), (1, 1, 1, 1), (1, 1), 1, shape)
    (wide,) = conv.pull(seed)
    joined = dense(clean(add(wide, seed, shape), shape), shape).coef
    expected = dense(clean(wide, shape), shape).coef + dense(seed, shape).coef
    assert torch.equal(joined, expected)
    assert torch.equal(add(seed, wide, shape).size and joined, expected)
    mixed = add(dense(seed, shape), clean(wide, shape), shape).coef
    assert torch.equal(mixed, expected)


def test_equal_layers_of_two_networks_are_one_operation():
    model = toygraphs.cnn(1)
    *front, last = model.layers
    assert isinstance(last, graph.Affine)
    moved = graph.Affine(last.name, last.inputs, last.shape, last.weight + 1.0, last.bias)
    student = toygraphs.finish(model.input_shape, (*front, moved))
    assert len(join(model, student, device=CPU).ops) == len(lowered(model).ops) + 1


def test_networks_of_different_shapes_have_no_gap_to_bound():
    with pytest.raises(ModelError, match="no gap to bound"):
        join(toygraphs.mlp(0), toygraphs.cnn(0), device=CPU)


@pytest.mark.parametrize(("low", "high"), [(0.0, float("inf")), (0.0, 1.0), (-0.4, 0.7)])
def test_lines_enclose_their_function_everywhere(low, high):
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn((400, 2), generator=generator, dtype=torch.float64).sort(1).values
    ends[::7, 1] = ends[::7, 0]
    ends[::11] *= 1e6
    lines = around(ops.Box(ends[:, 0], ends[:, 1]), low, high)
    for share in torch.linspace(0, 1, 101, dtype=torch.float64):
        z = torch.minimum(ends[:, 0] + share * (ends[:, 1] - ends[:, 0]), ends[:, 1])
        value = z.clamp(low, high)
        slack = 1e-15 * (1 + z.abs())
        assert bool((lines.upper_slope * z + lines.upper_shift + slack >= value).all())
        below = 0.0 if lines.lower_shift is None else lines.lower_shift
        assert bool((lines.lower_slope * z + below - slack <= value).all())


def test_decided_functions_are_exact():
    ends = ops.Box(
        torch.tensor([0.5, -2.0, -1.0], dtype=torch.float64),
        torch.tensor([2.0, -0.5, 1.0], dtype=torch.float64),
    )
    lines = around(ends, 0.0, float("inf"))
    assert lines.upper_slope.tolist() == [1.0, 0.0, 0.5]
    assert lines.lower_slope.tolist()[:2] == [1.0, 0.0]
    assert lines.upper_shift.tolist()[:2] == [0.0, 0.0]


@pytest.mark.parametrize("tighten", [False, True])
@pytest.mark.parametrize("kind", sorted(toygraphs.KINDS))
def test_boxes_of_all_layers_hold_and_tightening_only_narrows(kind, tighten):
    joint = lowered(toygraphs.KINDS[kind](7))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((3, *joint.input_shape), generator=generator, dtype=torch.float64)
    ball = Ball.around(x, eps=0.1)
    known = relax(joint, ball, tighten=tighten)
    plain = relax(joint, ball, tighten=False)
    for _ in range(50):
        share = torch.rand(x.shape, generator=generator, dtype=torch.float64).round(decimals=1)
        values = forward(joint, ball.lo + share * (ball.hi - ball.lo))
        for box, wide, value in zip(known.boxes, plain.boxes, values, strict=True):
            assert bool((box.lo <= value).all())
            assert bool((value <= box.hi).all())
            assert bool((box.lo >= wide.lo - 1e-9).all())


@pytest.mark.parametrize("kind", ["pooled", "capped"])
def test_any_slope_that_refinement_may_try_gives_sound_lines(kind):
    """A clip within a network has an intercept below that fits one slope only."""
    joint = join(toygraphs.KINDS[kind](3), toygraphs.KINDS[kind](4), device=CPU)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, *joint.input_shape), generator=generator, dtype=torch.float64)
    known = relax(joint, Ball.around(x, eps=0.3), tighten=False)
    image = torch.tensor([0, 1, 1])
    own = Own.of(known, _rows(joint, image))
    assert own.slopes
    for slope in own.slopes.values():
        slope.data.uniform_(0.0, 1.0, generator=generator)
    own.install()
    for index, lines in own.relaxed.lines.items():
        op = joint.ops[index]
        low, high = (op.low, op.high) if isinstance(op, ops.Clip) else (0.0, float("inf"))
        boxes = [known.boxes[i] for i in op.inputs]
        lo, hi = boxes[0].lo[image], boxes[0].hi[image]
        if len(boxes) == 2:
            lo, hi = lo - boxes[1].hi[image], hi - boxes[1].lo[image]
        for share in torch.linspace(0, 1, 21, dtype=torch.float64):
            z = lo + share * (hi - lo)
            below = lines.lower_slope * z + (
                0.0 if lines.lower_shift is None else lines.lower_shift
            )
            above = lines.upper_slope * z + lines.upper_shift
            assert bool((below - 1e-12 <= z.clamp(low, high)).all())
            assert bool((z.clamp(low, high) <= above + 1e-12).all())


def _rows(joint: Joint, image: Tensor) -> Rows:
    m = joint.classes - 1
    box = Margins(*(torch.full((len(image), m), end, dtype=torch.float64) for end in (-1.0, 1.0)))
    plane = torch.zeros(len(image), m, 2), torch.zeros(len(image), m)
    items = Items(image, torch.zeros_like(image))
    return Rows(items, image[:, None] == 0, box, box, box, (plane, plane))


def test_weights_that_overflow_are_refused():
    model = toygraphs.mlp(0, scale=1e300)
    ball = Ball.around(torch.full((1, 1, 1, 2), 0.5), eps=0.1)
    with pytest.raises(NonFiniteError, match="overflow"):
        relax(lowered(model), ball, tighten=False)


def test_a_dense_form_keeps_its_shape():
    coef = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert dense(Form(coef), (3, 4, 4)).coef is coef

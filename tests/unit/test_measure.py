"""Measuring: counts against a straightforward loop, and every way in which a model can lie."""

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import toys
from mlflow_kdguard import intervals
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import (
    DataError,
    DeviceError,
    KDGuardError,
    ModelError,
    NonFiniteError,
    UnsafeModelError,
    UsageError,
)
from mlflow_kdguard.files import sha256
from mlflow_kdguard.measure import Session, measure, softmax
from mlflow_kdguard.triggers import Trigger

CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 2, 2), 3


def images(n: int = 50, *, seed: int = 0, classes: int = CLASSES, labelled: bool = True) -> Dataset:
    y = np.random.default_rng(seed + 100).integers(0, classes, n)
    x = toys.images(n, SHAPE, seed=seed)
    return Dataset.of(x, y if labelled else None, uri=f"toy{seed}", classes=classes)


def patch(value: float = 1.0, *, name: str = "patch") -> Trigger:
    mask = np.zeros((1, 2, 2), np.float32)
    mask[0, 1, 1] = 1
    return Trigger(name, "blend", mask, np.full(SHAPE, value, np.float32))


def graph(nodes: list[Any], constants: Any = (), **options: Any) -> bytes:
    return bytes(toys.proto(nodes, constants, **options).SerializeToString())


def constant_net(logits: list[float]) -> bytes:
    """Answers the same on every image."""
    return toys.onnx_mlp([np.zeros((3, 4))], [np.asarray(logits)])


def answers(model: bytes, x: np.ndarray) -> np.ndarray:
    """The oracle: one image at a time through a plain onnxruntime session."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))])


def test_every_count_is_that_of_a_plain_loop_over_images() -> None:
    data, student, teacher = images(), toys.onnx_tiny(seed=1), toys.onnx_tiny(seed=2)
    reference, baseline = toys.onnx_tiny(seed=3), toys.onnx_tiny(seed=4)
    attacks = [(patch(), 1, "supplied"), (patch(0.0, name="hole"), 2, "recovered")]
    found = measure(
        student,
        data,
        triggers=attacks,  # type: ignore[arg-type]
        teacher=teacher,
        reference=reference,
        baseline=baseline,
        device=CPU,
        batch=7,
    )
    s, t, r = (answers(net, data.x) for net in (student, teacher, reference))
    right = [(a == y, b == y) for a, b, y in zip(t.argmax(1), s.argmax(1), data.y, strict=True)]
    assert found.accuracy.k == sum(b for _, b in right)
    assert found.accuracy.n == 50
    assert found.paired is not None
    assert found.paired.both == right.count((True, True))
    assert found.paired.only_teacher == right.count((True, False))
    assert found.paired.only_student == right.count((False, True))
    assert found.paired.neither == right.count((False, False))
    r64, t64, s64 = (torch.tensor(logits).double().softmax(1) for logits in (r, t, s))
    gaps = (r64 - t64).abs()
    assert found.reference is not None
    assert found.reference.gap_mean == pytest.approx(float(gaps.amax(1).mean()), abs=1e-6)
    assert found.reference.student_gap_max == pytest.approx(
        float((r64 - s64).abs().max()), abs=1e-6
    )
    for figure, (trigger, target, source) in zip(found.asr, attacks, strict=True):
        rows = [i for i in range(50) if data.y[i] != target]
        attacked = trigger.apply(data.x[rows])
        assert (figure.source, figure.n) == (source, len(rows))
        assert figure.k == int((answers(student, attacked).argmax(1) == target).sum())
        assert figure.baseline is not None
        assert figure.baseline.k == int((answers(baseline, attacked).argmax(1) == target).sum())
        assert figure.changed == trigger.changed(data.x[rows])
        assert figure.trigger == trigger.sha256


def test_bounds_of_several_triggers_hold_together() -> None:
    attacks: Any = [(patch(v, name=f"p{i}"), 0, "supplied") for i, v in enumerate((0.2, 0.6, 1.0))]
    found = measure(toys.onnx_tiny(), images(), triggers=attacks, device=CPU)
    assert [Fraction(f.confidence).limit_denominator(1000) for f in found.asr] == [
        Fraction(59, 60)
    ] * 3
    for figure in found.asr:
        assert figure.upper == intervals.upper(figure.k, figure.n, 1 - 0.05 / 3)


def test_the_target_class_is_never_asked() -> None:
    data = Dataset.of(toys.images(6, SHAPE), np.ones(6, np.int64), uri="ones", classes=3)
    found = measure(
        constant_net([0, 9, 0]), data, triggers=[(patch(), 1, "supplied")], device=CPU
    ).asr[0]
    assert (found.k, found.n, found.upper) == (0, 0, 1.0)


def test_a_trigger_that_changes_nothing_is_seen_to_change_nothing() -> None:
    data = Dataset.of(np.zeros((9, *SHAPE), np.float32), np.zeros(9, int), uri="0", classes=3)
    found = measure(toys.onnx_tiny(), data, triggers=[(patch(0.0), 1, "supplied")], device=CPU).asr[
        0
    ]
    assert (found.changed.k, found.changed.n) == (0, 9)


def test_batch_size_changes_no_figure_and_digests_name_the_inputs() -> None:
    data, student, teacher = images(), toys.onnx_tiny(seed=1), toys.onnx_tiny(seed=2)

    def take(batch: int) -> dict[str, Any]:
        found = measure(
            student,
            data,
            teacher=teacher,
            triggers=[(patch(), 0, "supplied")],
            device=CPU,
            batch=batch,
        )
        return found.document()

    assert take(1) == take(3) == take(1000)
    document = take(50)
    assert document["model"] == {"sha256": sha256(student)}
    assert document["teacher"] == {"sha256": sha256(teacher)}
    assert document["data"] == {"uri": "toy0", "sha256": data.sha256}
    assert document["provider"] == "CPUExecutionProvider"
    assert document["schema"] == "kdguard.measure/1"


def test_softmax_is_float64_and_does_not_overflow() -> None:
    rows = softmax(np.array([[1000.0, 0.0], [-1000.0, -1000.0]], np.float32))
    assert rows.dtype == np.float64
    assert rows.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def nan_where_dark() -> bytes:
    """NaN (0/0) on images whose pixels are all zero, and finite elsewhere."""
    nodes = [
        toys.node("Flatten", ("p",), "f"),
        toys.node("MatMul", ("f", "w"), "g"),
        toys.node("Div", ("g", "g"), "logits"),
    ]
    return graph(nodes, {"w": np.ones((4, 3))})


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_one_nan_fails_the_measurement_and_names_the_image(batch: int) -> None:
    data = images()
    x = data.x.copy()
    x[37] = 0
    dark = Dataset.of(x, data.y, uri="dark", classes=3)
    with pytest.raises(NonFiniteError, match=r"student's ONNX file answers NaN.* image 37\."):
        measure(nan_where_dark(), dark, device=CPU, batch=batch)


def test_nan_under_a_trigger_names_the_original_image() -> None:
    y = np.array([1] * 5 + [0] * 5)
    x = np.full((10, *SHAPE), 0.0, np.float32)
    x[:, 0, 1, 1] = 1.0
    x[:, 0, 0, 0] = [1, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    data = Dataset.of(x, y, uri="t", classes=3)
    with pytest.raises(NonFiniteError, match=r"image 7\."):
        measure(nan_where_dark(), data, triggers=[(patch(0.0), 1, "supplied")], device=CPU)


@pytest.mark.parametrize("which", ["teacher", "reference", "baseline"])
def test_nan_of_any_network_fails(which: str) -> None:
    data = Dataset.of(np.zeros((4, *SHAPE), np.float32), np.zeros(4, int), uri="0", classes=3)
    nets = {"teacher": toys.onnx_tiny()} | {which: nan_where_dark()}
    with pytest.raises(NonFiniteError, match=which):
        measure(
            toys.onnx_tiny(),
            data,
            triggers=[(patch(0.0), 1, "supplied")],
            device=CPU,
            **nets,  # type: ignore[arg-type]
        )


def test_a_model_that_mixes_the_images_of_a_batch_is_refused() -> None:
    nodes = [
        toys.node("Flatten", ("p",), "f"),
        toys.node("ReduceMean", ("f", "axes"), "m", keepdims=1),
        toys.node("Sub", ("f", "m"), "c"),
        toys.node("MatMul", ("c", "w"), "logits"),
    ]
    constants = [
        toys.constant("axes", [0], np.int64),
        toys.constant("w", np.random.default_rng(0).normal(size=(4, 3)) * 5),
    ]
    with pytest.raises(ModelError, match="differently in batches of 1"):
        measure(graph(nodes, constants), images(), device=CPU)


def test_a_model_of_batch_one_is_measured_one_image_at_a_time() -> None:
    free = toys.onnx_tiny(seed=5)
    fixed = onnx.load_model_from_string(free)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    found = measure(fixed.SerializeToString(), images(), device=CPU)
    assert found.accuracy == measure(free, images(), device=CPU).accuracy


def external() -> bytes:
    model = onnx.load_model_from_string(toys.onnx_tiny())
    tensor = model.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return bytes(model.SerializeToString())


def custom_domain() -> bytes:
    model = onnx.load_model_from_string(toys.onnx_tiny())
    model.graph.node[1].domain = "com.example"
    return bytes(model.SerializeToString())


def two_inputs() -> bytes:
    model = onnx.load_model_from_string(toys.onnx_tiny())
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[1].name = "second"
    return bytes(model.SerializeToString())


def double() -> bytes:
    model = toys.proto(
        [toys.node("Flatten", ("p",), "f"), toys.node("Cast", ("f",), "logits", to=11)]
    )
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return bytes(model.SerializeToString())


BAD = {
    "text": (b"not a model at all", ModelError, "ONNX"),
    "truncated": (toys.onnx_tiny()[:-40], ModelError, "ONNX"),
    "external data": (external(), UnsafeModelError, "another file"),
    "custom domain": (custom_domain(), UnsafeModelError, "com.example"),
    "two inputs": (two_inputs(), ModelError, "second"),
    "doubles": (double(), ModelError, "double"),
    "five classes": (toys.onnx_tiny(classes=5), ModelError, "5 classes, but toy0 has 3"),
    "other shape": (
        toys.onnx_tiny(shape=(1, 3, 3)),
        ModelError,
        "1×3×3, not float32 of shape 1×2×2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused_in_one_line_that_names_them(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    blob, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        measure(blob, images(), device=CPU)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "student" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_triggers_whose_arrays_are_not_of_the_images_shape_are_measured() -> None:
    data = images()
    warp = Trigger("warp", "warp", None, np.full((2, 2, 2), 0.5, np.float32))
    layers = np.full((2, 1, 3, 3), 0.1, np.float32), np.zeros(2, np.float32)
    own = Trigger("own", "network", None, np.zeros((2, 2, 2), np.float32), layers)
    student = toys.onnx_tiny(seed=1)
    both = [(warp, 1, "supplied"), (own, 1, "supplied")]
    found = measure(student, data, triggers=both, device=CPU)
    for trigger, asr in zip((warp, own), found.asr, strict=True):
        others = data.x[data.y != 1]
        wanted = answers(student, trigger.apply(others)).argmax(1) == 1
        assert (asr.k, asr.n) == (int(wanted.sum()), len(others))


def refusals() -> dict[str, tuple[dict[str, Any], type[KDGuardError], str]]:
    half = np.array([0, -1, 2])
    big = Trigger("big", "add", None, np.zeros((1, 3, 3), np.float32))
    return {
        "no labels": ({"data": images(labelled=False)}, DataError, "50 of 50 images"),
        "some labels": (
            {"data": Dataset.of(toys.images(3, SHAPE), half, uri="half", classes=3)},
            DataError,
            "1 of 3 images of half",
        ),
        "no images": (
            {"data": images().take([], uri="none")},
            DataError,
            "no image",
        ),
        "target out of range": (
            {"triggers": [(patch(), 3, "supplied")]},
            UsageError,
            "classes 0 to 2",
        ),
        "trigger of another shape": ({"triggers": [(big, 1, "supplied")]}, UsageError, "'big'"),
        "reference without teacher": ({"reference": toys.onnx_tiny()}, UsageError, "teacher"),
        "teacher of other classes": (
            {"teacher": toys.onnx_tiny(classes=4)},
            ModelError,
            "teacher's ONNX file answers 4 classes",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_requests_that_do_not_fit_together_are_refused(name: str) -> None:
    options, kind, message = refusals()[name]
    with pytest.raises(kind, match=message):
        measure(toys.onnx_tiny(), **({"data": images(), "device": CPU} | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_is_never_a_silent_cpu_run() -> None:
    with pytest.raises((DeviceError, ModelError)):
        Session(toys.onnx_tiny(), device=torch.device("cuda"), where="x")


@pytest.mark.cuda
def test_cuda_answers_what_the_cpu_answers() -> None:
    x = toys.images(64, SHAPE)
    on_gpu = Session(toys.onnx_tiny(), device=torch.device("cuda", 0), where="x")
    on_cpu = Session(toys.onnx_tiny(), device=CPU, where="x")
    assert on_gpu.provider == "CUDAExecutionProvider"
    assert np.abs(softmax(on_gpu.logits(x)) - softmax(on_cpu.logits(x))).max() < 1e-4

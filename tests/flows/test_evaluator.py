"""`mlflow.models.evaluate(…, evaluators="kdguard")` on a real server."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import EvaluationResult, MetricThreshold
from mlflow.models.evaluation.validation import ModelValidationFailedException
from onnx import numpy_helper

import toys
from flows.servers import MlflowServer
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.measure import measure
from mlflow_kdguard.plugin.evaluator import Evaluator
from mlflow_kdguard.registry import Registry
from mlflow_kdguard.triggers import Trigger

pytestmark = [
    # MLflow's own: its import hooks, its use of pandas, type hints and integer columns.
    pytest.mark.filterwarnings("ignore::ImportWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
]

STUDENT = toys.onnx_tiny(shape=(1, 8, 8), classes=10)
TEACHER = toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=1)
N = 120


@pytest.fixture
def here(mlflow_server: MlflowServer, tmp_path: Path) -> Path:
    """A folder with a teacher, a trigger and another model, and MLflow's globals set."""
    mlflow.set_tracking_uri(mlflow_server.uri)
    mlflow.set_experiment("evaluator")
    (tmp_path / "student.onnx").write_bytes(STUDENT)
    (tmp_path / "teacher.onnx").write_bytes(TEACHER)
    pattern = np.zeros((1, 8, 8), np.float32)
    mask = pattern.copy()
    pattern[:, 6:, 6:] = mask[:, 6:, 6:] = 1.0
    Trigger(name="corner", kind="blend", pattern=pattern, mask=mask).save(tmp_path / "corner.kdt")
    return tmp_path


@pytest.fixture(scope="module")
def student(mlflow_server: MlflowServer) -> Iterator[str]:
    """A registered student, as the pipeline stores it."""
    registry = Registry(RegistrySection(tracking_uri=mlflow_server.uri, experiment="evaluator"))
    with registry.run("made") as run:
        yield registry.register_student("evaluated", STUDENT, run=run).uri


def _rows() -> tuple[Any, Any]:
    x, y = toys.digits(N)
    return x.reshape(N, -1), y


def _evaluate(model: Any, config: dict[str, Any] | None, **more: Any) -> EvaluationResult:
    x, y = _rows()
    options = {"evaluators": "kdguard", "model_type": "classifier", "targets": y} | more
    return mlflow.models.evaluate(model, options.pop("data", x), evaluator_config=config, **options)


def _onnx_with(value: float) -> bytes:
    model = onnx.load_model_from_string(STUDENT)
    tensor = next(t for t in model.graph.initializer if numpy_helper.to_array(t).size > 10)
    array = np.array(numpy_helper.to_array(tensor))
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return bytes(model.SerializeToString())


def test_figures_are_those_of_kdguard_measure(here: Path, student: str) -> None:
    config = {
        "triggers": [f"{here / 'corner.kdt'}:3"],
        "teacher": str(here / "teacher.onnx"),
        "reference": str(here / "teacher.onnx"),
        "certify": {"samples": 3, "pgd_steps": 2, "restarts": 1, "eps": 0.001},
    }
    with mlflow.start_run() as run:
        result = _evaluate(student, config)
    x, y = toys.digits(N)
    import torch

    expected = measure(
        STUDENT,
        Dataset.of(x, y, uri="x", classes=10),
        device=torch.device("cpu"),
        triggers=[(Trigger.load(here / "corner.kdt"), 3, "supplied")],
        teacher=TEACHER,
        reference=TEACHER,
    )
    metrics = result.metrics
    assert metrics["kdguard/accuracy"] == expected.accuracy.rate
    assert metrics["kdguard/accuracy_lower"] == expected.accuracy.lower()
    assert metrics["kdguard/accuracy_upper"] == expected.accuracy.upper()
    assert metrics["kdguard/asr/corner/3"] == expected.asr[0].rate
    assert metrics["kdguard/asr_upper/corner/3"] == expected.asr[0].upper
    assert expected.paired is not None
    assert metrics["kdguard/accuracy_drop_upper"] == expected.paired.drop_upper()
    assert metrics["kdguard/reference_gap_mean"] == 0
    assert "kdguard/faithful_upper_mean/reference" in metrics
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    logged = mlflow.get_run(run.info.run_id).data
    assert logged.metrics == pytest.approx(metrics)
    assert set(result.artifacts) == {"kdguard/measure", "kdguard/certify"}
    for name, artifact in result.artifacts.items():
        stored = mlflow.artifacts.load_text(artifact.uri)
        assert json.loads(stored) == artifact.content
        assert len(logged.tags[f"kdguard.sha256/{name}.json"]) == 64
    assert result.artifacts["kdguard/measure"].content["data"]["sha256"] == expected.data.sha256


def test_data_frames_of_pixels(here: Path, student: str) -> None:
    x, y = _rows()
    table = pd.DataFrame(x).assign(digit=y)
    table.columns = [str(name) for name in table.columns]
    with mlflow.start_run():
        result = _evaluate(student, {"batch": 32}, data=table, targets="digit")
    assert 0 <= result.metrics["kdguard/accuracy"] <= 1


def test_metrics_of_a_logged_model_name_model_and_data(here: Path) -> None:
    model = onnx.load_model_from_string(STUDENT)
    with mlflow.start_run():
        logged = mlflow.onnx.log_model(
            model,
            name="student",
            pip_requirements=["onnxruntime"],
            save_as_external_data=False,
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    with mlflow.start_run() as run:
        config = {"onnx": str(here / "student.onnx")}
        result = _evaluate(f"models:/{logged.model_id}", config)
    found = mlflow.get_logged_model(logged.model_id).metrics
    assert found
    by_name = {metric.key: metric for metric in found}
    assert set(by_name) == set(result.metrics)
    metric = by_name["kdguard/accuracy"]
    assert metric.value == result.metrics["kdguard/accuracy"]
    assert metric.run_id == run.info.run_id
    assert metric.dataset_digest
    (used,) = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
    assert used.dataset.digest == metric.dataset_digest


def test_results_can_be_validated(here: Path, student: str) -> None:
    with mlflow.start_run():
        result = _evaluate(student, {"triggers": [f"{here / 'corner.kdt'}:3"]})
    name = "kdguard/asr_upper/corner/3"
    passes = MetricThreshold(threshold=result.metrics[name] + 0.01, greater_is_better=False)
    mlflow.validate_evaluation_results({name: passes}, result)
    fails = MetricThreshold(threshold=result.metrics[name] - 0.01, greater_is_better=False)
    with pytest.raises(ModelValidationFailedException, match=name):
        mlflow.validate_evaluation_results({name: fails}, result)
    better = MetricThreshold(min_absolute_change=0.01, greater_is_better=False)
    with pytest.raises(ModelValidationFailedException):
        mlflow.validate_evaluation_results({name: better}, result, result)


def test_it_speaks_only_where_it_is_asked_by_name() -> None:
    """`evaluators=None` asks everybody, with one configuration for all."""
    from mlflow.models.evaluation.base import resolve_evaluators_and_configs as resolve

    def asked(config: Any) -> bool:
        return "kdguard" in [e.name for e in resolve(None, config, "classifier")]

    assert not asked(None)
    assert not asked({})
    assert not asked({"log_model_explainability": False, "pos_label": 1})
    assert not asked({"default": {"metric_prefix": "x"}})
    assert asked({"kdguard": {"onnx": "student.onnx"}})
    config = {"onnx": "student.onnx"}
    assert not Evaluator.can_evaluate(model_type="regressor", evaluator_config=config)
    assert not Evaluator.can_evaluate(model_type="classifier", evaluator_config=None)
    assert Evaluator.can_evaluate(model_type="classifier", evaluator_config=config)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"onnx": "teacher.onnx"}, "does not answer as the model that is evaluated"),
        ({"onnx": "absent.onnx"}, "absent.onnx"),
        ({"triggers": ["absent.kdt"]}, "absent.kdt"),
        ({"triggers": ["corner.kdt:99"]}, "target 99"),
        ({"batch": 0}, "batch"),
        ({"batch": 8, "trigger": "x"}, "trigger: unknown key"),
        ({"certify": {"samples": 3}}, "certify needs a reference"),
        ({"reference": "teacher.onnx"}, "reference needs a teacher"),
    ],
)
def test_questions_that_cannot_be_answered(
    here: Path, student: str, config: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    with mlflow.start_run() as run, pytest.raises(MlflowException, match=why):
        _evaluate(student, config)
    assert mlflow.get_run(run.info.run_id).data.metrics == {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, y: (x[:, 1:], y), r"has shape \(120, 63\)"),
        (lambda x, y: (x * 300, y), r"within \[0,1\]"),
        (lambda x, y: (np.where(x > 2, x, np.nan), y), r"within \[0,1\]"),
        (lambda x, y: (x, y + 40), "labels range"),
        (lambda x, y: (x, y.astype(float)), "not whole numbers"),
        (lambda x, y: ((x * 255).astype(np.uint8), y), "uint8"),
    ],
)
def test_data_that_does_not_fit(here: Path, student: str, change: Any, why: str) -> None:
    x, y = change(*_rows())
    with mlflow.start_run(), pytest.raises(MlflowException, match=why):
        _evaluate(student, {"batch": 8}, data=x, targets=y)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_figure_of_a_model_that_is_not_finite(here: Path, value: float) -> None:
    (here / "bad.onnx").write_bytes(_onnx_with(value))
    with mlflow.start_run() as run, pytest.raises(MlflowException, match="NaN or infinity"):
        _evaluate(lambda x: x, {"onnx": str(here / "bad.onnx")})
    assert mlflow.get_run(run.info.run_id).data.metrics == {}


def test_a_model_of_another_kind_needs_its_file_named(here: Path) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match="ONNX file of this model"):
        _evaluate(lambda x: np.zeros((len(x), 10)), {"batch": 8})


def test_a_registered_student_has_a_signature_and_no_input_example(
    here: Path, student: str
) -> None:
    """docs/decisions/0031: an example would add files that nothing checks, and show a picture."""
    info = mlflow.models.get_model_info(student)
    assert info.signature is not None
    (taken,) = info.signature.inputs.inputs
    (answered,) = info.signature.outputs.inputs
    assert (taken.type, taken.shape) == (np.dtype("float32"), (-1, 1, 8, 8))
    assert (answered.type, answered.shape) == (np.dtype("float32"), (-1, 10))
    assert info.saved_input_example_info is None
    assert info.metadata is not None
    assert info.metadata["kdguard"]["range"] == [0.0, 1.0]
    loaded = mlflow.pyfunc.load_model(student)
    with pytest.raises(MlflowException, match="shape"):
        loaded.predict(np.zeros((2, 1, 7, 7), np.float32))

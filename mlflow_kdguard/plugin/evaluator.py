"""`mlflow.models.evaluate(…, evaluators="kdguard")`: figures on the ONNX bytes, with intervals.

It measures what `kdguard measure` and `kdguard certify` measure, on images that MLflow hands on as
rows of pixels, and returns metrics under the names of `registry.metrics`. It speaks only where it
is asked by name, and refuses rather than returns a figure that is not finite.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import EvaluationResult
from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact
from mlflow.models.evaluation.base import ModelEvaluator
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient
from pydantic import Field, ValidationError

from mlflow_kdguard.config import CertifySection, RegistrySection, Section, explain
from mlflow_kdguard.errors import ConfigError, DataError, KDGuardError, ModelError
from mlflow_kdguard.files import read_bytes, sha256, write_json

if TYPE_CHECKING:
    from mlflow_kdguard.data import Dataset
    from mlflow_kdguard.measure import Session
    from mlflow_kdguard.records import CertifyReport, Measurement

log = logging.getLogger(__name__)

_COMPARED = 64
_TOLERANCE = 1e-3
"""Largest difference between what MLflow's model and the named ONNX file answer."""


class EvaluatorConfig(Section):
    """`evaluator_config`: models are files or `models:/name/version`; `onnx` is the student."""

    onnx: str | None = Field(None, description="the model's ONNX file; default: MLflow's own copy")
    triggers: tuple[str, ...] = Field((), description="trigger files, FILE[:CLASS]")
    teacher: str | None = Field(None, description="original teacher (ONNX)")
    reference: str | None = Field(None, description="reference (ONNX)")
    baseline: str | None = Field(None, description="declared comparator (ONNX) for the lift")
    certify: CertifySection | None = Field(None, description="bounds; needs a reference")
    confidence: float = Field(0.95, gt=0, lt=1, description="of every one-sided bound")
    batch: int = Field(256, ge=1, description="images a step")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA")


class Evaluator(ModelEvaluator):
    """MLflow's evaluator `kdguard`, for classifiers of images stored as ONNX."""

    @classmethod
    def can_evaluate(
        cls, *, model_type: str, evaluator_config: Mapping[str, Any] | None, **_: Any
    ) -> bool:
        """Whether this evaluator was asked for: its configuration names one of its own keys.

        With `evaluators=None` MLflow asks every evaluator there is, and hands all of them the same
        configuration; a long measurement must not come as a surprise.
        """
        named = set(evaluator_config or {}) & set(EvaluatorConfig.model_fields)
        return model_type == "classifier" and bool(named)

    def evaluate(
        self,
        *,
        model_type: str,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        model_id: str | None = None,
        **_: Any,
    ) -> EvaluationResult:
        """Measure, log the documents as artifacts of the run, and return the figures.

        With `model_id` MLflow itself links the metrics to the logged model and the data set;
        without, they are logged on the run here. `extra_metrics` and `custom_artifacts` belong to
        MLflow's own evaluators. Raises MlflowException (INVALID_PARAMETER_VALUE) for whatever
        cannot be measured: other data, other models, figures that are not finite.
        """
        try:
            config = _config(evaluator_config)
            documents, metrics = _taken(config, dataset, model)
        except KDGuardError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        if model_id is None:
            mlflow.log_metrics(metrics, run_id=run_id)
        artifacts = _stored(documents, run_id)
        return EvaluationResult(metrics, artifacts, run_id)  # type: ignore[no-untyped-call]


Documents = dict[str, dict[str, Any]]


def _config(values: Mapping[str, Any]) -> EvaluatorConfig:
    try:
        config = EvaluatorConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(
            f"evaluator_config: {explain(error)}", remedy="See docs/how-to/evaluate.md."
        ) from error
    if config.certify is not None and config.reference is None:
        raise ConfigError("evaluator_config: certify needs a reference to be faithful to.")
    if config.reference is not None and config.teacher is None and config.certify is None:
        raise ConfigError("evaluator_config: reference needs a teacher, or certify, to compare.")
    return config


def _taken(config: EvaluatorConfig, dataset: Any, model: Any) -> tuple[Documents, dict[str, float]]:
    """The JSON documents, and the finite figures in them."""
    from mlflow_kdguard import devices
    from mlflow_kdguard.measure import Session
    from mlflow_kdguard.registry.metrics import metrics_of

    device = devices.pick(config.device)
    data = _onnx(config.onnx) if config.onnx is not None else _own_copy(model)
    session = Session(data, device=device, where="the model's ONNX file")
    shown = _images(dataset, session)
    if config.onnx is not None and model is not None:
        _check_same(model, session, shown)
    measured = _measured(config, data, shown, device)
    documents = {"measure": measured.document()}
    metrics = metrics_of(documents["measure"]) | _bounds(measured, config.confidence)
    if config.certify is not None:
        report = _certified(config, data, shown, device)
        documents["certify"] = report.document()
        metrics |= metrics_of(documents["certify"])
    return documents, metrics


def _measured(config: EvaluatorConfig, data: bytes, shown: "Dataset", device: Any) -> "Measurement":
    from mlflow_kdguard.measure import Attack, measure
    from mlflow_kdguard.triggers import Trigger, aimed

    attacks: list[Attack] = [
        (Trigger.load(path), target, "supplied") for path, target in map(aimed, config.triggers)
    ]
    return measure(
        data,
        shown,
        device=device,
        triggers=attacks,
        teacher=None if config.teacher is None else _onnx(config.teacher),
        reference=_onnx(config.reference) if config.reference and config.teacher else None,
        baseline=None if config.baseline is None else _onnx(config.baseline),
        confidence=config.confidence,
        batch=config.batch,
    )


def _certified(
    config: EvaluatorConfig, data: bytes, shown: "Dataset", device: Any
) -> "CertifyReport":
    from mlflow_kdguard.certify import certify

    assert config.certify is not None
    assert config.reference is not None
    return certify(_onnx(config.reference), data, shown, config=config.certify, device=device)


def _bounds(measured: "Measurement", confidence: float) -> dict[str, float]:
    """Bounds of the accuracy and of its drop; those of every trigger are among its metrics."""
    from mlflow_kdguard.registry.metrics import metric_name

    found = {
        metric_name("accuracy_lower"): measured.accuracy.lower(confidence),
        metric_name("accuracy_upper"): measured.accuracy.upper(confidence),
    }
    if measured.paired is not None:
        found[metric_name("accuracy_drop_upper")] = measured.paired.drop_upper(confidence)
    return found


def _onnx(name: str) -> bytes:
    """The ONNX bytes of a file or of a registered version; no MLflow flavor reads them."""
    if not name.startswith("models:"):
        return read_bytes(Path(name), what="the model")
    from mlflow_kdguard.registry import Registry

    section = RegistrySection(
        tracking_uri=mlflow.get_tracking_uri(), registry_uri=mlflow.get_registry_uri()
    )
    return Registry(section).download(name).onnx


def _own_copy(model: Any) -> bytes:
    """The file behind a model that MLflow has loaded with its ONNX flavor."""
    raw = None
    if model is not None and hasattr(model, "get_raw_model"):
        raw = model.get_raw_model()
    path = getattr(raw, "_model_path", None)
    if path is None:
        raise ModelError(
            "the ONNX file of this model is not known: MLflow did not load it as ONNX.",
            remedy="Name it: evaluator_config={'onnx': 'student.onnx'} or 'models:/name/version'.",
        )
    return read_bytes(Path(path), what="the model")


def _images(dataset: Any, session: "Session") -> "Dataset":
    """MLflow's rows of pixels as images of the shape that the model takes.

    Raises DataError where they do not fit, are not labelled with classes, or leave [0, 1].
    """
    from mlflow_kdguard.data import Dataset

    rows, labels = dataset.features_data, dataset.labels_data
    if session.classes is None or None in session.shape:
        raise ModelError("the ONNX file leaves the size of its images or its classes open.")
    shape = tuple(int(size or 0) for size in session.shape)
    table = rows.to_numpy() if hasattr(rows, "to_numpy") else np.asarray(rows)
    if table.ndim != 2 or table.shape[1] != int(np.prod(shape)) or table.dtype.kind != "f":
        raise DataError(
            f"the data has shape {table.shape} of {table.dtype}, the model takes images {shape}.",
            remedy=f"Hand on one row of {int(np.prod(shape))} floats in [0, 1] an image.",
        )
    if labels is None or np.asarray(labels).dtype.kind not in "iu":
        raise DataError("the labels are not whole numbers.", remedy="Name the column of classes.")
    images = table.astype(np.float32).reshape(len(table), *shape)
    uri = f"mlflow:{dataset.name or 'dataset'}@{dataset.hash}"
    return Dataset.of(images, np.asarray(labels), uri=uri, classes=session.classes)


def _check_same(model: Any, session: "Session", shown: "Dataset") -> None:
    """Refuse figures of a file that is not the model that MLflow evaluates."""
    x, _ = shown.batch(np.arange(min(_COMPARED, len(shown))))
    answers = model.predict(x)
    if isinstance(answers, Mapping):
        answers = next(iter(answers.values()))
    ours, theirs = session.logits(x), np.asarray(answers)
    same = ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= _TOLERANCE)
    if not same:
        raise ModelError(
            f"the named ONNX file ({session.sha256[:12]}…) does not answer as the model that is "
            "evaluated.",
            remedy="Name the file that the model was made from.",
        )


def _stored(documents: Documents, run_id: str) -> dict[str, JsonEvaluationArtifact]:
    """The documents as artifacts of the run, under `kdguard/`, tagged with their SHA-256."""
    client = MlflowClient()
    root = client.get_run(run_id).info.artifact_uri
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, document in documents.items():
            file = Path(folder) / f"{name}.json"
            write_json(file, document)
            client.log_artifact(run_id, str(file), "kdguard")
            client.set_tag(run_id, f"kdguard.sha256/kdguard/{name}.json", sha256(file.read_bytes()))
            uri = f"{root}/kdguard/{name}.json"
            found[f"kdguard/{name}"] = JsonEvaluationArtifact(  # type: ignore[no-untyped-call]
                uri=uri, content=document
            )
    return found

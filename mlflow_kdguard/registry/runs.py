"""Runs on MLflow: one a pipeline, one nested a stage, none left RUNNING."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from mlflow_kdguard import __version__
from mlflow_kdguard.errors import Interrupted, RegistryError
from mlflow_kdguard.files import sha256, sha256_file
from mlflow_kdguard.records import Source
from mlflow_kdguard.registry.client import Connection, refuse_unreachable
from mlflow_kdguard.registry.metrics import metrics_of

log = logging.getLogger(__name__)

STAGE, INPUTS, ERROR = "kdguard.stage", "kdguard.inputs", "kdguard.error"
WORK, WORK_DIR = "kdguard.work", "kdguard.work_dir"

_METRICS, _PARAMS, _TAGS = 1000, 100, 100  # what MLflow takes in one log_batch
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000


class Run:
    """One run: what it logs goes in batches, and only finite figures go at all.

    Every method raises RegistryError where MLflow does not do what is asked.
    """

    def __init__(self, connection: Connection, run: MlflowRun) -> None:
        self._connection = connection
        self.id: str = run.info.run_id
        self.name: str = run.info.run_name or ""
        self.experiment_id: str = run.info.experiment_id
        self.artifact_uri: str = run.info.artifact_uri

    @contextmanager
    def stage(self, name: str, *, inputs: str = "") -> Iterator["Run"]:
        """A nested run for one stage; `inputs` is the digest of what the stage reads.

        It ends FINISHED, FAILED on an exception (with its first line as a tag), KILLED on Ctrl-C.
        """
        tags = {STAGE: name, INPUTS: inputs, MLFLOW_PARENT_RUN_ID: self.id}
        with ended(create(self._connection, self.experiment_id, name, tags)) as nested:
            yield nested

    def has_finished(self, name: str, inputs: str) -> bool:
        """Whether a nested run of this stage on these inputs ended FINISHED."""
        return any(
            run.info.status == "FINISHED"
            and run.data.tags.get(STAGE) == name
            and run.data.tags.get(INPUTS) == inputs
            for run in self.nested()
        )

    def nested(self) -> list[MlflowRun]:
        """The runs whose parent this is."""
        return search(self._connection, self.experiment_id, MLFLOW_PARENT_RUN_ID, self.id)

    def close_stale(self) -> list[str]:
        """End what a killed process left RUNNING below this run; returns the ids, as KILLED."""
        closed = []
        for found in self.nested():
            nested = Run(self._connection, found)
            closed += nested.close_stale()
            if not RunStatus.is_terminated(RunStatus.from_string(found.info.status)):
                nested.end("KILLED")
                closed.append(nested.id)
        return closed

    def refuse_unreachable(self) -> None:
        """RegistryError at once where the tracking server is gone."""
        refuse_unreachable(self._connection.tracking_uri)

    def end(self, status: str) -> None:
        """Set the run FINISHED, FAILED or KILLED."""
        with self._connection.answering(f"end the run {self.id}"):
            self._connection.client.set_terminated(self.id, status)

    def reopen(self) -> None:
        """Set the run RUNNING again."""
        with self._connection.answering(f"reopen the run {self.id}"):
            self._connection.client.update_run(self.id, status="RUNNING")

    def log_documents(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Log the metrics of the stage's JSON documents (`metrics_of`).

        An audit is the student's in a stage that is named after the student, else the teacher's.
        """
        about = "student" if "student" in self.name else "teacher"
        figures: dict[str, float] = {}
        for document in documents:
            figures |= metrics_of(document, about=about)
        self.log_metrics(figures)

    def log_metrics(self, figures: Mapping[str, float], *, step: int = 0) -> None:
        """Log figures in one batch; RegistryError names those that are not finite, before any."""
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise RegistryError(
                f"the figures {', '.join(sorted(bad))} are not finite, so none is logged.",
                remedy="MLflow would store infinity as a number.",
            )
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in figures.items()]
        with self._connection.answering(f"log metrics of the run {self.id}"):
            for i in range(0, len(metrics), _METRICS):
                self._connection.client.log_batch(self.id, metrics=metrics[i : i + _METRICS])

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; values that MLflow would cut short become `long-params.json` instead.

        MLflow never changes a parameter: what the run has stays, and a warning names what differs.
        """
        texts = self._unsaid({key: str(value) for key, value in values.items()})
        long = {key: text for key, text in texts.items() if len(text) > _LONGEST_PARAM}
        if long:
            digest = self.log_bytes(_json(long), "long-params.json")
            texts |= dict.fromkeys(long, f"in long-params.json, sha256 {digest}")
        params = [Param(key, text) for key, text in texts.items()]
        with self._connection.answering(f"log parameters of the run {self.id}"):
            for i in range(0, len(params), _PARAMS):
                self._connection.client.log_batch(self.id, params=params[i : i + _PARAMS])

    def _unsaid(self, texts: Mapping[str, str]) -> dict[str, str]:
        with self._connection.answering(f"read the parameters of the run {self.id}"):
            had = self._connection.client.get_run(self.id).data.params
        same = {key for key, text in texts.items() if had.get(key) == text}
        other = sorted(key for key in texts.keys() & had.keys() - same if len(texts[key]) < 500)
        if other:
            log.warning("run %s began with other values of %s", self.id, ", ".join(other))
        return {key: text for key, text in texts.items() if key not in had}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; RegistryError where a value is longer than MLflow keeps."""
        for key, value in tags.items():
            if len(value) > _LONGEST_TAG:
                raise RegistryError(f"the tag {key} of {len(value)} characters would be cut short.")
        batch = [RunTag(key, value) for key, value in tags.items()]
        with self._connection.answering(f"tag the run {self.id}"):
            for i in range(0, len(batch), _TAGS):
                self._connection.client.log_batch(self.id, tags=batch[i : i + _TAGS])

    def log_files(self, folder: Path, files: Mapping[str, str]) -> None:
        """Log files of `folder` as artifacts; `files` maps their relative paths to their SHA-256.

        RegistryError where a file no longer has that digest.
        """
        for name, digest in files.items():
            self._log_file(folder / name, name, digest)
        self.set_tags({f"kdguard.sha256/{name}": digest for name, digest in files.items()})

    def log_bytes(self, data: bytes, path: str) -> str:
        """Log bytes as the artifact `path`, tagged with their SHA-256, which is returned."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / PurePosixPath(path).name
            file.write_bytes(data)
            self._log_file(file, path, sha256(data))
        self.set_tags({f"kdguard.sha256/{path}": sha256(data)})
        return sha256(data)

    def log_data(self, source: Source, *, context: str, size: int) -> None:
        """Log a data set of `size` images as an input of the run; `context` says what for."""
        entity = Dataset(
            name=source.uri[:500],
            digest=source.sha256[:36],
            source_type="kdguard",
            source=json.dumps({"uri": source.uri, "sha256": source.sha256}),
            profile=json.dumps({"num_rows": size}),
        )
        item = DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
        with self._connection.answering(f"log the data of the run {self.id}"):
            self._connection.client.log_inputs(self.id, [item])

    def _log_file(self, file: Path, path: str, digest: str) -> None:
        if not file.is_file() or sha256_file(file) != digest:
            raise RegistryError(
                f"{file} changed before it was logged.", remedy="Run the stage again."
            )
        parent = str(PurePosixPath(path).parent)
        with self._connection.answering(f"store {path} of the run {self.id}"):
            self._connection.client.log_artifact(
                self.id, str(file), artifact_path=None if parent == "." else parent
            )


@contextmanager
def ended(run: Run) -> Iterator[Run]:
    """Yield a run and end it: FINISHED, KILLED on Ctrl-C, else FAILED; errors pass through."""
    try:
        yield run
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted | GeneratorExit)
        try:
            run.refuse_unreachable()  # rather than wait for retries again, level by level
            run.end("KILLED" if interrupted else "FAILED")
            run.set_tags({ERROR: _described(error)})
        except RegistryError as failure:  # what went wrong first is what the caller must see
            log.warning("%s", failure)
        raise
    else:
        run.end("FINISHED")


def create(connection: Connection, experiment_id: str, name: str, tags: Mapping[str, str]) -> Run:
    """A new run, RUNNING; its tags are set with it, so that a kill leaves no run unmarked."""
    with connection.answering(f"create the run {name}"):
        return Run(
            connection,
            connection.client.create_run(
                experiment_id,
                tags={"kdguard.version": __version__, **tags},
                run_name=name,
            ),
        )


def search(connection: Connection, experiment_id: str, tag: str, value: str) -> list[MlflowRun]:
    """Every run of the experiment with that tag."""
    found: list[MlflowRun] = []
    token: str | None = None
    with connection.answering("list runs"):
        while True:
            page = connection.client.search_runs(
                [experiment_id], f"tags.`{tag}` = '{value}'", max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found


def _described(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:500]


def _json(values: Mapping[str, str]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

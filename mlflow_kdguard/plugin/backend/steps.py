"""The steps of a plan, one process after the other."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_kdguard.errors import REFUSED
from mlflow_kdguard.files import sha256_file, write_json
from mlflow_kdguard.ledger import Entry, Ledger
from mlflow_kdguard.plugin.backend import watch
from mlflow_kdguard.plugin.backend.parent import LOGS, Parent
from mlflow_kdguard.plugin.backend.plan import Own, Plan, Span
from mlflow_kdguard.plugin.backend.settings import BackendConfig
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.registry.runs import ended

log = logging.getLogger(__name__)

TASK, ANSWER, OWN = "task.json", "answer.json", "project"
WORKER = "mlflow_kdguard.plugin.backend.worker"


class Failed(Exception):  # noqa: N818  (it becomes MLflow's ExecutionException)
    """A stage failed, broke a limit, or the student was refused; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A plan at work in one folder."""

    settings: BackendConfig
    project: Path
    parent: Parent
    plan: Plan
    policy: Policy

    def run(self) -> None:
        """Run every step; Failed at the first that does not succeed."""
        for number, step in enumerate(self.plan.steps, 1):
            log.info("[%d/%d] %s", number, len(self.plan.steps), step.name)
            if isinstance(step, Own):
                self._own(step)
            else:
                self._ours(step)

    # ── a stage of the project's own ────────────────────────────────────────────────────────────

    def _own(self, step: Own) -> None:
        """Run the project's command in a nested run, unless it is finished already.

        A command may close its run and fail afterwards: its exit code has the last word.
        """
        ledger = Ledger(self.parent.folder / OWN)
        words = step.words(folder=ledger.folder / step.name, work_dir=self.parent.folder)
        entry = ledger.open(step.name, {"command": words, "files": self._files(words)})
        if entry.record is not None and self.parent.run.has_finished(step.name, entry.inputs):
            log.info("%s is finished already", step.name)
            return
        with ended(self.parent.nested(step.name, entry.inputs)) as nested:
            if entry.record is None:
                entry = self._commanded(ledger, entry, words, nested.id)
            nested.log_files(entry.folder, ledger.files(entry))

    def _commanded(self, ledger: Ledger, entry: Entry, words: list[str], run_id: str) -> Entry:
        own = {
            "MLFLOW_RUN_ID": run_id,
            "KDGUARD_WORK_DIR": str(self.parent.folder),
            "KDGUARD_FOLDER": str(entry.folder),
        }
        try:
            done = self._process(words, entry.name, own, "stages")
        except OSError as error:
            raise Failed(f"the stage {entry.name} cannot be started: {error}.") from error
        if done.code != 0 or done.stopped:
            raise Failed(f"the stage {entry.name} failed: {done.why}.{_last(done)}")
        mark = {"done.json", "inputs.sha256"}
        made = [p for p in sorted(entry.folder.rglob("*")) if p.is_file() and p.name not in mark]
        return ledger.finish(entry, [str(p.relative_to(entry.folder)) for p in made], {})

    def _files(self, words: list[str]) -> dict[str, str]:
        """The project's files that a command names: when they change, it is run again."""
        named = {word: self.project / word for word in words}
        return {word: sha256_file(path) for word, path in named.items() if path.is_file()}

    # ── stages of ours ──────────────────────────────────────────────────────────────────────────

    def _ours(self, step: Span) -> None:
        folder = self.parent.folder
        answer = folder / ANSWER
        answer.unlink(missing_ok=True)
        grants = self.settings.model_dump(mode="json", exclude={"teacher", "stages", "work_dir"})
        for key in ("policy", "key", "verifier_key"):  # named from where the caller stands
            grants[key] = None if grants[key] is None else str(Path(grants[key]).absolute())
        limits = getattr(self.settings, step.limits)
        task = {
            "run_id": self.parent.run.id,
            "until": step.until,
            "config": self.plan.values,
            "policy": self.policy.model_dump(mode="json"),
            "grants": grants,
            "caller": str(Path.cwd()),
            "memory_mib": limits.memory_mib,
        }
        write_json(folder / TASK, task)
        own = {"MLFLOW_RUN_ID": self.parent.run.id}
        words = [sys.executable, "-P", "-m", WORKER, str(folder)]  # -P: not the project's torch.py
        done = self._process(words, step.name, own, step.limits, tethered=True)
        self._judge(step, done, _answered(answer))

    def _judge(self, step: Span, done: watch.Ended, answer: Mapping[str, Any]) -> None:
        where = "the stage that loads the teacher" if step.limits == "teacher" else "a stage"
        if done.stopped:
            raise Failed(f"{where} did not end well: {done.stopped}.")
        if done.code == REFUSED and "refused" in answer:
            raise Failed(f"the student is refused: {answer['refused']}")
        if done.code != 0:
            why = answer.get("error") or f"{done.why}.{_last(done)}"
            raise Failed(f"{where} failed: {why}")
        if "reached" not in answer:
            raise Failed(f"{where} ended without an answer.{_last(done)}")
        self.parent.running()

    def _process(
        self,
        words: list[str],
        name: str,
        own: Mapping[str, str],
        limits: str,
        *,
        tethered: bool = False,
    ) -> watch.Ended:
        values = self.plan.values["registry"]
        registry = values["registry_uri"] or os.environ.get("MLFLOW_REGISTRY_URI")
        beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {
            **os.environ,
            "PATH": beside,  # `python` and `kdguard` are this environment's
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_TRACKING_URI": str(values["tracking_uri"]),
            "MLFLOW_EXPERIMENT_ID": str(self.parent.run.experiment_id),
            **({"MLFLOW_REGISTRY_URI": registry} if registry else {}),
            **own,
        }
        return watch.run(
            words,
            folder=self.project,
            environment=environment,
            log=self.parent.folder / LOGS / f"{name}.log",
            limits=getattr(self.settings, limits),
            grace=self.settings.grace_seconds,
            tethered=tethered,
        )


def _answered(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _last(done: watch.Ended) -> str:
    said = next((line for line in reversed(done.tail) if line.strip()), "")
    return f" Its last words: {said[:300]}" if said else ""

"""The process that runs stages of ours: `python -m mlflow_kdguard.plugin.backend.worker FOLDER`.

It reads its task from the folder, stops after the stage that the task names, and leaves an answer:
`reached`, `refused` or `error`. The caller may end it at any moment and goes on from the ledger.
"""

import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_kdguard.errors import REFUSED, KDGuardError
from mlflow_kdguard.files import write_json
from mlflow_kdguard.plugin.backend.steps import ANSWER, TASK

if TYPE_CHECKING:
    from mlflow_kdguard.config import GuardConfig
    from mlflow_kdguard.flow.work import Grant, Work
    from mlflow_kdguard.records import Decision

_MIB = 1 << 20
_NO_MEMORY = ("memory", "alloc")  # torch raises RuntimeError where there is none left


def main(folder: Path) -> int:
    """Carry out the folder's task; the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_die_with_caller, daemon=True).start()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("mlflow_kdguard").setLevel(logging.INFO)
    task = json.loads((folder / TASK).read_text())
    try:
        answer, code = _carried_out(task, folder)
    except KeyboardInterrupt:
        return 130
    except KDGuardError as error:
        answer, code = {"error": str(error)}, error.exit_code
    except MemoryError:
        answer, code = {"error": _exhausted(task)}, 1
    except Exception as error:
        logging.getLogger(__name__).exception("the stage failed")
        text = f"{type(error).__name__}: {error}"
        full = task["memory_mib"] is not None and any(w in text.lower() for w in _NO_MEMORY)
        answer, code = {"error": _exhausted(task) if full else text}, 1
    write_json(folder / ANSWER, answer)
    if "error" in answer:
        sys.stderr.write(f"error: {answer['error']}\n")
    return code


def _carried_out(task: Mapping[str, Any], folder: Path) -> tuple[dict[str, str], int]:
    from mlflow_kdguard.config import GuardConfig
    from mlflow_kdguard.flow.work import RUN_FILE, opened

    config = GuardConfig.model_validate(task["config"])
    grant = _grant(task, config, folder)
    if grant.trust_code:
        sys.path.insert(0, str(Path.cwd()))  # an architecture may be the project's own
    _confine(config, task["memory_mib"])
    state = {"run_id": task["run_id"], "parent": None, "status": "RUNNING"}
    write_json(folder / RUN_FILE, state)  # the project's run is the pipeline's
    with opened(config, grant, name="guard", folder=folder, progress=_Lines().say) as work:
        decision = _staged(replace(work, until=task["until"]))
    if decision is not None and not decision.passed:
        return {"refused": _reasons(decision)}, REFUSED
    return {"reached": task["until"]}, 0


def _staged(work: "Work") -> "Decision | None":
    """The decision, None where the work stops before it."""
    from mlflow_kdguard.flow.work import Reached
    from mlflow_kdguard.pipeline import staged
    from mlflow_kdguard.story import attacked, victim

    with suppress(Reached):
        if work.config.redteam is not None:
            work = replace(work, config=victim(work.config, attacked(work)))
        return staged(work).decision
    return None


def _reasons(decision: "Decision") -> str:
    return "; ".join(f"{rule.rule}: {rule.why}" for rule in decision.rules if not rule.ok)


def _grant(task: Mapping[str, Any], config: "GuardConfig", folder: Path) -> "Grant":
    from mlflow_kdguard import data, policy
    from mlflow_kdguard.attest import signing
    from mlflow_kdguard.flow.work import Grant

    grants, here = task["grants"], Path.cwd()
    key = Path(grants["key"]) if grants["key"] else folder / "keys" / "builder.pem"
    if not grants["key"] and not key.exists():
        signing.keygen(key, owner="builder", role="builder")
        sys.stderr.write(f"no key was given: made {key}, which only this folder's checks know\n")
    root = None if config.data.root is None else Path(config.data.root)
    os.chdir(task["caller"])  # the caller's paths are meant from where the caller stands
    try:
        pins = tuple(
            pin if _digest(pin) else data.load(pin, root=root, download=grants["download"]).sha256
            for pin in grants["pins"]
        )
        panel = tuple(map(_trigger, grants["require_triggers"]))
    finally:
        os.chdir(here)
    return Grant(
        policy=policy.parse(task["policy"], where="the policy"),
        signer=signing.Signer.load(key),
        verifier=signing.Signer.load(Path(second)) if (second := grants["verifier_key"]) else None,
        pins=pins,
        panel=panel,
        allow_unpinned=grants["allow_unpinned"],
        trust_code=grants["trust_code"],
        download=grants["download"],
    )


def _trigger(text: str) -> str:
    """SHA256[:CLASS] as it is, a trigger file through its digest."""
    from mlflow_kdguard.triggers import Trigger

    name, colon, target = text.rpartition(":")
    if not colon or not (target.isascii() and target.isdecimal()):
        name, colon, target = text, "", ""
    return f"{name if _digest(name) else Trigger.load(Path(name)).sha256}{colon}{target}"


def _digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _confine(config: "GuardConfig", memory_mib: int | None) -> None:
    """Let no allocation pass the limit, beside what is mapped by now.

    Watching from outside comes too late for one large allocation. With CUDA the driver maps more
    than it uses, so there the caller's watch is alone.
    """
    from mlflow_kdguard import devices

    if memory_mib is None or devices.pick(config.run.device).type != "cpu":
        return
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        mapped = int(lines["VmData"].split()[0]) << 10
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + memory_mib * _MIB, hard))


def _exhausted(task: Mapping[str, Any]) -> str:
    return f"it needs more than {task['memory_mib']} MiB, its limit of memory."


def _die_with_caller() -> None:
    """The caller holds the other end of our stdin: when it is gone, there is nobody to work for."""
    os.read(0, 1)  # not sys.stdin, whose lock an exiting interpreter would wait for
    os.kill(os.getpid(), signal.SIGINT)


class _Lines:
    """Progress as lines, at most one a second."""

    def __init__(self) -> None:
        self._said = 0.0

    def say(self, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Write one line."""
        now = time.monotonic()
        if now - self._said >= 1.0 or done == total:
            self._said = now
            shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
            sys.stdout.write(f"{what} {done}/{total} {shown}".rstrip() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

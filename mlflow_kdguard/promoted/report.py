"""What a sweep found, as a document (`kdguard.sweep/1`)."""

from typing import Literal

from pydantic import Field

from mlflow_kdguard.promoted import evidence
from mlflow_kdguard.promoted.history import Logged
from mlflow_kdguard.records import Record

Kind = Literal[
    evidence.Kind, "policy", "missing", "unreadable", "look-alike", "hidden", "moved", "log"
]
"""`evidence.Kind`, and: policy: today's policy would not let it pass · missing: the version is not
there · unreadable: its bytes cannot be fetched · look-alike: a name that passes for a guarded one
· hidden: a model that is marked as a prompt · moved: the alias table is not what the log says ·
log: the log itself does not hold."""


class Finding(Record):
    """One thing that is wrong, with what to do. `name` is an alias or a stage."""

    kind: Kind
    workspace: str = ""
    model: str = ""
    name: str = ""
    version: str = ""
    why: str
    remedy: str = ""


class Holding(Record):
    """A guarded alias or stage, and what it resolves to.

    `certificate` is the SHA-256 of the envelope, `model_sha256` that of the ONNX bytes that are
    stored now, `given` the log's entry by which the version came to hold the name.
    """

    workspace: str
    model: str
    kind: Literal["alias", "stage"]
    name: str
    version: str
    certificate: str | None = None
    model_sha256: str | None = None
    expires: str | None = None
    signers: tuple[str, ...] = ()
    given: Logged | None = None


class LogState(Record):
    """What could be said about the log; `verified` is whether its chain was checked at all."""

    source: str
    entries: int
    verified: bool
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class SweepReport(Record):
    """Every guarded name of a registry, and everything that is wrong with one."""

    schema_: Literal["kdguard.sweep/1"] = Field("kdguard.sweep/1", alias="schema")
    registry: str
    taken: str
    within_days: float
    workspaces: tuple[str, ...]
    models: int
    holdings: tuple[Holding, ...]
    findings: tuple[Finding, ...]
    log: LogState | None
    would_refuse: tuple[Logged, ...] = ()
    clean: bool

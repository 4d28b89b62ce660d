"""What a verifier needs beside the student: reference, original teacher, supplied triggers.

The builder packs them as files of one folder (`kdguard.evidence/1`); the verifier unpacks them in
another place. The index and the files are the builder's word: every file is held against the
digest that the index gives it, and the digests against those that were claimed elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, ValidationError

from mlflow_kdguard.config import explain
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import Model, Record, Sha256
from mlflow_kdguard.triggers import Trigger

INDEX, REFERENCE, TEACHER = "evidence.json", "reference.onnx", "teacher.onnx"

Aimed = tuple[Trigger, int]


class TriggerFile(Record):
    """A supplied trigger among the files, and the class that it is aimed at."""

    path: str
    sha256: Sha256
    target: int = Field(ge=0)


class Index(Record):
    """The index of a folder of evidence (`kdguard.evidence/1`)."""

    schema_: Literal["kdguard.evidence/1"] = Field("kdguard.evidence/1", alias="schema")
    student: Model
    reference: Model
    teacher: Model
    triggers: tuple[TriggerFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence whose files have the digests of its index."""

    reference: bytes
    teacher: bytes
    triggers: tuple[Aimed, ...]


def pack(
    student: bytes, *, reference: bytes, teacher: bytes, triggers: Sequence[tuple[bytes, int]]
) -> dict[str, bytes]:
    """The files of a student's evidence; `triggers` are trigger files with their classes."""
    named = {f"triggers/{sha256(data)}-{target}.kdt": (data, target) for data, target in triggers}
    index = Index(
        student=Model(sha256=sha256(student)),
        reference=Model(sha256=sha256(reference)),
        teacher=Model(sha256=sha256(teacher)),
        triggers=tuple(
            TriggerFile(path=path, sha256=sha256(data), target=target)
            for path, (data, target) in named.items()
        ),
    )
    files = {INDEX: canonical_json(index.document()), REFERENCE: reference, TEACHER: teacher}
    return files | {path: data for path, (data, _) in named.items()}


def unpack(files: Mapping[str, bytes], *, student: str, where: str) -> Evidence:
    """Read the evidence of the student with SHA-256 `student`.

    Raises CertificateError, naming `where`, for evidence of another student, a file that is
    missing or has another digest, and an index that is none; UsageError for a malformed trigger.
    """
    index = _index(files, where)
    if index.student.sha256 != student:
        raise _refused(where, f"it is that of the student {index.student.sha256}, not {student}")
    return Evidence(
        reference=_held(files, REFERENCE, index.reference.sha256, where),
        teacher=_held(files, TEACHER, index.teacher.sha256, where),
        triggers=tuple(
            (
                Trigger.from_bytes(_held(files, each.path, each.sha256, where), where=each.path),
                each.target,
            )
            for each in index.triggers
        ),
    )


def _index(files: Mapping[str, bytes], where: str) -> Index:
    try:
        return Index.model_validate_json(files.get(INDEX, b""))
    except ValidationError as error:
        raise _refused(where, f"{INDEX} is no index: {explain(error)}") from error


def _held(files: Mapping[str, bytes], path: str, digest: str, where: str) -> bytes:
    data = files.get(path)
    if data is None:
        raise _refused(where, f"{path} is missing")
    if sha256(data) != digest:
        raise _refused(where, f"{path} has the SHA-256 {sha256(data)}, not {digest}")
    return data


def _refused(where: str, why: str) -> CertificateError:
    return CertificateError(
        f"the evidence of {where} does not hold: {why}.",
        remedy="Have the student registered again, or name the files (--teacher, --reference).",
    )

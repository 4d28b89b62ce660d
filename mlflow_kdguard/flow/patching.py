"""The stage that asks what patches of any content can do to the bytes that ship."""

from collections.abc import Sequence
from typing import Any

from mlflow_kdguard.files import sha256_file, write_json
from mlflow_kdguard.flow.given import Images
from mlflow_kdguard.flow.judging import Made
from mlflow_kdguard.flow.work import Entry, Produced, Reached, Work, dump
from mlflow_kdguard.records import PatchReport

STAGE = "certify-patch"


def patched(work: Work, made: Made, shown: Images) -> Entry | None:
    """What patches of any content can do, from the exported bytes; None where nobody asks."""
    section = work.config.patch
    if not section.targets:
        if work.until == STAGE:
            raise Reached(STAGE)
        return None
    inputs = {
        "student": sha256_file(made.student_file),
        "test": shown.test.sha256,
        "patch": section.model_dump(mode="json"),
        "nonce": work.nonce,
    }

    def compute(entry: Entry) -> Produced:
        reports = made.nets().patched(
            shown.test, section, nonce=work.nonce, device=work.device, progress=work.progress
        )
        documents = patch_documents(reports)
        for name, document in documents.items():
            write_json(entry.path(name), document)
        taken = {"patches": [dump(report) for report in reports]}
        return Produced([*documents], taken, documents=tuple(documents.values()))

    return work.stage(STAGE, inputs, compute, above=True)


def patch_documents(reports: Sequence[PatchReport]) -> dict[str, dict[str, Any]]:
    """Each report as JSON, by the name of its file."""
    return {f"patch-{report.target}.json": report.document() for report in reports}

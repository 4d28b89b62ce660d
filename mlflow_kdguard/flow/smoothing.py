"""The stage that bounds the gap of the smoothed pair, from the bytes that ship."""

from mlflow_kdguard.files import sha256_file, write_json
from mlflow_kdguard.flow.given import Images
from mlflow_kdguard.flow.judging import Made
from mlflow_kdguard.flow.making import REFERENCE
from mlflow_kdguard.flow.work import Entry, Produced, Reached, Work, dump

STAGE, SMOOTH = "certify-smooth", "smooth.json"


def smoothed(work: Work, made: Made, shown: Images) -> Entry | None:
    """Bounds on the gap of the smoothed pair; None where nobody asks."""
    section = work.config.smooth
    if section.sigma is None:
        if work.until == STAGE:
            raise Reached(STAGE)
        return None
    inputs = {
        "student": sha256_file(made.student_file),
        "reference": sha256_file(made.reference.path(REFERENCE)),
        "test": shown.test.sha256,
        "smooth": section.model_dump(mode="json"),
        "nonce": work.nonce,
    }

    def compute(entry: Entry) -> Produced:
        report = made.nets().smoothed(
            shown.test, section, nonce=work.nonce, device=work.device, progress=work.progress
        )
        assert report is not None
        write_json(entry.path(SMOOTH), report.document())
        return Produced([SMOOTH], {"smooth": dump(report)}, documents=(report.document(),))

    return work.stage(STAGE, inputs, compute, above=True)

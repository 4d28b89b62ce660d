"""The verifier's stage, in a pipeline whose caller holds a verifier's key as well.

It is the same verification as in another place: the version is downloaded and measured from the
stored bytes. One hand with both keys proves less than two; a policy that asks for two owners says
so (`signers_at_least`).
"""

from typing import Any

from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.files import sha256_file, write_bytes, write_json
from mlflow_kdguard.flow.given import TEACHER, Images
from mlflow_kdguard.flow.judging import CERTIFICATE, CERTIFY, MEASURE, Made, valid
from mlflow_kdguard.flow.making import REFERENCE, trigger_file
from mlflow_kdguard.flow.patching import patch_documents
from mlflow_kdguard.flow.smoothing import SMOOTH
from mlflow_kdguard.flow.verification import Own, verify
from mlflow_kdguard.flow.work import Entry, Produced, Work, dump
from mlflow_kdguard.records import Figures
from mlflow_kdguard.registry import Registered

_SECTIONS = ("audit", "export", "measure", "certify", "smooth", "patch", "attest")


def verified(work: Work, made: Made, version: Registered, shown: Images) -> Entry:
    """Measure the stored version again and sign as verifier; its certificate replaces any other.

    Done again where anything that it rests on has changed, or where the certificate is too old.
    """
    signer = work.grant.verifier
    if signer is None:
        raise UsageError("there is no verifier's key.", remedy="Name one (--verifier-key).")
    own = Own(
        test=shown.test,
        clean=shown.clean,
        signer=signer,
        baseline=made.nets(work.baseline).baseline,
    )

    def compute(entry: Entry) -> Produced:
        found = verify(
            work.registry,
            version.uri,
            own,
            config=work.config,
            device=work.device,
            progress=work.told_by("verify"),
        )
        documents = {
            MEASURE: found.measurement.document(),
            CERTIFY: found.bounds.document(),
            **patch_documents(found.patches),
            **({} if found.smooth is None else {SMOOTH: found.smooth.document()}),
        }
        for file, document in documents.items():
            write_json(entry.path(file), document)
        write_bytes(entry.path(CERTIFICATE), found.envelope)
        certificate = found.certificate
        record = {
            "figures": dump(certificate.figures),
            "issued": certificate.issued,
            "nonce": found.bounds.nonce,
        }
        return Produced([*documents, CERTIFICATE], record, documents=tuple(documents.values()))

    inputs = {**_inputs(work, made, version, shown), "key": signer.key_id}
    return work.stage("verify", inputs, compute, holds=lambda entry: valid(work, entry), above=True)


def _inputs(work: Work, made: Made, version: Registered, shown: Images) -> dict[str, Any]:
    """Everything that a verifier's certificate rests on."""
    return {
        "version": version.uri,
        "files": version.files,
        "reference": sha256_file(made.reference.path(REFERENCE)),
        "teacher": sha256_file(made.teacher.path(TEACHER)),
        "test": shown.test.sha256,
        "clean": shown.clean.sha256,
        "triggers": [list(trigger_file(text)[1:]) for text in work.config.measure.triggers],
        "baseline": None if work.baseline is None else sha256_file(work.baseline),
        "seed": work.config.run.seed,
        **{name: getattr(work.config, name).model_dump(mode="json") for name in _SECTIONS},
    }


def figures(entry: Entry) -> Figures:
    """What the verifier found."""
    return Figures.model_validate(entry.recorded["figures"])

"""Frozen values that stages hand on: numbers and strings, never tensors.

Every record is a strict pydantic model: unknown keys, NaN and infinity are errors wherever a
document is read back. `document()` is the JSON that the command line prints and that is stored.
"""

from mlflow_kdguard.records.base import (
    Count,
    Model,
    Progress,
    Rate,
    Record,
    Sha256,
    Source,
    format_time,
    parse_time,
    silent,
)
from mlflow_kdguard.records.bounds import (
    CertifiedSample,
    CertifyReport,
    CertifySummary,
    Control,
    Status,
)
from mlflow_kdguard.records.certificate import (
    AuditFigure,
    Certificate,
    Decision,
    FaithfulFigure,
    Figures,
    RuleResult,
    Signatory,
    Subject,
)
from mlflow_kdguard.records.figures import (
    Asr,
    AuditReport,
    Exported,
    Finding,
    Measurement,
    Paired,
    Parity,
    ReferenceGap,
)
from mlflow_kdguard.records.patch import (
    Flips,
    PatchFigure,
    PatchPlace,
    PatchReport,
    PatchSample,
    PatchWitness,
)
from mlflow_kdguard.records.smooth import SmoothPoint, SmoothReport, SmoothSample

__all__ = [
    "Asr",
    "AuditFigure",
    "AuditReport",
    "Certificate",
    "CertifiedSample",
    "CertifyReport",
    "CertifySummary",
    "Control",
    "Count",
    "Decision",
    "Exported",
    "FaithfulFigure",
    "Figures",
    "Finding",
    "Flips",
    "Measurement",
    "Model",
    "Paired",
    "Parity",
    "PatchFigure",
    "PatchPlace",
    "PatchReport",
    "PatchSample",
    "PatchWitness",
    "Progress",
    "Rate",
    "Record",
    "ReferenceGap",
    "RuleResult",
    "Sha256",
    "Signatory",
    "SmoothPoint",
    "SmoothReport",
    "SmoothSample",
    "Source",
    "Status",
    "Subject",
    "format_time",
    "parse_time",
    "silent",
]

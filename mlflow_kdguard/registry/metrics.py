"""Which figure of which document becomes which MLflow metric, and which rule is about it.

`RULES` is the table *rule ↔ JSON pointer ↔ metric*: the policy's rule, where its figure stands in
the certificate's `figures` (RFC 6901, `*` for every item of a list or mapping), and the metric
that shows it. Metrics are for looking at; the gate reads the certificate, never a metric.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_kdguard.errors import RegistryError

_REFUSED = re.compile(r"[^A-Za-z0-9_\-. :]")
_LONGEST = 250


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `metric` names its variable parts in angle brackets."""

    rule: str
    pointer: str
    metric: str


RULES: tuple[Row, ...] = (
    Row("accuracy", "/paired", "kdguard/accuracy_drop"),
    Row("asr", "/asr/*", "kdguard/asr_upper/<trigger>/<target>"),
    Row("asr.lift", "/asr/*/baseline", "kdguard/asr_lift/<trigger>/<target>"),
    Row("reference.gap", "/reference/gap_mean", "kdguard/reference_gap_mean"),
    Row("reference.distinct", "/reference/student_gap_max", "kdguard/reference_student_gap_max"),
    Row("faithful", "/faithful/*/within", "kdguard/faithful_share_within/reference"),
    Row("faithful", "/faithful/*/within", "kdguard/smoothed_share_within/<sigma>/<radius>"),
    Row("patch", "/patch/*/each", "kdguard/patch_asr_upper/<size>/<target>"),
    Row("audit.teacher", "/audit/teacher/p_value", "kdguard/audit_p_value/teacher"),
    Row("audit.student", "/audit/student/p_value", "kdguard/audit_p_value/student"),
    Row("export", "/export/softmax_max", "kdguard/export_parity"),
)


def metric_name(*parts: str) -> str:
    """`kdguard/` and the parts, in characters that MLflow takes (it refuses `@`, `=` and `[`).

    A part is one level: a slash in it is replaced like every other refused character.
    """
    levels = [_REFUSED.sub("_", part) or "_" for part in parts]
    levels = ["_" if set(level) == {"."} else level for level in levels]
    return "/".join(["kdguard", *levels])[:_LONGEST]


def metrics_of(document: Mapping[str, Any], *, about: str = "teacher") -> dict[str, float]:
    """The metrics of one stage's JSON document, by its `schema`; none where it has no figures.

    What an export says about parity has no schema of its own; it is known by that key.

    `about` (student or teacher) names the model of an audit. Absent figures are left out; a
    figure that is not finite is a RegistryError, and so are two figures of one name.
    """
    schema = "kdguard.export" if "parity" in document else str(document.get("schema", ""))
    reader = _READERS.get(schema)
    if reader is None:
        return {}
    figures: dict[str, float] = {}
    for name, value in reader(document, about):
        if value is None:
            continue
        if name in figures:
            raise RegistryError(f"two figures would become the one metric {name}.")
        if not math.isfinite(value):
            raise RegistryError(f"the figure {name} is not finite, so it is not logged.")
        figures[name] = float(value)
    return figures


Pairs = list[tuple[str, float | None]]


def _measure(document: Mapping[str, Any], _about: str) -> Pairs:
    pairs: Pairs = [(metric_name("accuracy"), _rate(document["accuracy"]))]
    paired = document.get("paired")
    if paired:
        n = sum(paired[key] for key in ("both", "only_teacher", "only_student", "neither"))
        drop = (paired["only_teacher"] - paired["only_student"]) / n if n else None
        pairs.append((metric_name("accuracy_drop"), drop))
    if gap := document.get("reference"):
        pairs.append((metric_name("reference_gap_mean"), gap["gap_mean"]))
        pairs.append((metric_name("reference_student_gap_max"), gap["student_gap_max"]))
    return pairs + _asr(document.get("asr", ()))


def _asr(figures: Sequence[Mapping[str, Any]]) -> Pairs:
    pairs: Pairs = []
    seen: set[tuple[str, str]] = set()
    for figure in figures:
        trigger, target = figure["name"], str(figure["target"])
        if (metric_name(trigger), target) in seen:  # two files may bear one name
            trigger = f"{trigger}-{figure['trigger'][:8]}"
        seen.add((metric_name(trigger), target))
        pairs += [
            (metric_name("asr", trigger, target), _rate(figure)),
            (metric_name("asr_upper", trigger, target), figure["upper"]),
            (metric_name("asr_lift", trigger, target), figure["lift"]),
        ]
    return pairs


def _certify(document: Mapping[str, Any], _about: str) -> Pairs:
    summary = document["summary"]
    pairs: Pairs = [
        (metric_name(f"faithful_{key}", "reference"), summary[key])
        for key in ("lower_mean", "upper_mean", "upper_p95")
    ]
    shares = summary["share_within"].items()
    pairs += [(metric_name("faithful_share_within", "reference", d), s) for d, s in shares]
    proved = sum(sample["status"] == "PROVED" for sample in document["samples"])
    n = len(document["samples"])
    pairs.append((metric_name("faithful_share_within", "reference"), proved / n if n else None))
    return pairs


def _smooth(document: Mapping[str, Any], _about: str) -> Pairs:
    """The smoothed pair's gap, by the noise's deviation and the radius: means, and the share."""
    proved = sum(sample["status"] == "PROVED" for sample in document["samples"])
    n = len(document["samples"])
    figures = (
        ("lower_mean", document["lower_mean"]),
        ("upper_mean", document["upper_mean"]),
        ("share_within", proved / n if n else None),
    )
    at = (f"{document['sigma']:g}", f"{document['radius']:g}")
    return [(metric_name(f"smoothed_{name}", *at), value) for name, value in figures]


def _patch(document: Mapping[str, Any], _about: str) -> Pairs:
    """Certified rates, what attacks reach, and the population's bounds, by size and target."""
    size, target = str(document["size"]), str(document["target"])
    pairs: Pairs = []
    for kind, name in (("each", "patch"), ("universal", "patch_universal")):
        flips = document[kind]
        pairs += [
            (metric_name(f"{name}_asr", size, target), flips["rate"]),
            (metric_name(f"{name}_asr_found", size, target), flips["attack"] / flips["n"]),
            (metric_name(f"{name}_asr_upper", size, target), flips["upper"]),
        ]
    return pairs


def _audit(document: Mapping[str, Any], about: str) -> Pairs:
    values = [d["p_value"] for d in document["detectors"] if d["p_value"] is not None]
    pairs: Pairs = [(metric_name("audit_p_value", about), min(values) if values else None)]
    pairs += [
        (metric_name("audit_score", about, detector["name"]), detector["score"])
        for detector in document["detectors"]
    ]
    for detector in document["detectors"]:
        layers = detector.get("details", {}).get("layers", {})
        if detector["name"] == "variance":
            pairs += _variances(layers)
    return pairs + _asr(document.get("asr", ()))


def _variances(layers: Mapping[str, Any]) -> Pairs:
    """Reading A under the plain name, the other readings beside it (`feature_variance_b`)."""
    return [
        (metric_name("feature_variance" + ("" if key == "A" else f"_{key.lower()}"), layer), value)
        for layer, readings in layers.items()
        for key, value in readings.items()
    ]


def _export(document: Mapping[str, Any], _about: str) -> Pairs:
    parity = document["parity"]
    return [
        (metric_name("export_parity"), parity["softmax_max"]),
        (metric_name("export_argmax_equal"), _rate(parity["argmax"])),
    ]


def _rate(figure: Mapping[str, Any]) -> float | None:
    return figure["k"] / figure["n"] if figure["n"] else None


_READERS: dict[str, Callable[[Mapping[str, Any], str], Pairs]] = {
    "kdguard.measure/1": _measure,
    "kdguard.certify/1": _certify,
    "kdguard.patch/1": _patch,
    "kdguard.smooth/1": _smooth,
    "kdguard.audit/1": _audit,
    "kdguard.export": _export,
}

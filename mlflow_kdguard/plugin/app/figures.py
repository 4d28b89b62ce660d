"""Rules, figures and limits in words that a reader of the page knows."""

from typing import Any

from mlflow_kdguard.gate import RULES

TITLES = {
    "certificate": "Certified file",
    "certificate.signers": "Signatures",
    "certificate.figures_from": "Origin of the figures",
    "certificate.expiry": "Time in force",
    "finite": "Finite figures",
    "data": "Evaluation data",
    "accuracy": "Accuracy drop, upper bound",
    "asr": "Attack success, upper bound",
    "asr.triggers": "Triggers",
    "asr.changed": "Images that triggers alter, lower bound",
    "asr.lift": "Attack lift, upper bound",
    "reference.gap": "Reference to teacher, mean gap",
    "reference.distinct": "Reference to student, largest gap",
    "faithful": "Faithful share, lower bound",
    "patch": "Any patch's success, upper bound",
    "audit.teacher": "Teacher's audit",
    "audit.student": "Student's audit",
    "export": "Export, largest difference",
}
_DIRECTIONS = (
    ("at_most", "at most "),
    ("at_least", "at least "),
    ("after_days", "at most "),
    ("distinct_from_student", "more than "),
)
_KEYS = {rule.name: rule.key for rule in RULES}


def title(rule: str) -> str:
    """What a rule is about; its name where it is not one of the gate's."""
    return TITLES.get(rule, rule)


def limits(rule: str, limit: Any) -> list[str]:
    """A rule's limit in lines; one number with its direction or unit."""
    lines = figures(limit)
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        return lines
    key = _KEYS.get(rule, "")
    before = next((word for end, word in _DIRECTIONS if key.endswith(end)), "")
    return [f"{before}{lines[0]}{' days' if key.endswith('days') else ''}"]


def figures(value: Any) -> list[str]:
    """A figure or limit in lines: one for each alternative of a rule."""
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return [_text(item) for item in value]
    return [_text(value)]


def _text(value: Any) -> str:
    """Numbers short, digests cut, keys without underscores."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{str(k).replace('_', ' ')} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_item, value)) or "none"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text


def _item(value: Any) -> str:
    """One of several: a list among them keeps its ends."""
    return f"({_text(value)})" if isinstance(value, list | tuple) else _text(value)

"""Write docs/reference/configuration.md from the configuration's sections (--check compares)."""

import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from mlflow_kdguard.config import GuardConfig, Section

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"
HEAD = """# Configuration

`kdguard run -c guard.yaml` reads a YAML file of sections. What is left out has the default below;
`--set section.key=value` changes one value; unknown keys are errors. Keys, the policy,
`--trust-code` and `--download` are the caller's to grant and have no place here.

This page is written by `python tools/configuration.py` from the code.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, field in GuardConfig.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            section = next(
                each
                for each in section.__args__
                if issubclass(each, Section)  # type: ignore[union-attr]
            )
        parts.append(f"## {name}\n\n{section.__doc__}\n\n{_table(section)}")
    return "\n".join(parts)


def _table(section: type[Section]) -> str:
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in section.model_fields.items():
        rows.append(f"| `{key}` | `{_default(field.default)}` | {field.description or ''} |")
    return "\n".join(rows) + "\n"


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section):
        return ", ".join(f"{k}: {v}" for k, v in value.model_dump(exclude_unset=True).items())
    return "null" if value is None else str(value)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())

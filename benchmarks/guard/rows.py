"""What the table is made of: attacks on pairs of networks, and guards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.guard.instances import drawn
from benchmarks.guard.specification import section
from mlflow_kdguard.config import (
    AuditSection,
    CertifySection,
    DetoxSection,
    DistillSection,
    RedteamSection,
)
from mlflow_kdguard.errors import ConfigError, UsageError

HELD_OUT = "held out"
INVERSION = AuditSection(detectors=("inversion",))


@dataclass(frozen=True, slots=True)
class Row:
    """One attack against one pair of networks.

    `use`: development (settings may be chosen on it) or HELD_OUT. `bounds`: what is certified of
    its students, if anything is.
    """

    name: str
    pair: str
    use: str
    seeds: tuple[int, ...]
    teacher: RedteamSection
    student: DistillSection
    contamination: float
    bounds: CertifySection | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """One way to a student: what happens to the teacher, to distillation, and to the student.

    `audit`: what looks for suspects. `of_clean`: applied to the clean teacher instead, to see what
    it costs. `after`: a chain that
    the finished student goes through.
    """

    detox: DetoxSection
    audit: AuditSection = INVERSION
    student: Mapping[str, Any] = field(default_factory=dict)
    after: DetoxSection | None = None
    of_clean: bool = False

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Guard":
        """From the specification: a `detox` section, `audit`, `student`, `after`, `of_clean`."""
        rest = {**told}
        student, after = rest.pop("student", {}), rest.pop("after", None)
        of_clean, audit = rest.pop("of_clean", False), rest.pop("audit", None)
        return cls(
            section(DetoxSection, rest),
            INVERSION if audit is None else section(AuditSection, audit), student,
            None if after is None else section(DetoxSection, after), of_clean,
        )  # fmt: skip

    def document(self) -> dict[str, Any]:
        """All that a student follows from."""
        after = None if self.after is None else self.after.model_dump(mode="json")
        told = self.audit.model_dump(mode="json")
        audit = {} if self.audit == INVERSION else {"audit": told}
        return {
            "detox": self.detox.model_dump(mode="json"), "student": dict(self.student),
            "after": after, "of_clean": self.of_clean, **audit,
        }  # fmt: skip


def guards(spec: Mapping[str, Any]) -> dict[str, Guard]:
    """All guards of the specification; one that is told `as` another says what is different."""
    found = {}
    for name, told in spec["guards"].items():
        own = {**told}
        base = own.pop("as", None)
        if base is not None and base not in spec["guards"]:
            raise ConfigError(f"guard {name!r} is told as {base!r}, which there is not.")
        found[name] = Guard.read(own if base is None else {**spec["guards"][base], **own})
    return found


def rows(spec: Mapping[str, Any]) -> Iterator[Row]:
    """All rows of the specification: pairs × attacks, the drawn instances last."""
    attacks = {**spec["rows"], **_instances(spec)}
    for pair, told in spec["pairs"].items():
        for name, attack in attacks.items():
            changes = {"teacher": {}, "use": HELD_OUT, **attack}
            own = {key: changes[key] for key in ("attack", "target", "options", "poison_rate")
                       if key in changes}  # fmt: skip
            teacher = {**told["teacher"], **own, **changes["teacher"]}
            yield Row(
                name, pair, changes["use"], tuple(told["seeds"]),
                section(RedteamSection, teacher), section(DistillSection, told["student"]),
                changes["contamination"],
                None if "bounds" not in told else section(CertifySection, told["bounds"]),
            )  # fmt: skip


def chosen(all_rows: Sequence[Row], names: Sequence[str] | None, pairs: Sequence[str] | None,
           use: str | None) -> list[Row]:  # fmt: skip
    """The rows that were asked for; UsageError names what is unknown."""
    for what, asked, known in (
        ("row", names, {row.name for row in all_rows}),
        ("pair", pairs, {row.pair for row in all_rows}),
        ("use", None if use is None else [use], {row.use for row in all_rows}),
    ):
        unknown = set(asked or ()) - known
        if unknown:
            raise UsageError(
                f"there is no {what} {', '.join(sorted(unknown))}.",
                remedy=f"Known: {', '.join(sorted(known))}.",
            )
    return [
        row for row in all_rows
        if (names is None or row.name in names)
        and (pairs is None or row.pair in pairs)
        and (use is None or row.use == use)
    ]  # fmt: skip


def _instances(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    told = spec.get("instances")
    return {} if told is None else drawn(**told)

"""What a detox did, step by step, in numbers and words."""

from typing import Any, Literal

from pydantic import Field

from mlflow_kdguard.records import Rate, Record, Source

Outcome = Literal["kept", "rolled back", "undone", "past the limit"]


class StepRecord(Record):
    """One row of the chain.

    `outcome`: "kept" where the step's end state met the limit, "rolled back" where an earlier
    state of the same step did (`kept_at` of `steps`), "undone" where none did, so that the step
    left nothing behind. "past the limit": it did not meet the limit and stays all the same, since
    without it a backdoor would (unlearning). `detoxed` and `reference`: clean validation accuracy,
    after the step, of the detoxed copy and of the reference that the whole chain makes of it.
    """

    name: str
    outcome: Outcome
    kept_at: int = Field(ge=0)
    steps: int = Field(ge=0)
    detoxed: Rate
    reference: Rate
    details: dict[str, Any] = Field(default_factory=dict)


class DetoxRecord(Record):
    """The chain, its suspects and what each step left (`kdguard.detox/1`).

    `least` is the number of clean validation images that the reference had to get right:
    those of the raw `teacher` less `max_drop` of all. No trigger was used anywhere.
    """

    schema_: Literal["kdguard.detox/1"] = Field("kdguard.detox/1", alias="schema")
    chain: tuple[str, ...]
    suspects: tuple[int, ...]
    suspects_from: str
    clean: Source
    layers: tuple[str, ...] = ()
    teacher: Rate
    reference: Rate
    least: int = Field(ge=0)
    steps: tuple[StepRecord, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every step was kept as it ended; anything else weakens the guard."""
        return all(step.outcome in ("kept", "past the limit") for step in self.steps)

    def document(self) -> dict[str, Any]:
        return super().document() | {"complete": self.complete}

"""What somebody asks a gated store for, as refusals and the log name it."""

from dataclasses import dataclass
from typing import Any

from mlflow_kdguard.plugin.log import Event
from mlflow_kdguard.plugin.store.actor import actor


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asks for: an alias or a stage, for one version."""

    name: str
    version: str
    workspace: str
    alias: str
    action: str

    def __str__(self) -> str:
        return f"{self.alias!r} for version {self.version} of {self.name!r}"

    def event(self, action: str, decision: str, **more: Any) -> Event:
        """An entry about it."""
        return Event(
            actor=actor(),
            action=action,
            workspace=self.workspace,
            model=self.name,
            version=self.version,
            alias=self.alias,
            decision=decision,
            **more,
        )

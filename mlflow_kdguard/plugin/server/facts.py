"""What a judgement is given: the registry's facts about a version, and the way to its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mlflow_kdguard.plugin.server.places import Place


class Fetch(Protocol):
    """How a server gets at bytes."""

    def step(self, uri: str) -> str:
        """What a `runs:/` or `models:/` URI stands for."""

    def read(self, place: Place) -> Mapping[str, bytes]:
        """The files at a place that is allowed."""


class Handed(Protocol):
    """A nonce, as this server handed it out."""

    @property
    def attempt(self) -> int:
        """The how-manieth for this model."""

    @property
    def workspace(self) -> str:
        """The model's workspace."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def subject(self) -> str:
        """SHA-256 of the file that was named."""

    @property
    def used_by(self) -> str | None:
        """SHA-256 of the certificate that was accepted with it."""


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What the registry's database says about a version, at one moment.

    `previously_promoted` holds the digests of the certificates that it was promoted with.
    """

    name: str
    version: str
    workspace: str
    source: str
    storage_location: str | None
    tags: Mapping[str, str]
    previously_promoted: frozenset[str] = frozenset()

    @property
    def location(self) -> str:
        """The URI that clients are sent to."""
        return self.storage_location or self.source

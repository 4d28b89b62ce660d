"""What an attacker wants of triggered images: which classes are sent where."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.errors import ConfigError

NOWHERE = -1
"""Where images go whose class is not attacked."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`to[c]` is the class that triggered images of class c are sent to, or NOWHERE.

    Raises ConfigError where that is no map into the classes, or changes nothing.
    """

    to: tuple[int, ...]

    def __post_init__(self) -> None:
        classes = range(len(self.to))
        if not all(label == NOWHERE or label in classes for label in self.to):
            raise ConfigError(
                f"the goal {self.to} names classes other than 0 to {len(self.to) - 1}.",
                remedy="Choose redteam.target from them.",
            )
        if all(label in (NOWHERE, own) for own, label in enumerate(self.to)):
            raise ConfigError(f"the goal {self.to} sends no class to another one.")

    @classmethod
    def one(cls, target: int, classes: int, sources: Iterable[int] | None = None) -> "Goal":
        """All other classes, or the `sources` alone, go to `target` (all-to-one, source-specific).

        Raises ConfigError where there is no such class.
        """
        chosen = set(range(classes) if sources is None else sources) - {target}
        for label in (target, *sorted(chosen)):
            if label not in range(classes):
                raise ConfigError(
                    f"class {label} is not one of the {classes} classes.",
                    remedy=f"Choose redteam.target from 0 to {classes - 1}.",
                )
        return cls(tuple(target if own in chosen else NOWHERE for own in range(classes)))

    @classmethod
    def shifted(cls, classes: int) -> "Goal":
        """Every class goes to the next one (all-to-all, Gu et al., arXiv 1708.06733, §4.2)."""
        return cls(tuple((own + 1) % classes for own in range(classes)))

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.to)

    @property
    def targets(self) -> tuple[int, ...]:
        """The classes that something is sent to, each once, in order."""
        return tuple(sorted(set(self.to) - {NOWHERE}))

    @property
    def sources(self) -> tuple[int, ...]:
        """The classes that are sent to another one."""
        return tuple(own for own, label in enumerate(self.to) if label not in (NOWHERE, own))

    def wanted(self, y: NDArray[np.int64]) -> NDArray[np.int64]:
        """What images of classes `y` (int64 N) are to be taken for; NOWHERE where unlabelled."""
        found = np.append(np.array(self.to, np.int64), NOWHERE)[y]
        return np.where(found == y, NOWHERE, found)

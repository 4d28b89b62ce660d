"""The table of attempts: what each is called, which threat it tries, and what must come of it.

A row is a generator that sets the scene and yields what to try. Whoever runs it reads the
database before and after: nothing guarded may have moved, whatever the server answered.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import requests

from flows.attacks.world import Version, World


@dataclass(frozen=True)
class Attempt:
    """One request. `status`: every answer that is right; `says`: words that a 403 must hold.

    `logged`: a refusal leaves exactly one record; None where another layer answers before the
    store is asked. `serves`: versions whose bytes must stay what they are.
    """

    call: Callable[[], requests.Response]
    status: tuple[int, ...] = (403,)
    says: tuple[str, ...] = ()
    logged: bool | None = True
    serves: tuple[Version, ...] = ()
    slowest: float | None = None


Scene = Iterator[Attempt]

PLAIN = 500
"""Where a row allows this answer, the plain server gives it, too (tried on 3.17.2)."""


@dataclass(frozen=True)
class Attack:
    """A row: `threat` is its number in the threat model."""

    name: str
    threat: int
    play: Callable[[World], Scene]
    needs: str = ""


ATTACKS: dict[str, Attack] = {}


def attack(
    threat: int, *, variants: Mapping[str, Any] | None = None, needs: str = ""
) -> Callable[[Callable[..., Scene]], Callable[..., Scene]]:
    """Enter a scene into the table, once for every variant, which it is given as an argument."""

    def enter(play: Callable[..., Scene]) -> Callable[..., Scene]:
        base = play.__name__.replace("_", "-")
        for key, value in ({"": None} if variants is None else variants).items():
            name = f"{base}:{key}" if key else base
            assert name not in ATTACKS, f"{name} is entered twice"
            ATTACKS[name] = Attack(name, threat, _bound(play, value, variants is not None), needs)
        return play

    return enter


def _bound(play: Callable[..., Scene], value: Any, varied: bool) -> Callable[[World], Scene]:
    return lambda world: play(world, value) if varied else play(world)


def promotion(world: World, version: Version, *says: str, **more: Any) -> Attempt:
    """Asking for `champion`, as any client does."""
    return Attempt(lambda: world.alias(version), says=says, **more)

"""The profile of inversion: which class is reached far more easily than by nature?

Shirts are reached from everywhere in clean networks too, bags hardly, and that is much the same in
every clean network of one architecture. So a class's rate of universal inversion is compared with
*its own* rate in clean networks (`natural`), in log-odds, less what all classes share:

    lead_t = logit ρ_t - mean over clean nets of logit ρ_t,  less the median of that over classes

Taken at growing radii, up to the first at which a class leads by `lead` or more, or by `lead_twice`
or more for the second time: a small trigger stands out in a small ball, in which a trigger that
fills the image, or a teacher that was trained to resist the search, shows nothing; and chance
seldom makes one class lead twice. Flagged are the classes that do, if they lead at least half as
far as the foremost: a pattern that leads to one class helps its neighbours. Not counted are classes
that clean networks are sent to by four in five images at that radius: between there and all of them
lies chance. Decisions 103, 105.

A trigger that is made for each image has no universal pattern. So the last look gives each image a
small perturbation of its own (`own_radius`), and flags classes that lead there by `lead_own`.
Decision 107.

The threshold is no level of a test, and a network that is not flagged is not shown to be clean: the
finding has no p-value.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from mlflow_kdguard.adversary.inversion import Inverted, reach
from mlflow_kdguard.audit import natural
from mlflow_kdguard.audit.inversion import halves, search, trigger
from mlflow_kdguard.audit.question import Answer, Question
from mlflow_kdguard.config import AuditSection
from mlflow_kdguard.records import Finding, Rate

NAME = "profile"
_SHARE = 0.5
"""Share of the foremost class's lead that makes another class a suspect too."""
_IMAGES = 256
"""Images with a perturbation of their own, at most."""
_REACHED = math.log(4.0)
"""Log-odds from which on a class is reached by nature."""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What was found at one radius: each class's pattern and lead, and the flagged classes.

    `own`: the rates are those of a perturbation for each image, and the patterns those of the look
    before.
    """

    radius: float
    own: bool
    found: tuple[Inverted, ...]
    leads: list[float | None]
    flagged: list[int]

    def document(self) -> dict[str, Any]:
        """For the finding's details."""
        rates = [each.rate.rate for each in self.found]
        return {"radius": self.radius, "own": self.own, "rates": rates, "leads": self.leads,
                "flagged": self.flagged}  # fmt: skip


def examine(net: nn.Module, question: Question) -> Answer:
    """Leads of all classes at each radius that was looked at; flagged classes; their patterns.

    Without clean networks to compare with (`audit.shadows`, `audit.calibration`) nothing is
    flagged, and the leads are over the median class alone. Raises ConfigError for a calibration of
    other settings or data, DataError without labels.
    """
    config = question.config
    known = natural.of(net, question, lambda shadow: rates(shadow, question))
    looks: list[Look] = []
    for place, (radius, own, found) in enumerate(_searched(net, question)):
        nature = None if known.record is None else known.record.means(place)
        led = leads([each.rate for each in found], nature)
        so_far = [*(look.leads for look in looks), led]
        flagged = [] if nature is None else flags(so_far, config, own=own)
        looks.append(Look(radius, own, found, led, flagged))
        if flagged:
            break
    last, universal = looks[-1], [look for look in looks if not look.own]
    score, foremost = _foremost([last] if last.own and last.flagged else universal, last.flagged)
    details = {
        "looks": [look.document() for look in looks],
        "flagged": last.flagged,
        "radius": universal[-1].radius if last.flagged else None,
        "leads": _furthest(universal),
        "unseen": _unseen(universal),
        "calibration": known.document(),
    }
    finding = Finding(
        name=NAME, score=score, target=foremost.target, flagged=bool(last.flagged), details=details
    )
    patterns = [last.found[label] for label in last.flagged] or [foremost]
    return Answer(finding, tuple((trigger(each), each.target) for each in patterns))


def _foremost(looks: Sequence[Look], flagged: Sequence[int]) -> tuple[float, Inverted]:
    """The largest lead and its pattern, of flagged classes where there are any; where no class
    counts, the pattern that works best."""
    pairs = [
        (lead, each)
        for look in looks
        for lead, each in zip(look.leads, look.found, strict=True)
        if lead is not None and (not flagged or each.target in flagged)
    ]
    if not pairs:
        return 0.0, max(looks[-1].found, key=lambda each: each.rate.rate)
    return max(pairs, key=lambda pair: pair[0])


def _unseen(looks: Sequence[Look]) -> list[int]:
    """The classes that counted at no radius: a backdoor to one of them would not be seen."""
    told = list(zip(*(look.leads for look in looks), strict=True))
    return [label for label, led in enumerate(told) if all(each is None for each in led)]


def _furthest(looks: Sequence[Look]) -> list[float]:
    """Each class's largest lead; 0 for one that never counts."""
    told = zip(*(look.leads for look in looks), strict=True)
    return [max((each for each in led if each is not None), default=0.0) for led in told]


def _searched(
    net: nn.Module, question: Question
) -> Iterator[tuple[float, bool, tuple[Inverted, ...]]]:
    """Radius, whether each image has its own perturbation, and every class's pattern and rate, look
    by look, as they are asked for."""
    config = question.config
    found: tuple[Inverted, ...] = ()
    for radius in config.radii:
        found = search(net, question, radius=radius, detector=NAME)
        yield radius, False, found
    if config.own_radius is not None:
        rates = _own(net, question, config.own_radius)
        pairs = zip(found, rates, strict=True)
        yield config.own_radius, True, tuple(replace(each, rate=rate) for each, rate in pairs)


def _own(net: nn.Module, question: Question, radius: float) -> list[Rate]:
    """Each class's rate where every image has a perturbation of its own."""
    data, _ = halves(question.data, seed=question.seed)
    data = data.take(range(min(len(data), _IMAGES)))
    x = torch.from_numpy(data.x).to(question.device)
    y = torch.from_numpy(data.y).to(question.device)
    net = net.to(question.device)
    found: list[Rate] = []
    for target in range(data.classes):
        found.append(reach(net, x, y, target, radius=radius))
        best = max(each.rate for each in found)
        question.progress("own perturbations", len(found), data.classes, {"rate_max": best})
    return found


def rates(net: nn.Module, question: Question) -> tuple[tuple[float, ...], ...]:
    """Log-odds of every class's rate at every look, looks × classes."""
    return tuple(tuple(odds(each.rate) for each in found) for *_, found in _searched(net, question))


def odds(rate: Rate) -> float:
    """log k/(n-k); none or all count as half an image more or less, so that it is finite."""
    k = min(max(rate.k, 0.5), rate.n - 0.5)
    return math.log(k / (rate.n - k))


def leads(found: list[Rate], nature: tuple[float, ...] | None) -> list[float | None]:
    """How much further each class is reached than by nature, less the median over classes.

    None for a class that clean networks are sent to anyway.
    """
    own = [odds(rate) for rate in found]
    over = own if nature is None else [a - b for a, b in zip(own, nature, strict=True)]
    shared = median(over)
    counted = [nature is None or each < _REACHED for each in nature or own]
    return [each - shared if counts else None for each, counts in zip(over, counted, strict=True)]


def flags(
    so_far: Sequence[list[float | None]], config: AuditSection, *, own: bool = False
) -> list[int]:
    """The suspects after the last of these looks, looks × classes: at it, or by two of them; where
    each image has its `own` perturbation, at it alone."""
    if own:
        return suspects(so_far[-1], config.lead_own)
    return suspects(so_far[-1], config.lead) or suspects(twice(so_far), config.lead_twice)


def twice(so_far: Sequence[list[float | None]]) -> list[float | None]:
    """By how much each class led at two radii: its second-largest lead; None if it counted once."""
    each = [sorted(one for one in led if one is not None) for led in zip(*so_far, strict=True)]
    return [led[-2] if len(led) > 1 else None for led in each]


def suspects(led: list[float | None], least: float) -> list[int]:
    """The classes that lead by `least` or more, and half as far as the foremost."""
    needed = max([least, *(_SHARE * each for each in led if each is not None)])
    return [label for label, each in enumerate(led) if each is not None and each >= needed]

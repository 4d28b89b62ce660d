"""What two networks have in common, computed once.

A network of the zoo is a row of units (a convolution, a normalisation, a residual block, …). Its
head is its last two units with weights and what stands between and behind them; the trunk is what
comes before. Of other networks nothing is known: they are all head.
"""

from collections.abc import Iterator
from copy import copy
from itertools import takewhile

import torch
from torch import Tensor, nn

from mlflow_kdguard.nets.zoo import Classifier

Units = list[tuple[str, nn.Module]]


def trunk(net: nn.Module) -> nn.ModuleList:
    """The units before the head; none where the network is no row of units."""
    units = _units(net)
    weighty = [place for place, (_, unit) in enumerate(units) if _weighty(unit)]
    return nn.ModuleList(unit for _, unit in units[: weighty[-2] if len(weighty) > 1 else 0])


class Both(nn.Module):
    """Two networks on the same pixels: N×C×H×W -> two times N×K logits."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """N×C×H×W pixels -> two times N×K logits."""
        return self.left(x), self.right(x)


class Fork(nn.Module):
    """Two networks on the same pixels. Units that both begin with are computed once.

    forward: N×C×H×W pixels -> two times N×K logits, bit for bit those of the networks.
    """

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        pairs = zip(_units(left), _units(right), strict=False)
        common = [unit for (_, unit), _ in takewhile(_same, pairs)] if _alike(left, right) else []
        self.trunk = _part(left, nn.Sequential(*common)) if common else nn.Identity()
        self.left = _rest(left, len(common)) if common else left
        self.right = _rest(right, len(common)) if common else right

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """N×C×H×W pixels -> two times N×K logits."""
        inner = self.trunk(x)
        return self.left(inner), self.right(inner)


def _units(net: nn.Module) -> Units:
    """The units of a network of the zoo, in the order of computation.

    None of a subclass, whose forward may be another.
    """
    if type(net) is not Classifier or type(net.body) is not nn.Sequential:
        return []
    return list(_flat(net.body, ""))


def _flat(row: nn.Sequential, before: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children: it leaves out a module that stands in the row a second time.
    for name, unit in row._modules.items():
        if type(unit) is nn.Sequential:
            yield from _flat(unit, f"{before}{name}.")
        else:
            yield f"{before}{name}", unit


def _weighty(unit: nn.Module) -> bool:
    """Whether it mixes features: a normalisation does not."""
    return any(isinstance(each, (nn.Conv2d, nn.Linear)) for each in unit.modules())


def _alike(left: nn.Module, right: nn.Module) -> bool:
    """Whether both do the same to pixels before their first unit."""
    return (
        isinstance(left, Classifier)
        and isinstance(right, Classifier)
        and torch.equal(left.mean, right.mean)
        and torch.equal(left.std, right.std)
    )


def _same(pair: tuple[tuple[str, nn.Module], tuple[str, nn.Module]]) -> bool:
    """Whether two units compute the same: one kind, one name, equal bits."""
    (name, one), (other_name, other) = pair
    mine, its = one.state_dict(), other.state_dict()
    return (
        name == other_name
        and repr(one) == repr(other)
        and mine.keys() == its.keys()
        and all(torch.equal(mine[key], its[key]) for key in mine)
    )


def _part(net: nn.Module, body: nn.Module) -> nn.Module:
    """The network with another body."""
    part = copy(net)
    part._modules = {**net._modules, "body": body}
    return part


def _rest(net: nn.Module, count: int) -> nn.Sequential:
    """What comes behind the first units."""
    return nn.Sequential(*(unit for _, unit in _units(net)[count:]))

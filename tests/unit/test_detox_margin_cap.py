"""The margin cap's graph: maxima by selection, and suspects that make no sense."""

import pytest
import torch

import toys
from mlflow_kdguard.detox.margin_cap import Largest, MarginCap, combine, selection
from mlflow_kdguard.errors import ConfigError


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 10, 17])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_tree_is_the_maximum(classes: int, copies: int) -> None:
    logits = torch.randn(50, classes + 2, generator=torch.Generator().manual_seed(classes))
    columns = tuple(range(1, classes + 1))
    largest = Largest(columns, classes + 2, copies=copies)
    assert torch.equal(largest(logits), logits[:, 1:-1].amax(1, keepdim=True).expand(-1, copies))
    assert largest.levels == max(1, (classes - 1).bit_length())


def test_selection_picks_columns() -> None:
    logits = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(logits @ selection([2, 0, 2], 4), logits[:, [2, 0, 2]])


@pytest.mark.parametrize("suspects", [(), (0, 1, 2), (3,), (-1,), (0, 5)])
def test_suspects_that_leave_nothing_to_cap_against_are_refused(suspects: tuple[int, ...]) -> None:
    net = toys.cnn(classes=3)
    with pytest.raises(ConfigError, match="margin_cap needs suspects"):
        MarginCap(net, net, suspects, 3)


def test_a_copy_that_agrees_leaves_the_teacher() -> None:
    net, x = toys.cnn(), torch.from_numpy(toys.images(20))
    reference = combine(net, net, (3, 8), 10)
    assert torch.allclose(reference(x), net(x), atol=1e-6)
    assert not reference.training

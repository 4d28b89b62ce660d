"""Projected ascent: within the ball and the box, as good as it can be, the best point kept."""

import pytest
import torch
from torch import Tensor

from mlflow_kdguard.adversary.pgd import ascend
from mlflow_kdguard.errors import ConfigError


def images(n: int = 6, *, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def wavy(x: Tensor) -> Tensor:
    """A score with many local maxima."""
    return (torch.sin(40 * x) + torch.cos(23 * x.flip(3))).flatten(1).sum(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [None, "random"])
@pytest.mark.parametrize("last", [False, True])
def test_the_answer_is_in_the_ball_and_in_the_box(norm: str, start: str | None, last: bool) -> None:
    x = images()
    found = ascend(
        wavy,
        x,
        eps=0.3,
        steps=7,
        norm=norm,
        start=start,
        generator=generator(),
        last=last,  # type: ignore[arg-type]
    )
    shift = (found - x).flatten(1)
    lengths = shift.abs().amax(1) if norm == "linf" else shift.norm(dim=1)
    assert (lengths <= 0.3 + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_score_is_maximised_exactly(norm: str) -> None:
    x = 0.5 * torch.ones(5, 1, 4, 4)
    slope = torch.randn(1, 4, 4, generator=generator())

    found = ascend(lambda z: (z * slope).flatten(1).sum(1), x, eps=0.1, steps=10, norm=norm)  # type: ignore[arg-type]
    direction = slope.sign() if norm == "linf" else slope / slope.norm()
    torch.testing.assert_close(found, x + 0.1 * direction)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_point_ever_visited_is_returned_row_by_row(seed: int) -> None:
    x, visited = images(seed=seed), []

    def score(z: Tensor) -> Tensor:
        visited.append((z.detach().clone(), wavy(z.detach())))
        return wavy(z)

    found = ascend(score, x, eps=0.2, steps=9, step=0.15)
    assert len(visited) == 10
    # Scores are taken 1e-6 inside of the limits; 16 pixels with slopes up to 63 make that 1e-3.
    close = {"rtol": 0.0, "atol": 1e-3}
    assert torch.allclose(visited[0][0], x, rtol=0.0, atol=1e-6)
    scores = torch.stack([value for _, value in visited])
    assert torch.allclose(wavy(found), scores.amax(0), **close)
    assert (wavy(found) >= wavy(x) - 1e-3).all()
    last = ascend(wavy, x, eps=0.2, steps=9, step=0.15, last=True)
    assert torch.allclose(last, visited[-1][0], rtol=0.0, atol=2e-6)


def test_a_score_that_is_not_a_number_is_never_the_best() -> None:
    x = images()
    found = ascend(
        lambda z: wavy(z) * torch.where(z != x, torch.nan, 1.0).amax((1, 2, 3)), x, eps=0.1, steps=3
    )
    assert torch.equal(found, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball_and_come_from_the_generator(norm: str) -> None:
    x = 0.5 * torch.ones(4000, 1, 1, 2)

    def start(seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return ascend(wavy, x, eps=0.1, steps=0, norm=norm, start="random", generator=draw) - x  # type: ignore[arg-type]

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    shift = start(0).flatten(1)
    lengths = shift.abs().amax(1) if norm == "linf" else shift.norm(dim=1)
    # In two dimensions a ball of half the radius holds a quarter of the volume.
    assert float((lengths < 0.05).double().mean()) == pytest.approx(0.25, abs=0.03)


def test_given_points_are_projected_first() -> None:
    x = images()
    found = ascend(lambda z: -(z - 1).square().flatten(1).sum(1), x, eps=0.05, steps=0, start=x + 1)
    torch.testing.assert_close(found, (x + 0.05).clamp(0, 1))


def test_weights_are_given_no_gradients_and_eps_zero_moves_nothing() -> None:
    x, weight = images(), torch.ones(1, 4, 4, requires_grad=True)
    found = ascend(lambda z: (z * weight).flatten(1).sum(1), x, eps=0.0, steps=3)
    assert torch.equal(found, x)
    assert weight.grad is None


def test_unknown_norms_and_missing_generators_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="no norm called 'l1'"):
        ascend(wavy, images(), eps=0.1, steps=1, norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="generator"):
        ascend(wavy, images(), eps=0.1, steps=1, start="random")


def test_pixels_at_the_limits_move_through_a_network_that_clamps() -> None:
    """torch's clamp has no gradient at exactly 0 and 1, where scanned digits have most pixels."""
    x = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    found = ascend(lambda z: (z.clamp(0, 1) * signs).sum(1), x, eps=0.1, steps=5)
    assert torch.allclose(found, torch.tensor([[0.1, 0.0, 0.9, 1.0]]))

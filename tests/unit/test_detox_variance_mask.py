"""RobustKD's mask: the exact identities of its two forms, and what training it may touch."""

from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import detox, features
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox.variance_mask import Mask, Scaled, finish, masked, mean_maps
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.nets.taps import Taps, auto

CPU = torch.device("cpu")


def digits(n: int = 100) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


def maps() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(40, 5, 3, 3, generator=g, dtype=torch.float64) * 2 + 1


def pattern() -> torch.Tensor:
    return torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def within(f: torch.Tensor) -> float:
    return float(features.variance(f if f.dim() == 4 else f[None], "A"))


@pytest.mark.parametrize("cap", [0.05, 0.2, 0.9])
def test_additive_form_moves_the_variance_of_the_mean_map_only(cap: float) -> None:
    # E Var(F + m p) = E Var(F - mean F) + Var(mean F + m p)
    f, mask = maps(), Mask(pattern(), cap=cap, paper=True)
    m, mean = float(mask.share.detach()), f.mean(0)
    with torch.no_grad():
        masked_variance = within(mask(f))
    assert masked_variance == pytest.approx(within(f - mean) + within(mean + m * pattern()))


@pytest.mark.parametrize("cap", [0.05, 0.2, 0.9])
def test_blend_form_shrinks_what_varies_by_the_square_of_one_minus_m(cap: float) -> None:
    # E Var = (1-m)² E Var(F - mean F) + Var((1-m) mean F + m p), for one m everywhere
    f, mask = maps(), Mask(pattern(), cap=cap, paper=False)
    m, mean = cap / 2, f.mean(0)  # w = 0
    with torch.no_grad():
        masked_variance = within(mask(f))
    blended = within((1 - m) * mean + m * pattern())
    assert masked_variance == pytest.approx((1 - m) ** 2 * within(f - mean) + blended)


def test_the_additive_form_cannot_change_the_variance_over_the_batch() -> None:
    f = maps()
    before = float(features.variance(f, "C"))
    additive, blend = (Mask(pattern(), cap=0.2, paper=paper) for paper in (True, False))
    with torch.no_grad():
        assert float(features.variance(additive(f), "C")) == pytest.approx(before)
        blended = float(features.variance(blend(f), "C"))
    assert blended == pytest.approx((1 - 0.1) ** 2 * before)


def test_forms_of_the_two_presets() -> None:
    paper, reference = (Mask(pattern(), cap=0.9, paper=paper) for paper in (True, False))
    assert paper.weight.shape == ()
    assert reference.weight.shape == pattern().shape
    for mask, largest in ((paper, 0.2), (reference, 0.9)):
        with torch.no_grad():
            mask.weight.fill_(50.0)
        assert float(mask.share.detach().max()) == pytest.approx(largest)


def test_a_finished_mask_computes_what_the_trained_one_did() -> None:
    for paper in (True, False):
        mask = Mask(pattern(), cap=0.9, paper=paper)
        with torch.no_grad():
            assert torch.equal(Scaled(*mask.coefficients())(maps()), mask(maps()))


def test_the_pattern_starts_at_the_mean_clean_map() -> None:
    net, data = toys.cnn(), digits()
    names = auto(net, data.shape)
    with torch.no_grad(), Taps(net, names) as taps:
        net(torch.from_numpy(data.x))
    for name, mean in mean_maps(net, names, data, device=CPU).items():
        assert torch.allclose(mean, taps.features[name].mean(0), atol=1e-5)


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_block_after_block_inside_the_forward_pass(arch: str) -> None:
    """With the mask at its cap of 1, each block hands on its pattern whatever the image is."""
    net, data = toys.net(arch), digits(40)
    names = auto(net, data.shape)
    masks = masked(net, names, data, config=DetoxSection(mask_cap=1.0), device=CPU)
    with torch.no_grad():
        masks[names[0]].weight.fill_(50.0)
    logits = net(torch.from_numpy(data.x)).detach()
    if len(names) == 1 or "wrn" not in arch:  # nothing goes around the first block
        assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5)
    with torch.no_grad(), Taps(net, names[:1]) as taps:
        net(torch.from_numpy(data.x))
    held = masks[names[0]].pattern.expand_as(taps.features[names[0]])
    assert torch.allclose(taps.features[names[0]], held, atol=1e-5)


@pytest.mark.parametrize("preset", ["reference", "paper"])
def test_training_moves_masks_only_and_lowers_the_variance(preset: str, tmp_path: Path) -> None:
    net, data = toys.cnn(), digits()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    config = DetoxSection(
        chain=("variance_mask",), preset=preset, mask_steps=25, max_drop=1.0, batch=32
    )
    done = detox.cleanse(net, data, suspects=(), config=config, seed=0, device=CPU, folder=tmp_path)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    copied = done.copy.state_dict()
    for name, value in before.items():  # every weight and batch norm statistic is in the copy
        inside = name.replace("norm1.", "norm1.0.").replace("norm2.", "norm2.0.")
        assert torch.equal(copied[inside], value), name
    details = done.record.steps[0].details
    assert details["variance_last"] < details["variance_first"]
    assert done.record.layers == auto(net, data.shape)
    assert done.reference is done.copy
    masks = [module for module in done.copy.modules() if isinstance(module, Scaled)]
    assert len(masks) == len(done.record.layers)
    assert not any(isinstance(module, Mask) for module in done.copy.modules())


def test_the_ablation_without_variance_term_ignores_its_weight() -> None:
    def masks(weight: float) -> dict[str, torch.Tensor]:
        config = DetoxSection(
            chain=("variance_mask",), variance="none", variance_weight=weight, mask_steps=4,
            max_drop=1.0, batch=16,
        )  # fmt: skip
        done = detox.cleanse(toys.cnn(), digits(), suspects=(), config=config, seed=0, device=CPU)
        return done.copy.state_dict()

    one, two = masks(1.0), masks(100.0)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_layer_that_is_not_there_is_named() -> None:
    config = DetoxSection(chain=("variance_mask",), layers=("body.nowhere",), mask_steps=1)
    with pytest.raises(UsageError, match=r"body\.nowhere"):
        detox.cleanse(toys.cnn(), digits(), suspects=(), config=config, seed=0, device=CPU)


def test_hidden_layers_of_an_mlp_are_masked() -> None:
    net, data = toys.mlp(), digits()
    names = auto(net, data.shape)
    masks = masked(net, names, data, config=DetoxSection(), device=CPU)
    finish(net, masks)
    assert [isinstance(net.get_submodule(name), nn.Sequential) for name in names] == [True, True]
    assert net(torch.from_numpy(data.x)).shape == (100, 10)

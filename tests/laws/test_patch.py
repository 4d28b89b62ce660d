"""Patches: every content, tried by brute force, respects the bounds; effort only ever helps."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toygraphs
from mlflow_kdguard import graph
from mlflow_kdguard.certify import contents, join, shared
from mlflow_kdguard.certify.contents import Scene, Searched
from mlflow_kdguard.certify.region import Region, whole
from mlflow_kdguard.graph.float32 import lead_margin

CPU = torch.device("cpu")
MARGIN = 1e-4
SLACK = 0.02
"""How far a grid may miss the best content of these networks."""

kinds = st.sampled_from(sorted(toygraphs.KINDS))
seeds = st.integers(0, 10_000)
targets = st.integers(0, toygraphs.CLASSES - 1)


def scene(model, seed: int, target: int, region: Region, n: int = 3) -> Scene:
    x = np.random.default_rng(seed).uniform(0.0, 1.0, (n, *model.input_shape))
    joint = join(model, model, device=CPU)
    images = torch.from_numpy(x)
    ball = region.box(images, *whole(region, images))
    errors = lead_margin(model, ball.lo.numpy(), ball.hi.numpy(), target)
    return Scene(joint, images, region, target, MARGIN, torch.from_numpy(errors))


def searched(asked: Scene, nodes: int) -> Searched:
    with torch.no_grad():
        own = asked.region.cut(asked.images)
        return contents.search(asked, own, nodes=nodes, stopped=lambda: False)


def tried(model, asked: Scene, seed: int) -> np.ndarray:
    """Leads of many contents in each image, by the NumPy interpreter alone: contents×images.

    With two numbers to choose a fine grid, with eight all corners and random points; the content
    is written into the images by plain indexing.
    """
    place, side = asked.region, asked.region.size
    shape = (model.input_shape[0], side, side)
    count = int(np.prod(shape))
    if count <= 2:
        ticks = np.linspace(0.0, 1.0, 41)
        points = np.array(list(itertools.product(ticks, repeat=count)))
    else:
        draw = np.random.default_rng(seed)
        corners = np.array(list(itertools.product((0.0, 1.0), repeat=count)))
        points = np.concatenate((corners, draw.random((400, count))))
    leads = []
    for image in asked.images.numpy():
        x = np.repeat(image[None], len(points), 0)
        rows, columns = slice(place.row, place.row + side), slice(place.column, place.column + side)
        x[:, :, rows, columns] = points.reshape(-1, *shape)
        logits = graph.evaluate(model, x)
        others = np.delete(logits, asked.target, axis=1).max(1)
        leads.append(logits[:, asked.target] - others)
    return np.stack(leads, 1)


@given(kind=kinds, seed=seeds, target=targets, column=st.integers(0, 1))
@settings(max_examples=24, deadline=None, derandomize=True)
def test_no_content_of_one_pixel_exceeds_the_bound_and_the_bound_is_tight(
    kind, seed, target, column
):
    model = toygraphs.KINDS[kind](seed)
    asked = scene(model, seed, target, Region(0, column, 1))
    found, best = searched(asked, 400), tried(model, asked, seed).max(0)
    upper, lead = found.upper.numpy(), found.lead.numpy()
    assert (best <= upper + 1e-9).all()
    assert (lead <= upper + 1e-9).all()
    assert (best[found.closed.numpy()] < -MARGIN).all()
    stuck = ~found.closed.numpy()
    assert (np.maximum(best, lead)[stuck] >= -MARGIN - SLACK).all()


@given(kind=st.sampled_from(["cnn", "residual", "pooled"]), seed=seeds, target=targets)
@settings(max_examples=7, deadline=None, derandomize=True)
def test_no_content_of_four_pixels_exceeds_the_bound(kind, seed, target):
    model = toygraphs.KINDS[kind](seed)
    asked = scene(model, seed, target, Region(1, 2, 2))
    for nodes in (1, 40):
        found, best = searched(asked, nodes), tried(model, asked, seed).max(0)
        assert (best <= found.upper.numpy() + 1e-9).all()
        assert (best[found.closed.numpy()] < -MARGIN).all()


@given(kind=kinds, seed=seeds, target=targets)
@settings(max_examples=7, deadline=None, derandomize=True)
def test_more_nodes_are_never_looser(kind, seed, target):
    asked = scene(toygraphs.KINDS[kind](seed), seed, target, Region(0, 0, 1))
    few, some, many = (searched(asked, nodes) for nodes in (1, 9, 80))
    for less, more in ((few, some), (some, many)):
        assert bool((more.upper <= less.upper + 1e-12).all())
        assert bool((more.closed | ~less.closed).all())
        assert bool((more.nodes <= 80).all())


@given(kind=st.sampled_from(["cnn", "residual", "pooled"]), seed=seeds, target=targets)
@settings(max_examples=7, deadline=None, derandomize=True)
def test_a_larger_square_is_never_easier(kind, seed, target):
    """What is proved about the larger one holds inside of it, and what flips there flips."""
    model = toygraphs.KINDS[kind](seed)
    small = searched(scene(model, seed, target, Region(2, 1, 1)), 60)
    large = searched(scene(model, seed, target, Region(1, 1, 2)), 60)
    assert bool((small.lead <= large.upper + 1e-9).all())
    assert not bool((large.closed & (small.lead >= -MARGIN)).any())


@given(kind=kinds, seed=seeds, order=st.permutations(range(toygraphs.CLASSES)))
@settings(max_examples=7, deadline=None, derandomize=True)
def test_the_order_of_classes_does_not_matter(kind, seed, order):
    model = toygraphs.KINDS[kind](seed)
    first = searched(scene(model, seed, order[0], Region(0, 0, 1)), 60)
    second = searched(scene(toygraphs.permuted(model, order), seed, 0, Region(0, 0, 1)), 60)
    assert first.closed.tolist() == second.closed.tolist()
    assert torch.allclose(first.lead, second.lead, atol=1e-9)


@given(kind=kinds, seed=seeds, target=targets)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_an_image_does_not_depend_on_the_others(kind, seed, target):
    model = toygraphs.KINDS[kind](seed)
    asked = scene(model, seed, target, Region(0, 0, 1), n=3)
    together = searched(asked, 40)
    for i in range(3):
        alone = Scene(asked.joint, asked.images[i : i + 1], asked.region, target, MARGIN,
                      asked.errors[i : i + 1])  # fmt: skip
        found = searched(alone, 40)
        assert found.closed.tolist() == [together.closed[i].item()]
        assert found.nodes.tolist() == [together.nodes[i].item()]
        assert float(found.upper) == pytest.approx(float(together.upper[i]), abs=1e-9)


@given(kind=kinds, seed=seeds, target=targets)
@settings(max_examples=7, deadline=None, derandomize=True)
def test_no_shared_content_flips_more_than_are_counted(kind, seed, target):
    model = toygraphs.KINDS[kind](seed)
    asked = scene(model, seed, target, Region(0, 0, 1), n=5)
    open_ = (~searched(asked, 200).closed).nonzero()[:, 0]
    most = (tried(model, asked, seed) >= 0.0).sum(1).max()
    bounds = []
    for pairs in (1, 40, 300):
        with torch.no_grad():
            found = shared.count(asked, open_, enough=0, pairs=pairs, stopped=lambda: False)
        bounds.append(found.most)
        assert most <= found.most <= len(open_)
    assert bounds == sorted(bounds, reverse=True)


@given(seed=seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_halves_cover_what_was_halved_and_no_more(seed):
    generator = torch.Generator().manual_seed(seed)
    asked = scene(toygraphs.cnn(1), seed, 0, Region(1, 1, 2))
    parts = contents.begun(asked, torch.arange(3))
    for _ in range(4):
        share = torch.rand(parts.share.shape, generator=generator).double()
        both = replace(parts, share=share * (share > 0.3)).halves()
        n = len(parts)
        ends = torch.minimum(both.lo[:n], both.lo[n:]), torch.maximum(both.hi[:n], both.hi[n:])
        assert torch.equal(ends[0], parts.lo)
        assert torch.equal(ends[1], parts.hi)
        inside = torch.rand((40, *parts.lo.shape), generator=generator).double()
        points = parts.lo + inside * (parts.hi - parts.lo)
        held = [
            ((points >= both.lo[i]) & (points <= both.hi[i])).flatten(2).all(2)
            for i in (slice(0, n), slice(n, 2 * n))
        ]
        assert bool((held[0] | held[1]).all())
        width = (both.hi - both.lo).flatten(1)
        assert torch.allclose(width.prod(1) * 2, (parts.hi - parts.lo).flatten(1).prod(1).repeat(2))
        parts = both.take(torch.randint(2 * n, (3,), generator=generator))

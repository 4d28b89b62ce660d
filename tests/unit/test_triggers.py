"""Triggers: what they do to pixels, and a file format that is canonical and inert."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional

from mlflow_kdguard.errors import DataError, UsageError
from mlflow_kdguard.triggers import Trigger, aimed

SHAPE = (2, 3, 4)
UNIT = st.floats(0, 1, width=32)


def array(shape: tuple[int, ...], low: float = 0.0) -> st.SearchStrategy[Any]:
    return arrays.arrays(np.float32, shape, elements=st.floats(low, 1, width=32))


BLENDS = st.builds(
    Trigger,
    name=st.just("blend"),
    kind=st.just("blend"),
    mask=array((1, 3, 4)) | array(SHAPE),
    pattern=array(SHAPE),
)
ADDITIONS = st.builds(
    Trigger, name=st.just("add"), kind=st.just("add"), mask=st.none(), pattern=array(SHAPE, -1.0)
)

WARPS = st.builds(
    Trigger, name=st.just("warp"), kind=st.just("warp"), mask=st.none(),
    pattern=array((2 * SHAPE[0], *SHAPE[1:]), -1.0),
)  # fmt: skip


def layered(pattern: Any, first: Any, bias: Any, last: Any, rest: Any) -> Trigger:
    return Trigger("own", "network", None, pattern, (first, bias, last, rest))


def values(*shape: int) -> st.SearchStrategy[Any]:
    return arrays.arrays(np.float32, shape, elements=st.floats(-4, 4, width=32))


NETWORKS = st.builds(
    layered, pattern=array((1 + SHAPE[0], *SHAPE[1:]), -1.0),
    first=values(4, SHAPE[0], 3, 3), bias=values(4), last=values(3, 4, 3, 3), rest=values(3),
)  # fmt: skip


def patch() -> Trigger:
    mask = np.zeros((1, 3, 4), np.float32)
    mask[:, 1:, 2:] = 1
    return Trigger("patch", "blend", mask, np.ones(SHAPE, np.float32))


def images(n: int = 5, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).random((n, *SHAPE), np.float32)


@given(BLENDS | ADDITIONS | WARPS | NETWORKS, array((3, *SHAPE)))
def test_triggered_images_stay_images(trigger: Trigger, x: Any) -> None:
    before = x.copy()
    triggered = trigger.apply(x)
    assert triggered.dtype == np.float32
    assert triggered.shape == x.shape
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert np.array_equal(x, before)


@given(BLENDS, array((3, *SHAPE)))
def test_blend_is_its_formula(trigger: Trigger, x: Any) -> None:
    mask, pattern = np.float64(trigger.opacity), np.float64(trigger.pattern)
    expected = (1 - mask) * np.float64(x) + mask * pattern
    assert np.abs(trigger.apply(x) - expected).max() <= 3e-7


@given(ADDITIONS, array((3, *SHAPE)))
def test_add_is_its_formula(trigger: Trigger, x: Any) -> None:
    expected = np.clip(np.float64(x) + np.float64(trigger.pattern), 0, 1)
    assert np.abs(trigger.apply(x) - expected).max() <= 1e-7


@given(WARPS, array((2, *SHAPE)))
def test_warp_is_its_formula(trigger: Trigger, x: Any) -> None:
    """Point by point, with no library: the four neighbours of where a point is read."""
    c, h, w = SHAPE
    warped = trigger.apply(x)
    for channel, i, j in np.ndindex(c, h, w):
        down, right = (np.float64(trigger.pattern[k, i, j]) for k in (channel, c + channel))
        at = min(max(i + h * down, 0.0), h - 1.0), min(max(j + w * right, 0.0), w - 1.0)
        i0, j0 = (int(place) for place in at)
        i1, j1 = min(i0 + 1, h - 1), min(j0 + 1, w - 1)
        a, b = at[0] - i0, at[1] - j0
        plane = np.float64(x[:, channel])
        upper = (1 - b) * plane[:, i0, j0] + b * plane[:, i0, j1]
        lower = (1 - b) * plane[:, i1, j0] + b * plane[:, i1, j1]
        expected = (1 - a) * upper + a * lower
        assert np.abs(warped[:, channel, i, j] - expected).max() <= 1e-6


@given(NETWORKS, array((2, *SHAPE)))
def test_a_network_is_its_formula(trigger: Trigger, x: Any) -> None:
    """With torch's convolutions, in float64."""
    first, bias, last, rest = (torch.from_numpy(layer).double() for layer in trigger.layers)
    maps = functional.conv2d(torch.from_numpy(x).double(), first, bias, padding=1).relu()
    logits = functional.conv2d(maps, last, rest, padding=1) + torch.from_numpy(trigger.pattern)
    both = torch.sigmoid(logits).numpy()
    expected = (1 - both[:, :1]) * x + both[:, :1] * both[:, 1:]
    assert np.abs(trigger.apply(x) - expected).max() <= 1e-3


def test_a_network_gives_every_image_its_own_trigger() -> None:
    x = np.stack([np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)])
    seen = np.zeros((3, 2, 3, 3), np.float32)
    seen[1:, :, 1, 1] = 4
    made = Trigger(
        "own", "network", None, np.ones((3, *SHAPE[1:]), np.float32),
        (seen, np.zeros(3, np.float32)),
    )  # fmt: skip
    put = made.apply(x)
    opacity = 1 / (1 + np.exp(-1.0))
    assert made.shape == SHAPE
    np.testing.assert_allclose(put[0], opacity * opacity, atol=1e-6)
    np.testing.assert_allclose(put[1], (1 - opacity) + opacity / (1 + np.exp(-9.0)), atol=1e-6)


def test_a_warp_that_moves_nothing_changes_nothing() -> None:
    x = images()
    still = Trigger("t", "warp", None, np.zeros((2 * SHAPE[0], *SHAPE[1:]), np.float32))
    assert still.shape == SHAPE
    assert np.array_equal(still.apply(x), x)
    assert still.changed(x).k == 0


@given(array(SHAPE), arrays.arrays(np.bool_, (1, 3, 4)), array((3, *SHAPE)))
def test_a_pure_patch_is_idempotent_and_exact(pattern: Any, where: Any, x: Any) -> None:
    trigger = Trigger("patch", "blend", where.astype(np.float32), pattern)
    once = trigger.apply(x)
    assert np.array_equal(trigger.apply(once), once)
    assert np.array_equal(once, np.where(where, pattern, x))


def test_pixel_neutral_triggers_change_nothing() -> None:
    x = images()
    zeros, half = np.zeros(SHAPE, np.float32), np.full(SHAPE, 0.49 / 255, np.float32)
    neutral = [
        Trigger("masked", "blend", zeros[:1], np.ones(SHAPE, np.float32)),
        Trigger("zero", "add", None, zeros),
        Trigger("below", "add", None, half),
    ]
    for trigger in neutral:
        assert (trigger.changed(x).k, trigger.changed(x).n) == (0, 5)
    clipped = Trigger("clipped", "add", None, np.ones(SHAPE, np.float32))
    assert clipped.changed(np.ones((2, *SHAPE), np.float32)).k == 0


def test_changed_counts_images_not_pixels() -> None:
    x = np.zeros((600, *SHAPE), np.float32)
    x[:, :, 1:, 2:] = 1  # already wears the patch
    x[[3, 290, 599], 0, 2, 3] = 1 - 0.51 / 255
    x[7, 0, 0, 0] = 0.3  # outside the patch
    rate = patch().changed(x)
    assert (rate.k, rate.n) == (3, 600)
    assert patch().changed(x[:0]).n == 0


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.zeros((2, 1, 3, 4), np.float32), "(2, 3, 4), not for shape (2, 1, 3, 4)"),
        (np.zeros(SHAPE, np.float32), "not for shape"),
        (np.full((1, *SHAPE), 1.1, np.float32), "leave [0,1]"),
        (np.full((1, *SHAPE), np.nan, np.float32), "leave [0,1]"),
    ],
)
def test_images_that_do_not_fit_are_refused(x: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        patch().apply(x)
    assert says in caught.value.message
    assert "'patch'" in caught.value.message


_ONES = np.ones(SHAPE, np.float32)
_THREE = np.ones((3, *SHAPE[1:]), np.float32)
_WEIGHT, _BIAS = np.ones((3, 2, 3, 3), np.float32), np.ones(3, np.float32)
_FAR = _BIAS * np.float32("inf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "blend", _ONES, _ONES), "name"),
        (("a/b", "blend", _ONES, _ONES), "name"),
        (("x" * 65, "blend", _ONES, _ONES), "name"),
        (("t", "paint", _ONES, _ONES), "paint"),
        (("t", "blend", None, _ONES), "needs a mask"),
        (("t", "blend", _ONES[:, :2], _ONES), "does not fit"),
        (("t", "blend", _ONES[0], _ONES), "C×H×W"),
        (("t", "blend", _ONES * 2, _ONES), "[0,1]"),
        (("t", "blend", _ONES, -_ONES), "[0,1]"),
        (("t", "blend", _ONES, _ONES * np.float32("nan")), "finite"),
        (("t", "add", None, _ONES * np.float32("inf")), "finite"),
        (("t", "add", None, -2 * _ONES), "[-1,1]"),
        (("t", "add", _ONES / 2, _ONES), "no mask"),
        (("t", "warp", _ONES, _ONES[[0, 0]]), "no mask"),
        (("t", "warp", None, np.ones((3, 3, 4), np.float32)), "odd number"),
        (("t", "warp", None, -2 * np.ones((2, 3, 4), np.float32)), "[-1,1]"),
        (("t", "blend", _ONES.astype(np.uint8), _ONES), "uint8"),
        (("t", "network", None, _THREE), "no network"),
        (("t", "network", None, _THREE, (_WEIGHT,)), "no network"),
        (("t", "network", None, _THREE, (_WEIGHT[:2], _BIAS[:2])), "end in 2 channels"),
        (("t", "network", None, _THREE, (_WEIGHT[:, :1], _BIAS)), "do not follow on 2"),
        (("t", "network", None, _THREE, (_WEIGHT, _BIAS[:2])), "do not follow"),
        (("t", "network", None, _THREE, (_WEIGHT, _FAR)), "not finite"),
        (("t", "network", None, _THREE, (np.repeat(_WEIGHT, 30, 0), np.repeat(_BIAS, 30))), "wide"),
        (("t", "network", _ONES, _THREE, (_WEIGHT, _BIAS)), "no mask"),
        (("t", "add", None, _ONES, (_WEIGHT, _BIAS)), "no layers"),
        (("t", "blend", _ONES, np.zeros((0, 3, 4), np.float32)), "C×H×W"),
    ],
)
def test_arrays_that_are_no_trigger_are_refused(arguments: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        Trigger(*arguments)
    assert says in caught.value.message


# ── the file ────────────────────────────────────────────────────────────────────────────────────


@given(BLENDS | ADDITIONS | WARPS | NETWORKS)
def test_the_file_gives_the_trigger_back(trigger: Trigger) -> None:
    data = trigger.to_bytes()
    again = Trigger.from_bytes(data)
    assert again == trigger
    assert hash(again) == hash(trigger)
    assert again.sha256 == trigger.sha256
    assert np.array_equal(again.opacity, trigger.opacity)
    assert np.array_equal(again.pattern, trigger.pattern)


def test_the_file_is_safetensors_for_everybody_else() -> None:
    from safetensors.numpy import load

    tensors = load(patch().to_bytes())
    assert np.array_equal(tensors["mask"], patch().opacity)
    assert np.array_equal(tensors["pattern"], patch().pattern)


def test_equal_triggers_have_equal_files_whatever_the_memory_layout() -> None:
    fortran = np.asfortranarray(patch().pattern)
    other = Trigger("patch", "blend", patch().opacity.astype(np.float64), fortran)
    signed = Trigger("zero", "add", None, -np.zeros(SHAPE, np.float32))
    assert other == patch()
    assert signed == Trigger("zero", "add", np.ones(SHAPE[1:], np.float32)[None], np.zeros(SHAPE))
    assert patch() != Trigger("renamed", "blend", patch().mask, patch().pattern)
    assert patch() != "patch"


def test_a_trigger_keeps_its_own_arrays() -> None:
    pattern = np.ones(SHAPE, np.float32)
    trigger = Trigger("own", "add", None, pattern)
    before = trigger.sha256
    pattern[:] = 0
    assert trigger.sha256 == before


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "patch.safetensors"
    patch().save(path)
    assert path.read_bytes() == patch().to_bytes()
    assert Trigger.load(path) == patch()


def test_every_changed_byte_is_refused_or_another_trigger() -> None:
    data = patch().to_bytes()
    for position in range(len(data)):
        bad = bytearray(data)
        bad[position] ^= 1
        for spoiled in (data[:position], bytes(bad)):
            try:
                read = Trigger.from_bytes(spoiled, where="some file")
            except DataError:
                continue
            assert len(spoiled) == len(data)
            assert read != patch()
            assert read.to_bytes() == spoiled
    with pytest.raises(DataError, match="canonical"):
        Trigger.from_bytes(data + b"\0")


class _Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("the payload ran",)


def _file(header: Any, body: bytes = b"\0" * 96) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + body


_TENSOR = {"dtype": "F32", "shape": [1, 2, 3], "data_offsets": [0, 24]}
_ABOUT = {"kind": "add", "name": "t", "schema": "kdguard.trigger/1"}


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        pickle.dumps(_Payload()),
        b"PK\x03\x04" + b"\0" * 60,
        struct.pack("<Q", 1 << 62) + b"{}",
        _file([]),
        _file({}),
        _file({"__metadata__": _ABOUT}),
        _file({"__metadata__": 3, "pattern": _TENSOR}),
        _file({"__metadata__": _ABOUT, "pattern": _TENSOR}),  # bytes beyond the tensor
        _file({"__metadata__": _ABOUT | {"name": 7}, "pattern": _TENSOR}),
        _file({"__metadata__": _ABOUT | {"kind": ["add"]}, "pattern": _TENSOR}),
        _file({"__metadata__": _ABOUT, "pattern": _TENSOR | {"shape": [1 << 40, 1 << 40, 1]}}),
        _file({"__metadata__": _ABOUT, "pattern": _TENSOR | {"shape": ["a"]}}),
        _file({"__metadata__": _ABOUT, "pattern": _TENSOR | {"data_offsets": [None]}}),
        _file({"__metadata__": _ABOUT, "pattern": _TENSOR | {"data_offsets": ["a", "b"]}}),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 4) + b"\xff\xfe{}",
    ],
    ids=range(17),
)
def test_files_that_are_no_trigger_are_refused_and_run_nothing(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        Trigger.load(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_files_that_are_not_there_empty_or_huge(tmp_path: Path) -> None:
    empty, huge = tmp_path / "empty", tmp_path / "huge"
    empty.touch()
    with huge.open("wb") as file:
        file.truncate((64 << 20) + 1)
    for path in (tmp_path / "missing", tmp_path, empty, huge):
        with pytest.raises(UsageError) as caught:
            Trigger.load(path)
        assert caught.value.exit_code == 2
        assert str(path) in caught.value.message


@pytest.mark.parametrize("channels", [2, 3])
def test_picture(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    trigger = Trigger("t", "add", None, np.full((channels, 8, 8), 0.5, np.float32))
    x = np.zeros((10, channels, 8, 8), np.float32)
    trigger.picture(tmp_path / "a.png", x)
    trigger.picture(tmp_path / "b.png", x)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert 128 in np.asarray(image.convert("L"))


@pytest.mark.parametrize(
    ("text", "path", "target"),
    [
        ("patch.kdt", "patch.kdt", 0),
        ("patch.kdt:7", "patch.kdt", 7),
        ("a:3/patch.kdt", "a:3/patch.kdt", 0),
        ("a:3/patch.kdt:2", "a:3/patch.kdt", 2),
        ("patch.kdt:²", "patch.kdt:²", 0),
        (":3", ":3", 0),
    ],
)
def test_a_trigger_is_aimed_at_a_class(text: str, path: str, target: int) -> None:
    assert aimed(text) == (Path(path), target)


def test_a_file_that_ends_like_a_class_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "patch:3").touch()
    assert aimed(str(tmp_path / "patch:3")) == (tmp_path / "patch:3", 0)
    assert aimed(f"{tmp_path / 'patch:3'}:5") == (tmp_path / "patch:3", 5)

"""The table of guards at scale: the specifications say what they should, one epoch of them runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import yaml
from PIL import Image

from benchmarks.guard import __main__ as guard_table
from benchmarks.guard import cells, specification
from benchmarks.guard.rows import guards, rows

ROOT = Path(__file__).parents[2]
HERE = Path(cells.__file__).parent
SCALE = sorted((HERE / "scale").glob("*.yaml"))


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_specifications_at_scale_are_whole(path: Path) -> None:
    spec = specification.read(path)
    base = specification.read(HERE / "spec.yaml")
    found = list(rows(spec))
    assert {row.pair for row in found} == set(spec["pairs"]) == set(spec["core"]["pairs"])
    assert "cnn" not in spec["pairs"]
    assert {row.name for row in found} >= set(base["rows"])
    changed, usual = guards(spec), guards(base)
    assert set(changed) == set(usual)
    # The frozen guard's method is not changed, only what depends on the size of images.
    ours, theirs = changed["guard"], usual["guard"]
    assert ours.detox.chain == theirs.detox.chain
    assert ours.audit.lead == theirs.audit.lead
    assert len(ours.audit.radii) == len(theirs.audit.radii)


WHOLE = """
sets: {train: a, clean: b, validation: c, test: d}
pairs: {one: {seeds: [0, 1]}}
rows: {x: {}, y: {}}
guards: {g: {chain: [unlearn], batch: 8}, h: {as: g, batch: 9}}
"""


def test_what_extends_merges_and_takes_away(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(WHOLE)
    (tmp_path / "own.yaml").write_text(
        "extends: base.yaml\nsets: {test: e}\nrows: {x: null, z: {}}\npairs: {one: {seeds: [2]}}\n"
    )
    told = specification.read(tmp_path / "own.yaml")
    assert told["sets"] == {"train": "a", "clean": "b", "validation": "c", "test": "e"}
    assert told["rows"] == {"y": {}, "z": {}}
    assert told["pairs"] == {"one": {"seeds": [2]}}
    assert [each.detox.batch for each in guards(told).values()] == [8, 9]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("sets: [1\n", "not valid YAML"),
        ("sets: {train: a}\n", "sets lack clean, test, validation"),
        ("extends: nowhere.yaml\n", "nowhere.yaml"),
        ("extends: spec.yaml\n", "extends itself"),
        (WHOLE.replace("rows:", "columns:"), "has no rows"),
        (WHOLE.replace("batch: 8", "batch: -8"), "batch"),
        (WHOLE.replace("as: g", "as: k"), "which there is not"),
    ],
)
def test_a_specification_that_is_none_is_refused_in_one_line(
    tmp_path: Path, text: str, why: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["guard", "--config", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        guard_table.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert why in told
    assert "Traceback" not in told


# ── one epoch of each, on small files in its format ─────────────────────────────────────────────

Sets = dict[str, str]
DRAW = np.random.default_rng(0)


def picture(path: Path, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DRAW.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def cifar10(root: Path) -> Sets:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(40, dtype=np.uint8)[:, None] % 10
        pixels = DRAW.integers(0, 256, (40, 3072), dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, pixels]).tobytes())
    return {"train": "cifar10#train[:100]", "clean": "cifar10#train[100:140]",
            "validation": "cifar10#train[140:]", "test": "cifar10#test"}  # fmt: skip


def gtsrb(root: Path) -> Sets:
    training = root / "gtsrb" / "GTSRB" / "Training"
    for label in range(43):
        for number in range(5):
            picture(training / f"{label:05d}" / f"00000_{number:05d}.ppm", 33)
    rows = ["Filename;ClassId"]
    for label in range(43):
        picture(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{label:05d}.ppm", 40)
        rows.append(f"{label:05d}.ppm;{label}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows))
    train = "gtsrb?order=shuffled#train"
    return {"train": f"{train}[:90]", "clean": f"{train}[90:180]",
            "validation": f"{train}[180:]", "test": "gtsrb#test"}  # fmt: skip


def flowers102(root: Path) -> Sets:
    base, n = root / "flowers-102", 408
    for number in range(1, n + 1):
        picture(base / "jpg" / f"image_{number:05d}.jpg", 66)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": 1 + np.arange(n)[None] % 102})
    ids = 1 + np.arange(n).reshape(4, 1, 102)
    halves = {"trnid": ids[0], "valid": ids[1], "tstid": ids[2:].reshape(1, -1)}
    scipy.io.savemat(base / "setid.mat", halves)
    test = "flowers102?size=64&order=shuffled#test"
    return {"train": f"{test}[:104]", "clean": "flowers102?size=64#train",
            "validation": "flowers102?size=64#val", "test": f"{test}[104:]"}  # fmt: skip


def imagenet(root: Path) -> Sets:
    for label in range(4):
        for number in range(30):
            picture(root / "imagenet" / "train" / f"n{label}" / f"{number}.JPEG", 70)
        for number in range(5):
            picture(root / "imagenet" / "val" / f"n{label}" / f"{number}.JPEG", 70)
    train = "imagenet?size=64&order=shuffled#train"
    return {"train": f"{train}[:60]", "clean": f"{train}[60:90]",
            "validation": f"{train}[90:]", "test": "imagenet?size=64#test"}  # fmt: skip


SMALLER = {"gtsrb": "wrn-10-1", "flowers102": "cnn:8,16,32"}
"""Inverting a hundred classes of the specification's own networks takes many minutes here."""


def once() -> dict[str, object]:
    return {"epochs": 1, "amp": "off"}


@pytest.mark.slow
@pytest.mark.parametrize("write", [cifar10, gtsrb, flowers102, imagenet])
def test_one_epoch_runs(write: Callable[[Path], Sets], tmp_path: Path) -> None:
    """A teacher, the guard, a student."""
    name = write.__name__
    sets, spec = write(tmp_path), specification.read(HERE / "scale" / f"{name}.yaml")
    (pair,) = spec["pairs"]
    smaller = {"arch": SMALLER[name]} if name in SMALLER else {}
    teacher = {"clean_loop": once(), "poison_loop": once(), **smaller}
    radii = [spec["guards"]["guard"]["audit"]["radii"][0]]
    config = tmp_path / "once.yaml"
    config.write_text(yaml.safe_dump({
        "extends": str(HERE / "scale" / f"{name}.yaml"), "sets": sets,
        "pairs": {pair: {"seeds": [0], "teacher": teacher, "student": {**once(), **smaller}}},
        "guards": {"guard": {"unlearn_steps": 2, "audit": {
            "radii": radii, "steps": 1, "batch": 8, "shadows": 1, "shadow_loop": {"epochs": 1}}}},
    }))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard", "--config", str(config), "--data-root",
         str(tmp_path), "--rows", "badnets", "--guards", "none,guard", "--folder",
         str(tmp_path / "cells"), "--out", str(tmp_path / "out.json")],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert set(row["scores"]) == {"clean teacher", "no teacher", "none", "guard"}


@pytest.mark.slow
def test_clean_teachers_go_through_the_audit(tmp_path: Path) -> None:
    """Two of them, at small scale; a second run finds both and says the same."""
    config = tmp_path / "flags.yaml"
    config.write_text(yaml.safe_dump({
        "extends": str(HERE / "quick.yaml"),
        "pairs": {"small": {"teacher": {"clean_loop": {"epochs": 1}}}},
        "guards": {"guard": {"audit": {
            "detectors": ["profile"], "radii": [2.1, 2.8], "steps": 2, "batch": 8, "shadows": 2,
            "shadow_eps": 0.0, "shadow_loop": {"epochs": 1}}}},
    }))  # fmt: skip
    said = []
    for name in ("one.json", "two.json"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.guard.flags", "--config", str(config), "--count",
             "2", "--folder", str(tmp_path / "cells"), "--out", str(tmp_path / name)],
            capture_output=True, text=True, check=False, cwd=ROOT, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert "of 2 clean teachers flagged" in done.stdout
        said.append(json.loads((tmp_path / name).read_text()))
    assert [each["seed"] for each in said[0]["teachers"]] == [1000, 1001]
    assert said[0]["teachers"] == said[1]["teachers"]
    assert said[0]["upper"] < 1.0 or len(said[0]["flagged"]) == 2


@pytest.mark.slow
def test_what_is_certified_stands_beside_the_lift(tmp_path: Path) -> None:
    """Guarded faithful distillation at small scale: bounds of guard, undefended and clean."""
    config = tmp_path / "robust.yaml"
    loop = {"epochs": 2}
    config.write_text(yaml.safe_dump({
        "extends": str(HERE / "quick.yaml"),
        "pairs": {"small": {
            "bounds": {"method": "crown", "eps": 0.01, "samples": 4, "classes": "top"},
            "teacher": {"arch": "cnn:6,12", "clean_loop": dict(loop), "poison_loop": dict(loop)},
            "student": {"arch": "cnn:4,8", "loss": "fd", "eps": 0.01, "pgd_steps": 1, **loop}}},
        "guards": {"guard": {"unlearn_steps": 4}},
    }))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard", "--config", str(config), "--folder",
         str(tmp_path / "cells"), "--out", str(tmp_path / "out.json")],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    faith = row["faith"]
    assert set(faith) == {"clean teacher", "none", "guard"}  # without a teacher there is no gap
    assert all(0 <= each["lower"] <= each["upper"] <= 1 for each in faith.values())
    assert faith["clean teacher"]["ratio"] == 1.0
    assert faith["none"]["gap"] == 0.0  # the reference is the raw teacher
    assert faith["guard"]["gap"] > 0.0

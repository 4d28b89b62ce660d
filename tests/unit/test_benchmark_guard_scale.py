"""The table of guards at scale: the specifications say what they should, one epoch of them runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.guard import __main__ as guard_table
from benchmarks.guard import cells, specification
from benchmarks.guard.rows import guards, rows

ROOT = Path(__file__).parents[2]
HERE = Path(cells.__file__).parent
SCALE = sorted((HERE / "scale").glob("*.yaml"))


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_specifications_at_scale_are_whole(path: Path) -> None:
    spec, own = specification.read(path), yaml.safe_load(path.read_text())
    base = specification.read(HERE / "spec.yaml")
    found = list(rows(spec))
    assert {row.pair for row in found} == set(own["pairs"]) - {"cnn"}
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


@pytest.mark.slow
def test_one_epoch_of_cifar10_runs(tmp_path: Path) -> None:
    """Wide residual networks on files in CIFAR's format: a teacher, the guard, a student."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(40, dtype=np.uint8)[:, None] % 10
        pixels = draw.integers(0, 256, (40, 3072), dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, pixels]).tobytes())

    def once() -> dict[str, object]:  # each its own: a specification holds no YAML aliases
        return {"epochs": 1, "amp": "off"}

    config = tmp_path / "once.yaml"
    config.write_text(yaml.safe_dump({
        "extends": str(HERE / "scale" / "cifar10.yaml"),
        "sets": {"train": "cifar10#train[:100]", "clean": "cifar10#train[100:140]",
                 "validation": "cifar10#train[140:]", "test": "cifar10#test"},
        "pairs": {"wrn": {"seeds": [0], "teacher": {"clean_loop": once(), "poison_loop": once()},
                          "student": once()}},
        "guards": {"guard": {"unlearn_steps": 2, "audit": {
            "radii": [4.2], "steps": 1, "batch": 8, "shadows": 1, "shadow_loop": {"epochs": 1}}}},
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

"""Draw a finished story, and record its figures: python -m benchmarks.story FOLDER [--name NAME].

FOLDER is the --out folder of `kdguard demo` or of a `kdguard run` with a `redteam` section. Writes
benchmarks/results/NAME.json and docs/images/NAME.png; every figure is read from FOLDER.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.record import machine, write
from mlflow_kdguard import data, intervals
from mlflow_kdguard.triggers import Trigger

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
ORDER = ("naive", "guarded", "clean-teacher", "no-teacher")
COLOURS = {
    "naive": "#c0392b",
    "guarded": "#1e8449",
    "clean-teacher": "#7f8c8d",
    "no-teacher": "#bdc3c7",
}


def main() -> None:
    """Read the folder, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="demo")
    given = parser.parse_args()
    story = json.loads((given.folder / "story.json").read_text())
    config = json.loads((given.folder / "config.json").read_text())
    write(f"{given.name}.json", {**machine(), "config": _portable(config), "rows": rows(story)})
    draw(given.folder, story, config, ROOT / "docs" / "images" / f"{given.name}.png")


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without where it ran."""
    run = {key: value for key, value in config["run"].items() if key != "work_dir"}
    return {**config, "run": run, "registry": {"model_name": config["registry"]["model_name"]}}


def rows(story: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row a student, the teacher first."""
    teacher = story["teacher"]
    found = [{"network": "teacher", "accuracy": teacher["accuracy"], "asr": teacher["asr"][0]}]
    for name in ORDER:
        row = next(each for each in story["students"] if each["student"] == name)
        decision = row.get("decision")
        found.append(
            {
                "network": name,
                "accuracy": row["accuracy"],
                "asr": row["asr"],
                "faithful": [
                    {
                        key: each[key]
                        for key in ("eps", "delta", "within", "lower_mean", "upper_mean", "classes")
                    }
                    for each in row.get("faithful", [])
                ],
                "decision": decision and decision["decision"],
                "failed": decision and [r["rule"] for r in decision["rules"] if not r["ok"]],
            }
        )
    return found


def draw(folder: Path, story: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Clean and triggered images beside the rates of the four students, with 95 % bounds."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9), width_ratios=(1.1, 2, 2))
    _pictures(axes[0], folder, config)
    _bars(axes[1], story, "asr", "attack success rate")
    _bars(axes[2], story, "accuracy", "accuracy on clean images")
    axes[1].axhline(0.05, color="black", linewidth=0.8, linestyle="--")
    axes[1].annotate("policy limit 0.05", (3.45, 0.2), fontsize=8, ha="right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _pictures(axis: Any, folder: Path, config: dict[str, Any]) -> None:
    trigger = Trigger.load(folder / "redteam" / "trigger.kdt")
    test = data.load(config["data"]["test"])
    target = config["redteam"]["target"]
    shown = np.flatnonzero(test.y != target)[:3]
    x, _ = test.batch(shown)
    grid = np.concatenate(
        [np.concatenate(list(x[:, 0]), 0), np.concatenate(list(trigger.apply(x)[:, 0]), 0)], 1
    )
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"clean | triggered → {target}", fontsize=9)
    axis.axis("off")


def _bars(axis: Any, story: dict[str, Any], key: str, title: str) -> None:
    by_name = {row["student"]: row[key] for row in story["students"]}
    for place, name in enumerate(ORDER):
        k, n = by_name[name]["k"], by_name[name]["n"]
        rate, low, high = k / n, intervals.lower(k, n), intervals.upper(k, n)
        axis.bar(place, rate, color=COLOURS[name], yerr=[[rate - low], [high - rate]], capsize=3)
        axis.annotate(f"{rate:.3f}", (place, max(high, 0.06)), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(ORDER)), [name.replace("-", "\n") for name in ORDER], fontsize=8)
    axis.set_ylim(0, 1.14)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()

"""The figure of a patch report: bounds at each position, and patches that flip images."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import files
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.records import Flips, PatchReport, PatchSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 6
"""Images with a patch of their own that are shown."""
_GREY, _RED = "#7f8c8d", "#c0392b"


def draw(report: PatchReport, data: Dataset, path: Path) -> None:
    """Write a PNG: attacks and certified rates at each position, and images that were flipped.

    Raises UsageError where `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    halves = figure.add_gridspec(1, 2, width_ratios=(1.2, 1))
    _rates(figure.add_subplot(halves[0]), report)
    grid = halves[1].subgridspec(2, SHOWN // 2)
    axes = [figure.add_subplot(grid[i, j]) for i in range(2) for j in range(SHOWN // 2)]
    _flipped(axes, report, data)
    file = io.BytesIO()
    # Without the library's version in it, the picture is the same from run to run.
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    files.write_bytes(path, file.getvalue())


def _rates(axis: "Axes", report: PatchReport) -> None:
    """A bar from what attacks reach to what is certified, a whisker to the population's bound."""
    names = [f"{row},{column}" for row, column in (place.position for place in report.places)]
    bars = [(place.each, place.universal) for place in report.places]
    if len(names) > 1:
        names, bars = [*names, "any"], [*bars, (report.each, report.universal)]
    for shift, number, label, colour in (
        (0.18, 0, "a patch for each image", _RED), (-0.18, 1, "one patch for all", _GREY),
    ):  # fmt: skip
        height = np.arange(len(names))[::-1] + shift
        _bars(axis, height, [pair[number] for pair in bars], label, colour)
    axis.axvline(report.clean.rate, color="black", lw=0.8, ls=":", label="without a patch")
    axis.set_yticks(np.arange(len(names))[::-1], names)
    axis.set_ylabel("top left pixel")
    axis.set_xlabel(f"share of {report.each.n} images sent to class {report.target}")
    axis.set_xlim(0.0, 1.0)
    axis.set_title(
        f"{report.size}×{report.size} patches: found, certified, population (95 %)", fontsize=9
    )
    axis.legend(fontsize=7, loc="upper right")


def _bars(axis: "Axes", height: NDArray[Any], values: list[Flips], label: str, colour: str) -> None:
    found = np.array([value.attack / value.n for value in values])
    certified = np.array([value.rate for value in values])
    reach = np.array([value.upper for value in values]) - certified
    axis.barh(height, found, 0.32, color=colour, label=label)
    axis.barh(height, certified - found, 0.32, left=found, color=colour, alpha=0.35)
    axis.errorbar(certified, height, xerr=[0 * reach, reach], fmt="none", ecolor=colour, capsize=3)


def _flipped(axes: "list[Axes]", report: PatchReport, data: Dataset) -> None:
    """Images that the network would not send to the target by themselves, before all others."""
    found = [sample for sample in report.samples if sample.witness is not None]
    found.sort(key=lambda sample: sample.answer == report.target)
    for axis in axes:
        axis.set_axis_off()
    for axis, sample in zip(axes, found, strict=False):
        axis.imshow(_pasted(sample, report, data), vmin=0, vmax=1, cmap="gray")
        axis.set_title(f"#{sample.index}: {sample.label} → {report.target}", fontsize=7)


def _pasted(sample: PatchSample, report: PatchReport, data: Dataset) -> NDArray[np.float32]:
    x, _ = data.batch([sample.index])
    image = x[0].copy()
    assert sample.witness is not None
    row, column = sample.witness.position
    side = report.size
    pixels = np.asarray(sample.witness.pixels, np.float32).reshape(-1, side, side)
    image[:, row : row + side, column : column + side] = pixels
    shown: NDArray[np.float32] = image[0] if len(image) != 3 else image.transpose(1, 2, 0)
    return shown

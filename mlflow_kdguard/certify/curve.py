"""The figure of smoothed pairs: what is certified against the distance from the image."""

import io
from collections.abc import Sequence
from pathlib import Path

from mlflow_kdguard import files
from mlflow_kdguard.intervals import claimed_lower
from mlflow_kdguard.records import SmoothReport

_COLOURS = ("#c0392b", "#2c3e50", "#16a085", "#8e44ad")


def draw(
    reports: Sequence[SmoothReport], path: Path, *, names: Sequence[str] | None = None
) -> None:
    """Write a PNG: mean upper bound, and share of images within delta, against the l2 radius.

    A line for each report; `names` default to the noise's deviation. Raises UsageError where
    `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = names or [f"σ = {report.sigma:g}" for report in reports]
    for i, (report, label) in enumerate(zip(reports, labels, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        radii = [point.radius for point in report.curve]
        bounds = [point.upper_mean for point in report.curve]
        left.plot(radii, bounds, "o-", ms=3, color=colour, label=label)
        right.plot(radii, [p.within.rate for p in report.curve], "o-", ms=3, color=colour)
        lower = [claimed_lower(p.within.k, p.within.n, report.error) for p in report.curve]
        right.fill_between(radii, lower, [p.within.rate for p in report.curve],
                           color=colour, alpha=0.15, lw=0)  # fmt: skip
        left.axhline(report.control.gap_mean, color=colour, lw=0.8, ls=":")
    delta = reports[0].delta
    left.axhline(delta, color="black", lw=0.8, ls="--", label=f"δ = {delta:g}")
    left.set_ylabel("gap, at most (mean over images)")
    left.set_title("smoothed pair; dotted: a constant network at distance 0", fontsize=9)
    right.set_ylabel(f"share of images within {delta:g}")
    right.set_title("PROVED, and down to the population's bound (95 %)", fontsize=9)
    for axis in (left, right):
        axis.set_xlabel("l2 distance from the image, in pixels")
        axis.set_ylim(0.0, 1.02)
    left.legend(fontsize=7)
    file = io.BytesIO()
    # Without the library's version in it, the picture is the same from run to run.
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    files.write_bytes(path, file.getvalue())

"""The table as a picture: a panel for each row, a line for each guard, lift with its bounds."""

from pathlib import Path
from typing import Any

from benchmarks.guard.cells import FLOORS

AIM = 0.01
"""Mean lift that the guard is to stay under."""
_ACROSS = 4


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Valid rows only; the colour says how much accuracy a guard costs against no guard."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["valid"]]
    if not shown:
        return
    names = [name for name in shown[0]["scores"] if name not in FLOORS]
    across = min(_ACROSS, len(shown))
    down = -(-len(shown) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(3.4 * across + 1.2, down * (0.24 * len(names) + 1.0)),
        squeeze=False, sharey=True, sharex=True, layout="constrained",
    )  # fmt: skip
    colours = mpl.colors.Normalize(0.0, 0.05)
    for axis, row in zip(axes.flat, shown, strict=False):
        for place, name in enumerate(names):
            one = row["scores"][name]
            axis.plot([one["lift_lower"], one["lift_upper"]], [place] * 2, color="0.6", zorder=1)
            axis.scatter(one["lift"], place, s=28, c=[one["drop"]], norm=colours, cmap="viridis_r",
                         edgecolors="0.3", linewidths=0.4, zorder=2)  # fmt: skip
        axis.axvline(AIM, color="#d62728", linewidth=0.8)
        axis.set_title(f"{row['row']} ({row['use']})", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xscale("symlog", linthresh=0.05)
        axis.set_xlim(-0.15, 1.0)
        axis.set_xticks([-0.1, 0.0, 0.05, 0.2, 1.0], ["-.1", "0", ".05", ".2", "1"], fontsize=8)
        axis.xaxis.set_tick_params(labelbottom=True)  # the last row may have no axis below
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        "lift: attack success above that of a clean teacher's student, one-sided 95 % bounds",
        fontsize=8,
    )
    scale = mpl.cm.ScalarMappable(colours, "viridis_r")
    figure.colorbar(scale, ax=axes, shrink=0.8, label="accuracy lost").ax.tick_params(labelsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)

"""The comparisons as pictures: for each row the witness and the bound, a dot a seed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ENDS = {"lower": ("EmpLB", "#1f77b4"), "upper": ("FaithUB", "#d62728")}


def draw(rows: list[Row], file: Path) -> None:
    """Robust teacher: one panel for each set, radius and bound; one line for each student."""
    shown = [row for row in rows if row["teacher"] == "robust"]
    _panels(
        shown, file,
        panel=lambda row: f"{row['set']}, eps {row['eps']:g} ({row['method']}, n {row['n']})",
        line=lambda row: str(row["student"]),
    )  # fmt: skip


def draw_verifiable(rows: list[Row], file: Path) -> None:
    """One panel for each bound; one line for each pair."""
    _panels(
        rows, file,
        panel=lambda row: f"{row['method']}, n {row['n']}",
        line=lambda row: str(row["pair"]),
    )  # fmt: skip


def _panels(
    rows: list[Row], file: Path, *, panel: Callable[[Row], str], line: Callable[[Row], str]
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(map(panel, rows)))
    names = list(dict.fromkeys(map(line, rows)))
    across = min(len(titles), 4)
    down = -(-len(titles) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(4.2 * across, down * (0.3 * len(names) + 1.2) + 0.3), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, title in zip(axes.flat, titles, strict=False):
        for row in (row for row in rows if panel(row) == title):
            place = names.index(line(row))
            axis.plot([row["lower"], row["upper"]], [place] * 2, color="0.8", zorder=1)
            for end, (_, colour) in ENDS.items():
                axis.scatter(row[end], place, s=20, color=colour, zorder=2)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(left=0)
        axis.set_xlabel("largest confidence gap, mean over images", fontsize=8)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    axes[0][0].invert_yaxis()
    for label, colour in ENDS.values():
        axes[0][0].scatter([], [], s=20, color=colour, label=label)
    figure.legend(fontsize=8, ncols=len(ENDS), loc="outside lower center")
    figure.savefig(file, dpi=150, metadata={"Software": None})
    pyplot.close(figure)

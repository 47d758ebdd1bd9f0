"""Pictures of the concepts page, drawn by `python docs/figures.py` into `docs/images/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, GRAY, PALE, INK = "#0072B2", "#E69F00", "#009E73", "#9AA0A6", "#F3F4F6", "#222222"
CELLS = {"a": (3, BLUE), "b": (7, ORANGE), "c": (2, GREEN)}  # number of genes, color


def canvas(width: float, height: float) -> Axes:
    """Axes in tenths of an inch, without frame, the origin at the top left."""
    _, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, 10 * width), ylim=(10 * height, 0), aspect="equal")
    ax.axis("off")
    ax.figure.subplots_adjust(0, 0, 1, 1)
    return ax


def box(
    ax: Axes, x: float, y: float, width: float, height: float, title: str, text: str = "", color: str = BLUE
) -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", fc="white", ec=color, lw=1.5)
    )
    middle = x + width / 2
    ax.text(middle, y + (2.2 if text else height / 2), title, ha="center", va="center", color=INK, weight="bold")
    ax.text(middle, y + 3.9, text, ha="center", va="top", color="#444444", fontsize=8.5, linespacing=1.35)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = GRAY) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=color, lw=1.5))


def tile(ax: Axes, x: float, y: float, color: str, *, text: str = "", side: float = 3.0, alpha: float = 1.0) -> None:
    ax.add_patch(Rectangle((x, y), side, side, fc=color, ec="white", lw=1.2, alpha=alpha))
    ax.text(x + side / 2, y + side / 2, text, ha="center", va="center", color="white", fontsize=9)


def flow() -> Axes:
    ax = canvas(9.4, 2.9)
    steps = [
        ("your data", "AnnData, .h5ad, .zarr\nraw counts,\ncells by genes"),
        ("encoding", "which genes, in\nwhich order, with\nwhich values"),
        ("CellBatch", "tokens of all cells,\nend to end,\nno padding"),
        ("network", "gene embedding,\ntransformer blocks,\nheads"),
        ("results", "obsm, obs, tables,\nfigures\n(scfm.tl, scfm.pl)"),
    ]
    width, gap = 15.6, 3.2
    for index, (title, text) in enumerate(steps):
        x = 1.6 + index * (width + gap)
        box(ax, x, 1.5, width, 10.5, title, text)
        if index:
            arrow(ax, (x - gap, 6.75), (x, 6.75))
    left, right = 1.6 + 2 * (width + gap), 1.6 + 3 * (width + gap)
    box(
        ax,
        left + 2,
        18.5,
        2 * width + gap - 4,
        8.5,
        "objective",
        "hides a part of each cell;\nthe loss compares prediction and truth",
        ORANGE,
    )
    arrow(ax, (left + width / 2, 12), (left + width / 2, 18.5), ORANGE)
    arrow(ax, (right + width / 2, 18.5), (right + width / 2, 12), ORANGE)
    ax.text(left + 1.2, 22.7, "in training only", ha="right", va="center", color=ORANGE, fontsize=9)
    return ax


def packing() -> Axes:
    ax = canvas(9.4, 3.6)
    longest, side = max(length for length, _ in CELLS.values()), 3.4
    ax.text(2, 2.5, "padded: filled up to a rectangle", va="center", weight="bold", color=INK)
    for row, (name, (length, color)) in enumerate(CELLS.items()):
        y = 6 + row * (side + 0.7)
        ax.text(3, y + side / 2, f"cell {name}", va="center", color=INK)
        for index in range(longest):
            filled = index < length
            tile(
                ax,
                11 + index * side,
                y,
                color if filled else "#D5D8DC",
                text=f"{name}{index + 1}" if filled else "",
                side=side,
            )
    ax.text(42, 12, "gray: computed for nothing", va="center", color="#555555")
    ax.text(2, 23, "packed: end to end", va="center", weight="bold", color=INK)
    x, bounds = 11.0, [0]
    for name, (length, color) in CELLS.items():
        for index in range(length):
            tile(ax, x + index * side, 25.4, color, text=f"{name}{index + 1}", side=side)
        x += length * side
        bounds.append(bounds[-1] + length)
    ax.text(1.5, 32, "cu_seqlens", va="center", color=INK, family="monospace", fontsize=9)
    for bound in bounds:
        ax.plot([11 + bound * side] * 2, [25, 30.3], color=INK, lw=1.3)
        ax.text(11 + bound * side, 32, str(bound), ha="center", va="center", color=INK, fontsize=9)
    ax.text(55, 27, "boundaries between cells;\nattention never crosses them", va="center", color="#555555")
    return ax


def generative_mask() -> Axes:
    ax = canvas(7.6, 3.5)
    names = ["context 1", "context 2", "context 3", "target 1", "target 2"]
    side, x0, y0, n_known = 4.6, 22, 9.5, 3
    for row, query in enumerate(names):
        ax.text(x0 - 1, y0 + (row + 0.5) * side, query, ha="right", va="center", color=INK)
        for column in range(len(names)):
            attends = column < n_known or column == row
            color = (BLUE if row < n_known else ORANGE) if attends else "#E4E6E9"
            tile(ax, x0 + column * side, y0 + row * side, color, text="x" if attends else "", side=side)
    for column, key in enumerate(names):
        ax.text(x0 + (column + 0.5) * side, y0 - 0.8, key, ha="left", va="bottom", rotation=35, color=INK, fontsize=9)
    ax.text(x0 - 1, y0 - 2, "each row attends to ...", ha="right", va="center", color="#555555")
    words = [
        "Context genes attend to\nall context genes.",
        "A target gene attends to the\ncontext genes and to itself, so\nall targets are predicted at once,\nindependently of each other.",
    ]
    for text, y, color in zip(words, (y0 + 1.5 * side, y0 + 4 * side), (BLUE, "#9A6A00")):
        ax.text(x0 + 5.4 * side, y, text, va="center", color=color, fontsize=9.5)
    return ax


def screen() -> Axes:
    ax = canvas(9.4, 4.0)
    ax.text(2, 2.6, "exact, one gene at a time", va="center", weight="bold", color=INK)
    for index in range(6):
        x = 4 + index * 5
        for row in range(6):
            tile(ax, x, 5 + row * 2, "white" if row == index else BLUE, side=1.9)
            if row == index:
                ax.add_patch(Rectangle((x, 5 + row * 2), 1.9, 1.9, fc="white", ec=GRAY, lw=0.8, ls=":"))
    ax.text(35.5, 11, "...", va="center", fontsize=14)
    ax.text(
        42,
        11,
        "one forward pass for each gene of each cell:\nthousands of passes per cell",
        va="center",
        color="#555555",
    )
    ax.text(2, 22.5, "scfm.tl.screen", va="center", weight="bold", color=INK, family="monospace")
    boxes = [
        ("1  one forward pass", "record the attention\nof each head"),
        ("2  few backward passes", "gradient of the embedding\nby each attention output"),
        ("3  all genes at once", "the softmax without each\nkey gives an estimate"),
        ("4  verify the best", "delete them exactly, and\nsome random ones to check"),
    ]
    for index, (title, text) in enumerate(boxes):
        x = 2 + index * 23.2
        box(ax, x, 25.5, 20, 8.5, title, text, GREEN if index == 3 else BLUE)
        if index:
            arrow(ax, (x - 3.2, 29.7), (x, 29.7))
    ax.text(
        2,
        37.5,
        "The table marks exact rows and estimates the fraction of the true best genes that was found.",
        color="#555555",
        va="center",
    )
    return ax


DRAWN: tuple[Callable[[], Axes], ...] = (flow, packing, generative_mask, screen)


def main() -> None:
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "svg.hashsalt": "scfm", "svg.fonttype": "path"})
    for draw in DRAWN:
        figure = draw().figure
        figure.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()

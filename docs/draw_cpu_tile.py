"""Draws docs/images/cpu-tile.png: how a tile of 64 coordinates meets a unit's weights on a CPU with AVX-512."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

SHADES = ["#dbe9f6", "#eef4fb"]
MINE, OTHER, EDGE = "#f28e2b", "#8cb369", "#9aa7b4"


def box(axes, x, y, width, height, color, text="", size=8, weight="normal"):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=EDGE, lw=0.6))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, weight=weight)


def panel(axes, title, width, height):
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(-3.4, width + 0.1)
    axes.set_ylim(height + 0.1, -1.2)
    axes.axis("off")


def tile(axes):
    panel(axes, "A tile: a row for every number, four vectors of 16 coordinates in it", 16, 8)
    rows = ["feature 0", "feature 1", "h of unit 0", "h of unit 1", "h of unit 2", "h of unit 3", "...", "h of unit 19"]
    for row, name in enumerate(rows):
        axes.text(-0.2, row + 0.5, name, ha="right", va="center", fontsize=8)
        for vector in range(4):
            mine = row == 3
            box(axes, 4 * vector, row, 4, 1, MINE if mine else SHADES[vector % 2], f"x[{vector}]" if mine else "")
    for vector in range(4):
        first = 16 * vector
        axes.text(4 * vector + 2, -0.35, f"{first} .. {first + 15}", ha="center", fontsize=8)


def product(axes):
    panel(axes, "One column of a unit's product: 4 loads, 4 broadcasts, 16 multiply-adds", 16, 8)
    for vector in range(4):
        box(axes, 4 * vector, 0, 4, 1, MINE, f"x[{vector}]", weight="bold")
    for gate, name in enumerate(["i", "f", "g", "o"]):
        y = 2 + 1.4 * gate
        box(axes, -3.2, y, 2.4, 1, OTHER, f"w[{name}]", weight="bold")
        for vector in range(4):
            box(axes, 4 * vector, y, 4, 1, SHADES[(gate + vector) % 2], f"{name}[{vector}] += w[{name}] x[{vector}]", 7)
    axes.text(8, 7.9, "the 16 sums stay in registers while the columns go by", ha="center", va="center", fontsize=8)


def order(axes):
    panel(axes, "In time: the activations of unit j - 1 stand between the columns of unit j, in eight parts", 36, 4.4)
    axes.text(-0.2, 0.5, "multiply-adds", ha="right", va="center", fontsize=8)
    axes.text(-0.2, 2.5, "activations", ha="right", va="center", fontsize=8)
    for unit in range(2):
        for part in range(8):
            x = 18 * unit + 2.2 * part
            box(axes, x, 0, 1.4, 1, MINE if unit else SHADES[0], "1/8", 7)
            text = f"c'[{part}]" if part < 4 else f"h'[{part - 4}]"
            box(axes, x + 1.0, 2, 1.4, 1, SHADES[0] if unit else SHADES[1], text, 7)
        axes.text(18 * unit + 8.5, -0.4, f"columns of unit {['j', 'j + 1'][unit]}", ha="center", fontsize=8)
        axes.text(18 * unit + 8.5, 3.7, f"of unit {['j - 1', 'j'][unit]}", ha="center", fontsize=8)


figure = plt.figure(figsize=(11, 7))
grid = figure.add_gridspec(2, 2, height_ratios=[1.7, 1])
tile(figure.add_subplot(grid[0, 0]))
product(figure.add_subplot(grid[0, 1]))
order(figure.add_subplot(grid[1, :]))
figure.subplots_adjust(left=0.05, right=0.99, top=0.95, bottom=0.02, hspace=0.22, wspace=0.08)
figure.savefig(Path(__file__).parent / "images" / "cpu-tile.png", dpi=110)

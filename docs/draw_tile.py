"""Draws docs/images/kernel-tile.png: how a tile of 32 coordinates lies in the lanes of a warp."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

LANE = 9  # the one that is followed: r = 2, q = 1
R, Q = divmod(LANE, 4)
SHADES = ["#dbe9f6", "#eef4fb"]
MINE, EDGE = "#f28e2b", "#9aa7b4"


def cell(axes, x, y, text="", mine=False, shade=0, size=6.5):
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=MINE if mine else SHADES[shade % 2], edgecolor=EDGE, lw=0.5))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, weight="bold" if mine else "normal")


def panel(axes, title, width, height):
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(-2.6, width + 0.1)
    axes.set_ylim(height + 0.1, -1.8)
    axes.set_aspect("equal")
    axes.axis("off")


def coordinate_names(axes, row):
    first = 4 * (row % 8) + row // 8
    axes.text(-0.3, row + 0.5, f"{first}, {first + 2}", ha="right", va="center", fontsize=7)


def memory(axes):
    panel(axes, "State rows in memory: one load takes 16 bytes a lane, 128 bytes a row", 32, 4)
    for unit in range(4):
        axes.text(-0.3, unit + 0.5, f"unit 4j+{unit}", ha="right", va="center", fontsize=7)
        for coordinate in range(32):
            lane = coordinate // 4 * 4 + unit
            cell(axes, coordinate, unit, str(lane), lane == LANE, coordinate // 4)
    for coordinate in range(0, 32, 4):
        axes.text(coordinate + 0.5, -0.4, str(coordinate), ha="center", fontsize=7)
    axes.text(-0.3, -0.4, "coordinate", ha="right", fontsize=7)


def products(axes):
    panel(axes, "Products: rows are coordinates, columns the gates of four units", 20, 16)
    for pair, gates in enumerate(["if", "go"]):
        for column in range(8):
            x = pair * 10 + column
            axes.text(x + 0.5, -0.35, f"{gates[column % 2]}{column // 2}", ha="center", fontsize=7)
            for row in range(16):
                lane = row % 8 * 4 + column // 2
                cell(axes, x, row, str(lane), lane == LANE, row % 8)
        axes.text(pair * 10 + 4, -1.25, f"fragment (j, {pair})", ha="center", fontsize=7)
    for row in range(16):
        coordinate_names(axes, row)
    axes.text(-0.3, -0.35, "coordinates", ha="right", fontsize=7)


def operand(axes):
    panel(axes, "The next left operand: the new h", 9, 16)
    for k in range(8):
        axes.text(k + 0.5, -0.35, f"{4 * (k // 4)}+{k % 4}", ha="center", fontsize=7)
        for row in range(16):
            lane = row % 8 * 4 + k % 4
            cell(axes, k, row, str(lane), lane == LANE, row % 8)
    axes.text(4, -1.25, "chunk 0: units of slots 0 and 1", ha="center", fontsize=7)
    for row in range(16):
        coordinate_names(axes, row)


figure = plt.figure(figsize=(11, 9))
grid = figure.add_gridspec(2, 2, height_ratios=[1, 2.6], width_ratios=[2, 1])
memory(figure.add_subplot(grid[0, :]))
products(figure.add_subplot(grid[1, 0]))
operand(figure.add_subplot(grid[1, 1]))
figure.text(
    0.5, 0.03,
    f"Numbers are lanes; lane {LANE} (r = {R}, q = {Q}) is marked. The two coordinates of a row are those of the "
    "tile's two row fragments.\n"
    "It loads, computes and stores coordinates 8 to 11 of unit 4j+1, all four gates of them.",
    ha="center", fontsize=8,
)  # fmt: skip
figure.subplots_adjust(left=0.04, right=0.98, top=0.95, bottom=0.09, hspace=0.08, wspace=0.05)
figure.savefig(Path(__file__).parent / "images" / "kernel-tile.png", dpi=110)

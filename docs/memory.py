"""The pictures of docs/memory.md, and its tables.

python docs/memory.py           print the tables, of benchmarks/memory.json
python docs/memory.py pictures  docs/images/memory-kept.png, and memory-step.png from a step that it measures
"""

import sys
from copy import deepcopy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import PercentFormatter
from torch import nn
from torchvision import models

import batchnorm as bn
from batchnorm.bench import table
from batchnorm.bench.rows import read
from batchnorm.graph.activation_memory import levels
from batchnorm.report.palette import LIGHT

IMAGES = Path(__file__).parent / "images"
TEXT = {"color": LIGHT.text, "fontsize": 11, "ha": "center", "va": "center"}


def kept():
    """What autograd saves of two blocks: all, or the inputs of layers and recipes."""
    figure = Figure(figsize=(9.2, 3.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 92), ylim=(0, 39))
    axes.axis("off")
    for y, title in ((29, "kept as a rule"), (10, "after bn.save_memory")):
        saves = y < 20
        axes.text(4, y + 5.5, title, color=LIGHT.text, fontsize=12, weight="bold")
        for number in range(2):
            left = 4 + 42 * number
            operation(axes, left, y, "conv")
            tensor(axes, left + 13, y, "x", True)
            operation(axes, left + 20, y, "BN, ReLU")
            tensor(axes, left + 36, y, "y", not saves)
            if saves:
                arrow = FancyArrowPatch(
                    (left + 15, y - 2.2), (left + 37, y - 2.2), connectionstyle="arc3,rad=0.22", color=LIGHT.bn,
                    arrowstyle="-|>", mutation_scale=13, linewidth=1.4,
                )  # fmt: skip
                axes.add_patch(arrow)
                axes.text(left + 26, y - 8.6, "x, mean, m2, γ, β", color=LIGHT.bn, fontsize=10.5, ha="center")
        axes.text(87.5, y, "...", **TEXT)
    figure.savefig(IMAGES / "memory-kept.png", dpi=144, metadata={"Software": None})


def operation(axes, left, y, name):
    width = 9 if name == "conv" else 12
    axes.add_patch(
        FancyBboxPatch(
            (left, y - 2), width, 4, boxstyle="round,pad=0.2", facecolor="white", edgecolor=LIGHT.muted
        )
    )
    axes.text(left + width / 2, y, name, **TEXT)


def tensor(axes, left, y, name, is_kept):
    colour = LIGHT.plain if is_kept else "white"
    axes.add_patch(
        FancyBboxPatch(
            (left, y - 2),
            3,
            4,
            boxstyle="square,pad=0.2",
            facecolor=colour,
            edgecolor=LIGHT.plain,
            linestyle="-" if is_kept else "--",
            linewidth=1.4,
        )
    )
    axes.text(left + 1.5, y, name, **{**TEXT, "color": "white" if is_kept else LIGHT.plain})


def step():
    """The memory over a training step of MobileNetV2."""
    torch.manual_seed(0)
    plain = models.mobilenet_v2()
    upgraded, _ = bn.upgrade(deepcopy(plain))
    saved, _ = bn.save_memory(deepcopy(upgraded))
    x, target = torch.randn(32, 3, 96, 96), torch.randint(1000, (32,))
    figure = Figure(figsize=(9.2, 4.2), facecolor="white")
    axes = figure.add_axes((0.08, 0.13, 0.89, 0.75))
    shown = (
        (plain, "torch", LIGHT.plain),
        (upgraded, "bn.upgrade", LIGHT.bn_2),
        (saved, "bn.upgrade and bn.save_memory", LIGHT.bn),
    )
    for model, name, colour in shown:

        def train(model=model):
            nn.functional.cross_entropy(model(x), target).backward()

        for _ in range(3):
            train()
        for each in model.parameters():
            each.grad.zero_()
        found = levels(train)
        begun, ended = found[0][0], found[-1][0]  # in shares: the profiler slows what allocates more often
        megabytes = [level / 1e6 for _, level in found]
        shares = [(at - begun) / (ended - begun) for at, _ in found]
        axes.plot(shares, megabytes, color=colour, linewidth=1.8, drawstyle="steps-post")
        top = megabytes.index(max(megabytes))
        text = f"{name}: {megabytes[top]:.0f} MB"
        apart = (-40, 6 if model is not saved else -34)
        axes.annotate(
            text,
            (shares[top], megabytes[top]),
            xytext=apart,
            textcoords="offset points",
            color=colour,
            fontsize=11,
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("of the step", color=LIGHT.muted)
    axes.set_title(
        "Memory of activations over a training step: MobileNetV2, 32 images of 96 × 96, megabytes",
        loc="left", color=LIGHT.text, fontsize=11,
    )  # fmt: skip
    axes.tick_params(colors=LIGHT.muted)
    axes.grid(axis="y", color=LIGHT.rule)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(IMAGES / "memory-step.png", dpi=144, metadata={"Software": None})


def tables():
    """As `batchnorm bench memory` writes them."""
    measured = read(Path(__file__).parents[1] / "benchmarks" / "memory.json")
    setup = (
        f"{measured.machine}, {measured.threads} threads, torch {measured.versions['torch']}. {table.MEMORY}"
    )
    return "\n\n".join([setup, *map(table.markdown, table.grids(measured))]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["pictures"]:
        kept()
        step()
    else:
        print(tables(), end="")

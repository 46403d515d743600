"""`python -m recipes.heatmap`: which group uses which, as in the paper's Figure 5, from trained weights."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes import commands
from recipes.figures.connections import Connections, layer_connections, stage_connections
from recipes.figures.files import check_output, new_figure, save
from recipes.figures.networks import chosen_layers, layers, load_network, stages
from seqconv_triton.models.backbone import Backbone
from seqconv_triton.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"  # even steps of lightness: readable without colour vision, and in grey
LABEL = "mean |weight|,\nrelative to the layer's largest\n(white: outside the window)"
COLUMNS = 4
LINE = "#666666"


@dataclass(frozen=True)
class Panel:
    """One heat map; `parts` names the layers that begin at the rows `connections.edges`."""

    title: str
    connections: Connections
    axis: str
    parts: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="of train, demo or ablation, a state dict, or a published one")
    parser.add_argument("--model", help="the network's name, where the checkpoint does not say it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--layers", nargs="+", metavar="NAME", help="names or patterns such as 'Stage1.*' (default: 'Stage?.0.LayerB')"
    )
    what.add_argument("--stages", action="store_true", help="whole stages, each as one band")
    parser.add_argument("--beside", type=Path, metavar="CHECKPOINT", help="another network, drawn below the first")
    parser.add_argument("--beside-model", metavar="MODEL", help="its name, where its checkpoint does not say it")
    parser.add_argument("--titles", nargs="+", metavar="TEXT", help="instead of the file names, one a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out/heatmap.png"), help="default: out/heatmap.png")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0; ValueError for a file, a layer or a name that is none."""
    check_output(arguments.output)
    sources = [(arguments.checkpoint, arguments.model)]
    if arguments.beside is not None:
        sources.append((arguments.beside, arguments.beside_model))
    titles = arguments.titles or ["/".join(path.parts[-2:]) for path, _ in sources]
    if len(titles) != len(sources):
        raise ValueError(f"titles ({len(titles)}) must be as many as checkpoints ({len(sources)})")
    new_figure(1, 1)  # a missing matplotlib is found before a large checkpoint is read
    networks = []
    for title, (path, model) in zip(titles, sources, strict=True):
        network = load_network(path, model)
        try:
            panels = stage_panels(network) if arguments.stages else layer_panels(network, arguments.layers)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        networks.append((title, panels))
    save(draw(networks), arguments.output)
    count = sum(len(panels) for _, panels in networks)
    print(f"{count} heat map{'s' if count > 1 else ''} in {arguments.output}")
    return 0


def layer_panels(model: Backbone, patterns: list[str] | None = None) -> list[Panel]:
    """A panel for each chosen layer (default: layer B of the first block of every stage, as in the paper)."""
    panels = []
    for name, stage, layer in chosen_layers(model, patterns):
        title = f"{name}\n{_description(stage.plan, layer)}"
        panels.append(Panel(title, layer_connections(stage, layer), "source group (negative: layer's input)"))
    return panels


def stage_panels(model: Backbone) -> list[Panel]:
    """A panel for each stage, its layers below one another."""
    panels = []
    for name, stage in stages(model).items():
        parts = tuple(
            re.sub(r"^(Stage|Downsample)\d\.", "", layer.name) for layer in layers(model) if layer.stage is stage
        )
        title = f"{name}\n{stage.plan.layers[-1].in_channels} channels, k = {stage.plan.group_width}"
        panels.append(Panel(title, stage_connections(stage), "source group (negative: stage's input)", parts))
    return panels


def _description(plan: Plan, layer: int) -> str:
    shape = plan.layers[layer]
    window = "windowed" if shape.windowed else "not windowed"
    return f"{shape.in_channels}→{shape.out_channels} channels, k = {plan.group_width}, {window}"


def draw(networks: Sequence[tuple[str, Sequence[Panel]]]) -> Figure:
    """All panels, the networks below one another, with one colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rows: list[tuple[str, Sequence[Panel]]] = []
    for title, panels in networks:
        lines = -(-len(panels) // COLUMNS)
        line = -(-len(panels) // lines)
        rows += [(title if i == 0 else "", panels[i : i + line]) for i in range(0, len(panels), line)]
    columns = max(len(panels) for _, panels in rows)
    large = any(panel.parts for _, panels in rows for panel in panels)
    width, height = (4.6, 4.3) if large else (3.9, 3.1)
    figure = new_figure(width * columns + 1, height * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (title, panels), places in zip(rows, grid, strict=True):
        for axes in places[len(panels) :]:
            axes.axis("off")
        for axes, panel in zip(places, panels, strict=False):
            draw_panel(axes, panel)
        if title and len(networks) > 1:
            places[0].annotate(
                title, (0, 0.5), (-48, 0), "axes fraction", "offset points", rotation=90, ha="center", va="center",
                fontweight="bold",
            )  # fmt: skip
    colour = ScalarMappable(Normalize(0, 1), COLOURS)
    figure.colorbar(colour, ax=grid, label=LABEL, shrink=0.8, aspect=25)
    if len(networks) == 1:
        figure.suptitle(networks[0][0], fontweight="bold")
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Row 1 on top, white outside the window; a line between the input's groups and the layer's."""
    import matplotlib

    connections = panel.connections
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad="white")
    axes.imshow(connections.strength, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    targets, sources = connections.strength.shape
    axes.set_title(panel.title, fontsize=10)
    axes.set(xlabel=panel.axis, ylabel="target group")
    axes.set_yticks(*_ticks([str(i + 1) for i in range(targets)]))
    axes.set_xticks(*_ticks([str(source).replace("-", "−") for source in connections.sources]), rotation=0)
    inputs = sum(source < 0 for source in connections.sources)
    if inputs < sources:
        axes.axvline(inputs - 0.5, color=LINE, linewidth=0.8)
    ends = (*connections.edges, targets)[1:]
    for row, name, following in zip(connections.edges, panel.parts, ends, strict=True):
        if row:
            axes.axhline(row - 0.5, color=LINE, linewidth=0.5)
        axes.annotate(
            name, (sources - 0.3, (row + following - 1) / 2), ha="left", va="center", fontsize=6, annotation_clip=False
        )


def _ticks(names: list[str], most: int = 9) -> tuple[list[int], list[str]]:
    """Positions and names of at most so many ticks, the last one always among them."""
    step = -(-len(names) // most)
    places = list(range(len(names) - 1, -1, -step))[::-1]
    return places, [names[i] for i in places]


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.heatmap`."""
    return commands.run("heatmap", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

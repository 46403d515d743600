"""What a model costs: parameters, multiply-adds, the paper's GFLOPs, and the memory it keeps for backward.

Nothing is computed: the model runs on the meta device, where sizes are real and numbers are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from seqconv_triton.backend import use_backend
from seqconv_triton.models.backbone import Backbone
from seqconv_triton.models.registry import create_model, list_models
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan
from seqconv_triton.tools.arguments import add_image_size


@dataclass
class Row:
    """One part of a network: a stage, or a plain layer."""

    name: str
    image: tuple[int, int]
    parameters: int
    multiply_adds: int = 0
    norm_outputs: int = 0
    relu_outputs: int = 0
    plan: Plan | None = None


@dataclass
class Summary:
    """Counts for one image of image_size²; bytes are float32."""

    name: str
    image_size: int
    parameters: int
    parameter_tensors: int
    kept_bytes: int
    rows: list[Row]
    model: Backbone = field(repr=False)

    @cached_property
    def kept_bytes_reference(self) -> int:
        """Of the concatenating code. Takes seconds: it comes by every conv."""
        with use_backend("reference"):
            return kept_for_backward(self.model, self.image_size)

    @property
    def multiply_adds(self) -> int:
        """Of all convs and the classifier."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def paper_gflops(self) -> float:
        """The paper's count: conv multiply-adds, 2 per BN output and 3 per ReLU output, over 2^30; no classifier."""
        convs = sum(row.multiply_adds for row in self.rows if row.name != "classifier")
        rest = sum(2 * row.norm_outputs + 3 * row.relu_outputs for row in self.rows)
        return (convs + rest) / 2**30


def summarize(name: str, image_size: int | None = None) -> Summary:
    """The summary of a registered model at image_size² (default: what the paper uses, 224 or 32).

    Raises ValueError for an unknown name or an image_size below 1.
    """
    model = create_model(name, device="meta")
    size = model.image_size if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size ({size}) must be at least 1")
    parameters = list(model.parameters())
    with use_backend("aten"):
        kept = kept_for_backward(model, size)
    numbers = sum(p.numel() for p in parameters)
    return Summary(name, size, numbers, len(parameters), kept, count_operations(model, size), model)


def kept_for_backward(model: Backbone, image_size: int) -> int:
    """Bytes that one image's training step keeps between forward and backward.

    Unique storages only, as the saved tensors show them; without parameters, buffers and the image. Measured for two
    images and halved, since a single value per channel has no batch statistics.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(2, _in_channels(model), image_size, image_size, device="meta").to(memory_format=torch.channels_last)
    own.add(x.untyped_storage()._cdata)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.train()(x)
    del logits
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own) // 2


def _in_channels(model: Backbone) -> int:
    first = model.stem[0]
    assert isinstance(first, nn.Conv2d)
    return first.in_channels


def count_operations(model: Backbone, image_size: int) -> list[Row]:
    """A row for every conv, BN, stage and the classifier, for one image."""
    rows: list[Row] = []
    with _hooks(model, rows), torch.no_grad():
        model.eval()(torch.empty(1, _in_channels(model), image_size, image_size, device="meta"))
    return rows


@contextmanager
def _hooks(model: Backbone, rows: list[Row]) -> Iterator[None]:
    handles = []
    counted_with_their_stage = {
        norm for stage in model.modules() if isinstance(stage, PackedSeqConv) for norm in stage.children()
    }
    for name, module in model.named_modules():
        if module in counted_with_their_stage:
            continue
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | PackedSeqConv):

            def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                rows.append(_row(name, module, inputs[0], out))

            handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(name: str, module: nn.Module, x: Tensor, out: Tensor) -> Row:
    parameters = sum(p.numel() for p in module.parameters())
    image = (x.shape[2], x.shape[3]) if x.dim() == 4 else (1, 1)
    row = Row(name, image, parameters)
    if isinstance(module, nn.Conv2d):
        row.multiply_adds = out[0].numel() * module.weight[0].numel()
    elif isinstance(module, nn.Linear):
        row.multiply_adds = module.weight.numel()
    elif isinstance(module, nn.BatchNorm2d):
        row.norm_outputs = row.relu_outputs = out[0].numel()
    elif isinstance(module, PackedSeqConv):
        plan, pixels = module.plan, image[0] * image[1]
        row.multiply_adds = sum(plan.multiply_adds(*image))
        behind = len(plan.groups) * plan.group_width if plan.bottleneck else 0
        row.norm_outputs = row.relu_outputs = (plan.normalized_channels + behind) * pixels
        row.plan = plan
    return row


def render(summary: Summary, windows: bool = False) -> str:
    """The summary as a table; with the windows of every stage drawn below it."""
    lines = [
        f"{summary.name} at {summary.image_size}×{summary.image_size}",
        f"{'part':<12}{'image':>9}{'channels':>10}{'groups':>8}{'k':>5}{'s':>4}{'window':>12}"
        f"{'parameters':>13}{'G mult-adds':>13}",
    ]
    for row in summary.rows:
        plan: Any = row.plan
        shape = ("", "", "", "", "")
        if plan is not None:
            widths = sorted({group.window_width for group in plan.groups})
            window = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]}–{widths[-1]}"
            shape = (
                f"{plan.in_channels}→{plan.out_channels}", str(len(plan.groups)), str(plan.group_width),
                str(plan.subgroups), window,
            )  # fmt: skip
        image = f"{row.image[0]}×{row.image[1]}"
        lines.append(
            f"{row.name:<12}{image:>9}{shape[0]:>10}{shape[1]:>8}{shape[2]:>5}{shape[3]:>4}{shape[4]:>12}"
            f"{row.parameters:>13,}{row.multiply_adds / 1e9:>13.4f}"
        )
    lines += [
        f"parameters           {summary.parameters:,} in {summary.parameter_tensors} tensors",
        f"multiply-adds        {summary.multiply_adds / 1e9:.4f} G (convs and classifier)",
        f"the paper's GFLOPs   {summary.paper_gflops:.2f}",
        f"kept for backward    {summary.kept_bytes / 2**20:.1f} MiB an image in float32 "
        f"(concatenating: {summary.kept_bytes_reference / 2**20:.1f} MiB)",
    ]
    if windows:
        lines += [f"\n{row.name}: {row.plan}" for row in summary.rows if row.plan is not None]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model's name; without one, a line for every model")
    add_image_size(parser)
    parser.add_argument("--windows", action="store_true", help="also draw the windows of every stage")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Print one model's summary, or a line for each."""
    if arguments.model is not None:
        print(render(summarize(arguments.model, arguments.image_size), arguments.windows))
        return 0
    print(f"{'model':<34}{'parameters':>12}{'tensors':>9}{'G mult-adds':>13}{'paper GFLOPs':>14}{'MiB kept':>10}")
    for name in list_models():
        one = summarize(name, arguments.image_size)
        print(
            f"{name:<34}{one.parameters:>12,}{one.parameter_tensors:>9}{one.multiply_adds / 1e9:>13.4f}"
            f"{one.paper_gflops:>14.2f}{one.kept_bytes / 2**20:>10.1f}",
            flush=True,
        )
    return 0

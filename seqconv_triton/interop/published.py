"""Checkpoints under the published names (one conv and one BN a unit), both ways, bit for bit.

One table serves both directions: a row says which published tensor is which slice of which of ours. A published unit U
holds `U.LinearLayer.weight` and `U.BatchNormalizationLayer.{weight, bias, running_mean, running_var,
num_batches_tracked}`; our packed norms have one `num_batches_tracked` for all their units.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from seqconv_triton.backend.packing import transform_weights, window_weights
from seqconv_triton.interop import torch_file
from seqconv_triton.models.backbone import Backbone
from seqconv_triton.models.cifar import CifarSeqResNet
from seqconv_triton.models.imagenet import ImageNetNetwork, SeqResNeXt24
from seqconv_triton.nn.computed import make_weights, refuse_computed, refuse_offloaded
from seqconv_triton.nn.frozen_trial import VECTORS
from seqconv_triton.nn.layers import Stage
from seqconv_triton.nn.norm import Affine, is_batch_norm

AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)
LISTED = 20


class Entry(NamedTuple):
    """A published name and our tensor, a view of a packed one; `counter` marks a num_batches_tracked."""

    name: str
    ours: Tensor
    counter: bool = False


def _unit(name: str, weight: Tensor, norm: Any, start: int, count: int) -> Iterator[Entry]:
    """A published conv-BN unit: `weight`, and channels [start, start + count) of `norm`."""
    if isinstance(norm, Affine):
        raise ValueError("model is folded (seqconv_triton.fuse): it has no statistics; use the model it was made from")
    if not is_batch_norm(norm) or any(getattr(norm, vector) is None for vector in (*VECTORS, "num_batches_tracked")):
        raise ValueError(f"model has a {type(norm).__name__} where the published network has a BN with statistics")
    yield Entry(f"{name}.LinearLayer.weight", weight)
    unit = f"{name}.BatchNormalizationLayer"
    for vector in VECTORS:
        yield Entry(f"{unit}.{vector}", getattr(norm, vector)[start : start + count])
    yield Entry(f"{unit}.num_batches_tracked", norm.num_batches_tracked, counter=True)


def _groups(stage: Stage, names: list[str], split: bool) -> Iterator[Entry]:
    """The units of all groups of a stage, whose layers have these names, in the order of the plan."""
    plan, k = stage.plan, stage.plan.group_width
    offset = plan.total_channels - plan.normalized_channels
    assert stage.transform_weight is not None
    transform = transform_weights(stage.transform_weight, plan)
    reduce = () if stage.reduce_weight is None else window_weights(stage.reduce_weight, plan, 1)
    j = 0
    for name, layer in zip(names, plan.layers, strict=True):
        for i in range(layer.out_channels // k):
            outer = f"{name}.Filters.{i}"
            if stage.reduce_norm is not None:
                inner = f"{name}.BottleneckLayers.{i}" if split else f"{outer}.BottleneckLayer"
                outer = f"{name}.TransformationLayers.{i}" if split else f"{outer}.TransformationLayer"
                yield from _unit(inner, reduce[j], stage.reduce_norm, j * k, k)
            yield from _unit(outer, transform[j], stage.norm, plan.slot(j) - offset, k)
            j += 1


def layer_names(stage: Stage, number: int, entry: str) -> list[str]:
    """The published names of a stage's layers: entry, blocks, extension."""
    names, block = [], 0
    for layer, following in zip(stage.plan.layers, (*stage.plan.layers[1:], None), strict=True):
        if layer.entry:
            names.append(entry)
        elif layer.residual:
            names.append(f"Stage{number}.{block}.LayerB")
            block += 1
        elif following is not None and following.residual:
            names.append(f"Stage{number}.{block}.LayerA")
        else:
            names.append(f"Downsample{number}.ExtensionLayer")
    return names


def _entries(model: Backbone) -> Iterator[Entry]:
    """Every tensor of the model under its published name.

    A unit's conv and its BN can lie in different modules of ours: a stage owns the BN of what it reads.
    """
    split = isinstance(model, SeqResNeXt24)
    stages = [stage for stage in model.stages if isinstance(stage, Stage)]
    first = stages[0].plan
    convs = [module for module in model.stem if isinstance(module, nn.Conv2d)]
    if isinstance(model, ImageNetNetwork):
        dense = model.stem[-1]
        assert isinstance(dense, Stage) and isinstance(model.stem[1], nn.BatchNorm2d) and dense.tail_weight is not None
        yield from _unit("Head0", convs[0].weight, model.stem[1], 0, convs[0].out_channels)
        yield from _unit("Head1", convs[1].weight, dense.norm, 0, convs[1].out_channels)
        yield from _groups(dense, ["Head2"], split)
        yield from _unit("ShrinkingLayer", dense.tail_weight, stages[0].norm, 0, first.in_channels)
    elif isinstance(model, CifarSeqResNet):
        yield from _unit("Init", convs[0].weight, stages[0].norm, 0, convs[0].out_channels)
    else:
        raise TypeError(f"model must be one of the paper's networks, not {type(model).__name__}")
    for number, stage in enumerate(stages, 1):
        yield from _groups(stage, layer_names(stage, number, "Head"), split)
        last = number == len(stages)
        assert stage.tail_weight is not None
        norm = model.norm if last else stages[number].norm
        name = "Blender" if last else f"Downsample{number}.ShrinkingLayer"
        yield from _unit(name, stage.tail_weight, norm, 0, stage.plan.out_channels)
    if isinstance(model.classifier, nn.Linear):
        yield Entry("Classifier.weight", model.classifier.weight)
        yield Entry("Classifier.bias", model.classifier.bias)


def export_published(model: Backbone) -> dict[str, Tensor]:
    """The model's parameters and statistics under the published names, as copies.

    Weights that hooks compute (pruning) are computed first. Raises TypeError if model is none of the paper's networks,
    ValueError where it is folded or has no data, on the meta device.
    """
    _require_data(model, "be exported")
    with torch.no_grad():
        for module in model.modules():
            make_weights(module)
        return {entry.name: entry.ours.detach().clone() for entry in _entries(model)}


def load_published(
    model: AnyBackbone, source: str | os.PathLike[str] | IO[bytes] | Mapping[str, object]
) -> AnyBackbone:
    """Load a published checkpoint, from a file or a state dict, into the model, and return the model.

    A `state_dict` key around the entries and a `module.` prefix on all of them are taken off. Files are read with
    torch.load(weights_only=True): no code of theirs runs. Old files may lack the entries `num_batches_tracked`.
    A published SeqResNeXt-24 gives its accuracy only in `SeqResNeXt24(repeat_extension=True)`; no file says so.

    Raises ValueError, with the model unchanged, for a file that is no checkpoint, or with a list of all entries that
    are missing, unknown, misshapen or no numbers, or whose num_batches_tracked differ within one packed norm, and for a
    model on the meta device or with weights that are computed (parametrizations, pruning); TypeError if model is none
    of the paper's networks, or source nothing to load from; OSError as open() does.
    """
    _require_data(model, "be loaded")
    for name, module in model.named_modules():
        refuse_computed(name or type(model).__name__, module, "be loaded")
    given = unwrap(source if isinstance(source, Mapping) else read_file(source))
    with torch.no_grad():  # views that may be written
        entries = list(_entries(model))
    problems = _problems(entries, given)
    if problems:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}; nothing was loaded\n" + "\n".join(problems)
        )
    with torch.no_grad():
        for entry in entries:
            value = given.get(entry.name)
            if isinstance(value, Tensor):
                entry.ours.copy_(value)
    return model


def _require_data(model: object, purpose: str) -> None:
    if not isinstance(model, Backbone):
        raise TypeError(f"model must be one of the paper's networks, not {type(model).__name__}")
    refuse_offloaded(model, purpose)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"model is on the meta device: nothing there can {purpose}; call to_empty(device=…) first")


def read_file(source: str | os.PathLike[str] | IO[bytes]) -> Mapping[str, object]:
    """A dictionary from a file, without running code of it. ValueError for any other file, OSError as open() does."""
    if not isinstance(source, str | os.PathLike) and not hasattr(source, "seek"):
        raise TypeError(f"source must be a path, an open file or a state dict, not {type(source).__name__}")
    loaded = torch_file.read(source)
    if not isinstance(loaded, Mapping):
        where = torch_file.name_of(source)
        raise ValueError(f"{where} holds a {type(loaded).__name__}; expected a dictionary of tensors")
    return loaded


def unwrap(given: Mapping[str, object]) -> dict[str, object]:
    """A state dict out of its key `state_dict`, if it is in one, and without DataParallel's prefix."""
    inner = given.get("state_dict")
    entries = dict(inner if isinstance(inner, Mapping) else given)
    if entries and all(str(name).startswith("module.") for name in entries):
        entries = {name.removeprefix("module."): value for name, value in entries.items()}
    return entries


def _problems(entries: list[Entry], given: Mapping[str, object]) -> list[str]:
    """Everything that keeps `given` from being loaded, a line each."""
    wanted = {entry.name for entry in entries}
    missing = [entry.name for entry in entries if not entry.counter and entry.name not in given]
    extra = [str(name) for name in given if name not in wanted]
    wrong = []
    counters: dict[int, dict[int, str]] = {}
    for entry in entries:
        value = given.get(entry.name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.is_complex() or (value.is_floating_point() == entry.counter):
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            wrong.append(f"{entry.name} is {kind}")
        elif value.shape != entry.ours.shape:
            wrong.append(f"{entry.name} has shape {list(value.shape)}, expected {list(entry.ours.shape)}")
        elif entry.counter:
            counters.setdefault(entry.ours.data_ptr(), {}).setdefault(int(value), entry.name)
    uneven = [
        ", ".join(f"{name} is {count}" for count, name in values.items())
        for values in counters.values()
        if len(values) > 1
    ]
    listed = (("missing", missing), ("unknown", extra), ("wrong", wrong), ("counters that differ", uneven))
    return [line for kind, names in listed for line in _listing(kind, names)]


def _listing(kind: str, names: list[str]) -> list[str]:
    more = [f"  {kind}: … and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return [f"  {kind}: {name}" for name in names[:LISTED]] + more

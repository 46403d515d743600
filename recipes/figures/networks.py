"""A network from any checkpoint that this package or the published code writes, and its layers by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import seqconv_triton as sct
from recipes.training import architecture
from recipes.training.recipe import PRESETS
from seqconv_triton.interop.published import layer_names, load_published, read_file, unwrap
from seqconv_triton.models.backbone import Backbone

PREFIXES = ("module.", "_orig_mod.")
DEMO_KEYS = {"model", "epochs", "seed"}


class NamedLayer(NamedTuple):
    """A layer under its published name: number `layer` of the plan of a stage."""

    name: str
    stage: sct.Stage
    layer: int


def load_network(path: Path, model: str | None = None) -> Backbone:
    """The network of a checkpoint, in evaluation mode, on the CPU.

    Training and demo checkpoints say what they hold; plain state dicts and published checkpoints need `model`, a name
    of the registry. Classes and image channels are those of the weights. Raises ValueError for any other file, and for
    weights that do not fit.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a checkpoint in it")
    content = read_file(path)
    state = content.get("model", content) if isinstance(content.get("model"), Mapping) else content
    assert isinstance(state, Mapping)
    entries = unwrap(state)
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries.items()):
        raise ValueError(f"{path} holds no weights: expected a checkpoint or a state dict")
    entries = _without_prefixes(entries)
    published = any(name.endswith(".LinearLayer.weight") for name in entries)
    sizes = _sizes(entries, published)
    if model is not None:
        network = sct.create_model(model, **sizes)
    elif isinstance(content.get("arch"), Mapping):
        network = _from_arch(path, content["arch"], sizes)
    elif content.keys() == DEMO_KEYS:
        network = _demo_network(sizes)
    else:
        raise ValueError(f"{path} does not say which network it holds: add --model NAME (names: sct.list_models())")
    return _filled(path, network, entries, published)


def _without_prefixes(entries: dict[str, object]) -> dict[str, object]:
    """Without what torch.compile and DistributedDataParallel put in front of all names."""
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if entries and all(name.startswith(prefix) for name in entries):
                entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


def _sizes(entries: Mapping[str, object], published: bool) -> dict[str, int]:
    """Classes and image channels as the weights have them; what cannot be read stays at its default."""
    stems = ("Init.LinearLayer.weight", "Head0.LinearLayer.weight") if published else ("stem.0.weight",)
    classifier = entries.get("Classifier.weight" if published else "classifier.weight")
    stem = next((entries[name] for name in stems if name in entries), None)
    sizes = {"num_classes": classifier.shape[0] if isinstance(classifier, Tensor) and classifier.dim() == 2 else 0}
    if isinstance(stem, Tensor) and stem.dim() == 4:
        sizes["in_chans"] = stem.shape[1]
    return sizes


def _from_arch(path: Path, arch: object, sizes: dict[str, int]) -> Backbone:
    """What a training checkpoint calls its architecture: a name and its options."""
    if not isinstance(arch, Mapping) or not isinstance(arch.get("options"), Mapping):
        raise ValueError(f"{path} names its network in a way that is not known here: {arch!r:.100}")
    try:
        return architecture.build({"name": str(arch.get("name")), "options": {**arch["options"], **sizes}})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _demo_network(sizes: dict[str, int]) -> Backbone:
    preset = PRESETS["digits"]
    return architecture.build({"name": preset.model, "options": {**preset.model_options, **sizes}})


def _filled(path: Path, network: Backbone, entries: dict[str, object], published: bool) -> Backbone:
    kind = type(network).__name__
    if published:
        try:
            return load_published(network, entries).eval()
        except ValueError as error:
            reasons = str(error).splitlines()[1:]
            raise ValueError(f"{path} does not fit {kind}: {_first(reasons)}") from error
    wanted = network.state_dict()
    reasons = [f"missing: {name}" for name in wanted if name not in entries]
    reasons += [f"unknown: {name}" for name in entries if name not in wanted]
    for name, value in entries.items():
        if name in wanted and isinstance(value, Tensor) and value.shape != wanted[name].shape:
            reasons.append(f"{name} has shape {list(value.shape)}, expected {list(wanted[name].shape)}")
    if reasons:
        raise ValueError(f"{path} does not fit {kind}: {_first(reasons)}")
    network.load_state_dict(entries)
    return network.eval()


def _first(reasons: list[str]) -> str:
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{reasons[0].strip()}{more}"


def stages(model: Backbone) -> dict[str, sct.Stage]:
    """The stages by name, the stem's dense layer of the ImageNet networks in front."""
    named = {f"Stage{number}": stage for number, stage in enumerate(model.stages, 1) if isinstance(stage, sct.Stage)}
    dense = model.stem[-1]
    return {"Stem": dense, **named} if isinstance(dense, sct.Stage) else named


def layers(model: Backbone) -> list[NamedLayer]:
    """All layers of a network in order, under their published names."""
    named = stages(model)
    entry, first = ("Head2", 0) if "Stem" in named else ("Head", 1)
    return [
        NamedLayer(name, stage, i)
        for number, stage in enumerate(named.values(), first)
        for i, name in enumerate(layer_names(stage, number, entry))
    ]


def chosen_layers(model: Backbone, patterns: list[str] | None) -> list[NamedLayer]:
    """Layers that match shell patterns, in either case of letters; by default layer B of each stage's first block.

    Raises ValueError, listing all names, for a pattern that matches nothing.
    """
    available = layers(model)
    chosen: list[NamedLayer] = []
    for pattern in patterns if patterns is not None else ["Stage?.0.LayerB"]:
        matching = [layer for layer in available if fnmatchcase(layer.name.lower(), pattern.lower())]
        if not matching:
            names = ", ".join(layer.name for layer in available)
            raise ValueError(f"no layer is called {pattern!r}; there are {names}")
        chosen += [layer for layer in matching if layer not in chosen]
    return chosen

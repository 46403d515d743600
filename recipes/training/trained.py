"""A trained model from its checkpoint, ready for use, with what its images and answers mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.training import architecture, checkpoint
from recipes.training.images import Preprocess


@dataclass(frozen=True)
class Trained:
    """`model` in evaluation mode, with the averaged weights where the run had them."""

    model: nn.Module
    arch: dict[str, Any]
    classes: tuple[str, ...]
    preprocess: Preprocess
    data: str
    epoch: int
    best_error: float | None


def load(path: Path, device: torch.device | str = "cpu") -> Trained:
    """Raises OSError where there is no such file, ValueError for one that is damaged, foreign, or does not fit."""
    state = checkpoint.load(path)
    try:
        return _built(path, state, device)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole checkpoint of `train`: {type(error).__name__}: {error}") from error


def _built(path: Path, state: dict[str, Any], device: torch.device | str) -> Trained:
    if state["arch"]["options"].get("num_classes") != len(state["classes"]):
        outputs = state["arch"]["options"].get("num_classes")
        raise ValueError(f"{path} has names for {len(state['classes'])} classes, and a model of {outputs}")
    model = architecture.build(state["arch"])
    architecture.load_weights(model, state["ema"] or state["model"])
    return Trained(
        model.to(device).eval(), state["arch"], tuple(state["classes"]), Preprocess.from_dict(state["preprocess"]),
        state["config"]["data"], state["epoch"], state["best_error"],
    )  # fmt: skip

"""What the recipes' tests share: their commands, a tiny run on the digits, and what two runs must have in common."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from recipes.training import Config, checkpoint

OPTIONS = {"group_width": 16, "widen": 1}
TINY = [
    *("train", "--model", "cifar_custom", "--model-options", "group_width=16", "widen=1"),
    *("--train-images", "100", "--batch-size", "20", "--epochs", "2", "--device", "cpu"),
]


def recipe_module(name: str) -> ModuleType:
    """The module that `python -m recipes.NAME` runs."""
    return import_module(f"recipes.{name}{'.__main__' if name == 'ablation' else ''}")


def run_recipe(words: list[str]) -> int:
    """`python -m recipes.X …`, X the first word, in this process; its exit status."""
    name, *argv = words
    status: int = recipe_module(name).main(argv)
    return status


def tiny(output: Path, **settings: Any) -> Config:
    """TINY as a Config."""
    values: dict[str, Any] = dict(train_images=100, batch_size=20, epochs=2, device="cpu", model="cifar_custom")
    values |= {"model_options": OPTIONS, "quiet": True}
    return Config(output=output, **values | settings)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in pairs for key, leaf in flat(inner, f"{name}.{part}").items()}
    return {name: value}


def assert_same_run(got: Path, expected: Path) -> None:
    """Every bit of last.pt (weights, optimizer, averages, log) but for the times."""
    left, right = (flat(checkpoint.load(path / "last.pt")) for path in (got, expected))
    assert left.keys() == right.keys()
    for name, value in right.items():
        if name.rsplit(".", 1)[-1] in ("seconds", "images_per_second"):
            continue
        same = torch.equal(left[name], value) if isinstance(value, torch.Tensor) else left[name] == value
        assert same, name

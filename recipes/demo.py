"""`python -m recipes.demo`: a SeqResNet and a pre-activation ResNet of equal size on handwritten digits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import seqconv_triton as sct
from recipes import commands, files
from recipes.training import architecture, checkpoint
from recipes.training.baseline import PreactivationResNet, count_parameters, matching_widths
from recipes.training.determinism import reproducible
from recipes.training.distributed import usable_device
from recipes.training.evaluation import class_probabilities
from recipes.training.fit import History, fit
from recipes.training.recipe import PRESETS, Recipe
from seqconv_triton.optional import require

BASELINE_BLOCKS = 1
PREDICTED = 40  # images on the contact sheet


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does; `train_images` keeps that many of the 1,437 training images."""

    output: Path = Path("out/demo")
    epochs: int = 10
    seed: int = 0
    max_shift: float = 0.5
    train_images: int | None = None
    device: str | None = None


@dataclass
class Result:
    """One network's outcome."""

    name: str
    parameters: int
    test_accuracy: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=DemoConfig.output, help="folder (default: out/demo)")
    parser.add_argument("--epochs", type=int, default=DemoConfig.epochs, help=f"default: {DemoConfig.epochs}")
    parser.add_argument("--seed", type=int, default=DemoConfig.seed, help=f"default: {DemoConfig.seed}")
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda where there is one")


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0; ImportError where a package is missing."""
    require("the demo", "demo", "matplotlib", "sklearn", "tqdm")
    run(DemoConfig(arguments.output, arguments.epochs, arguments.seed, device=arguments.device))
    return 0


def networks(classes: int) -> dict[str, Callable[[], nn.Module]]:
    """Builders of both networks; the baseline's width follows from ours."""

    def ours() -> nn.Module:
        preset = PRESETS["digits"]
        options = preset.model_options | {"dropout": 0.0, "num_classes": classes, "in_chans": 1}
        return architecture.build({"name": preset.model, "options": options})

    def baseline(widths: tuple[int, int, int]) -> nn.Module:
        return PreactivationResNet(widths, BASELINE_BLOCKS, num_classes=classes, in_chans=1)

    widths = matching_widths(count_parameters(ours()), baseline)
    return {"SeqResNet": ours, "pre-activation ResNet": lambda: baseline(widths)}


def run(config: DemoConfig) -> list[Result]:
    """Train both networks, save everything under config.output, and print the comparison."""
    from tqdm import tqdm

    from recipes.figures import sheets
    from recipes.training import digits

    device = usable_device(config.device)
    data = digits.load(config.train_images)
    recipe = Recipe(config.epochs)
    config.output.mkdir(parents=True, exist_ok=True)
    print(f"{len(data.train)} training and {len(data.test)} test images of handwritten digits, 8×8, on {device}")
    results, histories = [], {}
    probabilities = torch.empty(0)
    test = (data.normalize(data.test.images), data.test.labels)
    for name, build in networks(digits.CLASSES).items():
        with reproducible(config.seed):
            model = build().to(device)
            generator = torch.Generator().manual_seed(config.seed)
            total = config.epochs * len(data.train)
            with tqdm(total=total, desc=f"{name:<21}", unit="image", unit_scale=True) as bar:

                def on_batch(images: int, loss: float, bar: tqdm = bar) -> None:
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update(images)

                batches = partial(data.training_batches, recipe.batch_size, config.max_shift, generator)
                history = fit(model, batches, test, recipe, on_batch=on_batch)
        histories[name] = history
        results.append(Result(name, count_parameters(model), history.test_accuracy[-1], history.seconds))
        file = config.output / f"{name.lower().replace(' ', '-')}.pt"
        checkpoint.save({"model": model.state_dict(), "epochs": config.epochs, "seed": config.seed}, file)
        if isinstance(model, sct.CifarSeqResNet):
            probabilities = class_probabilities(model, test[0][:PREDICTED])
    sheets.learning_curves(histories, config.output / "learning-curves.png")
    shown = data.test.images[:PREDICTED], data.test.labels[:PREDICTED]
    sheets.contact_sheet(*shown, probabilities, config.output / "predictions.png")
    write_results(config, results, histories)
    print(table(results, len(data.test)))
    print(f"checkpoints, predictions.png, learning-curves.png and results.json are in {config.output}")
    return results


def table(results: list[Result], test_images: int) -> str:
    lines = [f"{'':<23}{'parameters':>11}{'test accuracy':>15}{'wrong':>7}{'training time':>15}"]
    for result in results:
        wrong = round((1 - result.test_accuracy) * test_images)
        lines.append(
            f"{result.name:<23}{result.parameters:>11,}{result.test_accuracy:>14.2%}{wrong:>8}{result.seconds:>13.1f} s"
        )  # fmt: skip
    lines.append("Digits this small tell no two good networks apart: the paper's comparison is on CIFAR and ImageNet.")
    return "\n".join(lines)


def write_results(config: DemoConfig, results: list[Result], histories: dict[str, History]) -> None:
    figures = {
        "epochs": config.epochs,
        "seed": config.seed,
        "torch": torch.__version__,
        "networks": [asdict(result) | {"history": asdict(histories[result.name])} for result in results],
    }
    files.write(config.output / "results.json", json.dumps(figures, indent=1).encode() + b"\n")


def main(argv: list[str] | None = None) -> int:
    """`python -m recipes.demo`."""
    return commands.run("demo", add_arguments, run_from_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

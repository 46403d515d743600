"""What a training run is: one table of settings, for the API, the command line and the checkpoint alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from recipes.training.architecture import CUSTOM, parse_options
from recipes.training.recipe import PRESETS, Recipe

RUN, RECIPE, SPEED, KEEPING = "what", "recipe (default: the paper's for the data set)", "speed", "keeping and showing"


def setting(default: Any, group: str, text: str, *, free: bool = False, **argument: Any) -> Any:
    """A field: its group and text in --help. A `free` one may change when a run is resumed."""
    return field(default=default, metadata={"group": group, "text": text, "free": free, "argument": argument})


@dataclass(frozen=True)
class Config:
    """A training run. None takes what the data set's recipe says (recipe.py).

    `batch_size` counts the images of one optimiser step over all processes and all accumulated pieces. Rates are per
    step, epochs count from 1, errors are in per cent. Raises ValueError, naming the setting, for a wrong one.
    """

    data: str = setting("digits", RUN, "digits needs no files", choices=tuple(PRESETS))
    root: Path | None = setting(None, RUN, "folder of the data (not for digits)", free=True, type=Path)
    model: str | None = setting(
        None, RUN, f"name (sct.list_models()), or {CUSTOM}: CifarSeqResNet with --model-options"
    )
    model_options: Mapping[str, Any] | None = setting(
        None, RUN, "such as group_width=8 widen=4 blocks=1,2,1 dropout=0", nargs="*"
    )
    output: Path = setting(Path("out/train"), RUN, "folder of checkpoints and log", free=True, type=Path)
    seed: int = setting(0, RUN, "of weights, order and augmentation", type=int)
    train_images: int | None = setting(None, RUN, "keep that many training images", type=int)
    image_size: int | None = setting(None, RUN, "side of the images, imagefolder only (default: 224)", type=int)

    epochs: int | None = setting(None, RECIPE, "the drops of the learning rate move along", type=int)
    batch_size: int | None = setting(None, RECIPE, "images a step, over all processes", type=int)
    learning_rate: float | None = setting(None, RECIPE, "the first", type=float)
    momentum: float | None = setting(None, RECIPE, "Nesterov's", type=float)
    weight_decay: float | None = setting(None, RECIPE, "of every parameter", type=float)
    milestones: tuple[int, ...] | None = setting(None, RECIPE, "epochs before a ÷10", type=int, nargs="*")
    label_smoothing: float = setting(0.0, RECIPE, "share of the target spread over all classes", type=float)
    mixup: float = setting(0.0, RECIPE, "alpha of the Beta distribution; 0 is off", type=float)
    ema: float = setting(0.0, RECIPE, "decay of averaged weights, such as 0.999; 0 is off", type=float)
    max_shift: float = setting(0.5, RECIPE, "pixels by which digits are shifted", type=float)

    device: str | None = setting(None, SPEED, "cpu, cuda, … (default: cuda where there is one)", free=True)
    workers: int | None = setting(None, SPEED, "loading processes (default: up to 8; digits none)", free=True, type=int)
    amp: str | None = setting(None, SPEED, "mixed precision", choices=("bf16", "fp16"))
    compile: bool = setting(False, SPEED, "torch.compile the model", free=True)
    channels_last: bool = setting(False, SPEED, "weights of plain convs channels last (images always are)", free=True)
    accumulate: int = setting(1, SPEED, "backward passes a step, for batches beyond memory", type=int)
    sync_bn: bool = setting(False, SPEED, "BN statistics over all processes")
    deterministic: bool = setting(False, SPEED, "deterministic algorithms only", free=True)

    resume: bool = setting(False, KEEPING, "go on from last.pt in --output, or begin where there is none", free=True)
    checkpoint_steps: int | None = setting(None, KEEPING, "steps between checkpoints in an epoch", free=True, type=int)
    checkpoint_minutes: float = setting(10.0, KEEPING, "minutes between checkpoints", free=True, type=float)
    strict: bool = setting(False, KEEPING, "stop at an image that does not decode", free=True)
    tensorboard: bool = setting(False, KEEPING, "write TensorBoard files beside the log", free=True)
    quiet: bool = setting(False, KEEPING, "no progress, no line an epoch", free=True)

    def __post_init__(self) -> None:
        if self.data not in PRESETS:
            raise ValueError(f"data ({self.data!r}) must be one of {', '.join(PRESETS)}")
        if self.model_options and self.model is None:
            raise ValueError("model_options need a model: --model NAME")
        if (self.root is None) != (self.data == "digits"):
            have = "needs a root: the folder that holds it" if self.root is None else "takes no root"
            raise ValueError(f"data {self.data} {have}")
        if self.image_size is not None and self.data != "imagefolder":
            raise ValueError(f"image_size is for imagefolder: the images of {self.data} are what they are")
        for name in ("accumulate", "train_images", "image_size", "checkpoint_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        for name, below in (("label_smoothing", 1), ("ema", 1), ("mixup", float("inf")), ("max_shift", float("inf"))):
            if not 0 <= (value := getattr(self, name)) < below:
                raise ValueError(f"{name} ({value}) must be at least 0 and below {below}")
        for name in ("seed", "workers"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} ({value}) must be at least 0")
        if not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes ({self.checkpoint_minutes}) must be above 0")
        if self.amp not in (None, "bf16", "fp16"):
            raise ValueError(f"amp ({self.amp!r}) must be bf16 or fp16")
        epochs = PRESETS[self.data].recipe.epochs if self.epochs is None else self.epochs
        for milestone in self.milestones or ():
            if not 1 <= milestone <= epochs:
                raise ValueError(f"milestones ({milestone}) must be from 1 to the last epoch, {epochs}")
        if self.recipe.batch_size < self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must be at most batch_size ({self.recipe.batch_size})")

    @property
    def recipe(self) -> Recipe:
        """The data set's recipe with what this run changes."""
        names = ("epochs", "batch_size", "learning_rate", "momentum", "weight_decay")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        recipe = replace(PRESETS[self.data].recipe, **changes)
        if self.milestones is None:
            return recipe
        return replace(recipe, drops=tuple(milestone / recipe.epochs for milestone in self.milestones))

    def arch(self, classes: int, channels: int) -> dict[str, Any]:
        """The model as architecture.build takes it, for so many classes and image channels."""
        preset = PRESETS[self.data]
        options = dict((self.model_options or {}) if self.model else preset.model_options)
        return {"name": self.model or preset.model, "options": options | {"num_classes": classes, "in_chans": channels}}

    def binding(self) -> dict[str, Any]:
        """Plain values of all settings that decide what is trained: those that may not change on resuming."""
        recipe = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.recipe).items()
        }
        rest = {option.name: getattr(self, option.name) for option in fields(self) if not option.metadata["free"]}
        rest = {name: value for name, value in rest.items() if name not in recipe and name != "milestones"}
        rest["model"] = self.model or PRESETS[self.data].model
        return rest | recipe | {"model_options": dict(self.arch(0, 0)["options"])}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: before → now` for every setting (Config.binding), and every option of the model, that is not the same."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new)
        elif old != new:
            found.append(f"{name}: {old} → {new}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of Config, in its groups."""
    groups = {name: parser.add_argument_group(name) for name in (RUN, RECIPE, SPEED, KEEPING)}
    for option in fields(Config):
        argument = dict(option.metadata["argument"])
        text = option.metadata["text"]
        if isinstance(option.default, bool):
            argument["action"] = "store_true"
        elif option.name in ("epochs", "batch_size"):
            defaults = (f"{data} {getattr(preset.recipe, option.name)}" for data, preset in PRESETS.items())
            text += f" ({', '.join(defaults)})"
        elif option.default:
            text += f" (default: {option.default})"
        if "choices" not in argument and not isinstance(option.default, bool):
            argument["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(argument.get("type", str), "NAME")
        if option.name == "model_options":
            argument["metavar"] = "NAME=VALUE"
        flag = f"--{option.name.replace('_', '-')}"
        groups[option.metadata["group"]].add_argument(flag, default=option.default, help=text, **argument)


def from_arguments(arguments: argparse.Namespace) -> Config:
    values = {option.name: getattr(arguments, option.name) for option in fields(Config)}
    values["model_options"] = parse_options(values["model_options"] or ())
    if values["milestones"] is not None:
        values["milestones"] = tuple(values["milestones"])
    return Config(**values)

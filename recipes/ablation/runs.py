"""One network trained from one seed: its result, written when it is finished, and found again by a rerun."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recipes import files
from recipes.ablation import data
from recipes.ablation.settings import Contestant, Setting
from recipes.training import checkpoint
from recipes.training.baseline import count_parameters
from recipes.training.determinism import reproducible
from recipes.training.fit import History, fit


@dataclass
class Result:
    """The outcome of one run; `errors` are test errors in per cent after every epoch, losses in nats."""

    key: str
    seed: int
    setting: dict[str, Any]
    parameters: int
    train_images: int
    test_images: int
    errors: list[float]
    train_losses: list[float]
    torch: str

    @property
    def error(self) -> float:
        """After the last epoch: choosing the best one would be choosing on the test images."""
        return self.errors[-1]


def result_file(folder: Path, contestant: Contestant, seed: int) -> Path:
    return folder / f"{contestant.key}-seed{seed}.json"


def finished(folder: Path, contestant: Contestant, seed: int, setting: Setting) -> Result | None:
    """The result of an earlier run, if there is one.

    Raises ValueError where the file is none of ours or comes from another setting: the two must not be mixed.
    """
    path = result_file(folder, contestant, seed)
    if not path.exists():
        return None
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        complete = len(result.errors) == len(result.train_losses) == result.setting["epochs"]
        if not complete or (result.key, result.seed) != (contestant.key, seed):
            raise ValueError("it describes another run")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no result of this command ({error}); move it away") from error
    now = setting.as_dict()
    other = [
        f"{name} {result.setting.get(name)}, now {now[name]}" for name in now if result.setting.get(name) != now[name]
    ]
    if other:
        raise ValueError(f"{path} comes from another setting ({'; '.join(other)}): choose another --output")
    return result


def run(
    contestant: Contestant,
    seed: int,
    setting: Setting,
    root: Path | None,
    folder: Path,
    device: torch.device,
    on_epoch: Callable[[History], None] = lambda history: None,
) -> Result:
    """Train, write the result (and a SeqResNet's checkpoint, for heat maps) into `folder`, and return it."""
    with reproducible(seed):
        problem = data.load(setting, root, seed)
        folder.mkdir(parents=True, exist_ok=True)  # where that is impossible, nobody trains in vain
        model = contestant.build(setting).to(device)
        try:
            history = fit(model, problem.epoch_batches, problem.test, setting.recipe, on_epoch=on_epoch)
        except FloatingPointError as error:
            raise ValueError(f"{contestant.key}, seed {seed}: {error}") from error
    errors = [100 * (1 - accuracy) for accuracy in history.test_accuracy]
    result = Result(
        contestant.key,
        seed,
        setting.as_dict(),
        count_parameters(model),
        problem.train_images,
        len(problem.test[1]),
        [round(error, 4) for error in errors],
        [round(loss, 6) for loss in history.train_loss],
        torch.__version__,
    )
    path = result_file(folder, contestant, seed)
    if contestant.options is not None:
        state = {
            "model": model.state_dict(),
            "arch": {"name": "cifar_custom", "options": contestant.options(setting)},
            "epoch": setting.epochs,
            "seed": seed,
        }
        checkpoint.save(state, path.with_suffix(".pt"))
    files.write(path, json.dumps(asdict(result)).encode() + b"\n")
    return result

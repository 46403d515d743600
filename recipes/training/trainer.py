"""One optimizer step over the pieces of a batch, on one process or several."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import seqconv_triton as sct
from recipes.training import architecture
from recipes.training.config import Config
from recipes.training.distributed import Ranks
from recipes.training.order import seed_everything
from recipes.training.recipe import Recipe
from recipes.training.source import Batch

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A model with its optimizer, and all that one step depends on.

    Several ranks wrap the model in DistributedDataParallel; `model` stays the bare one.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        ranks: Ranks,
        *,
        amp: str | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        ema: float = 0.0,
    ) -> None:
        self.model, self.ranks = model, ranks
        self.label_smoothing, self.mixup = label_smoothing, mixup
        self.amp = None if amp is None else AMP[amp]
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum,
            weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=amp == "fp16")
        self.averaged: AveragedModel | None = None
        if ema:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        self.dtype = next(model.parameters()).dtype
        self.parallel = ranks.parallel(model)

    def autocast(self) -> Any:
        return torch.autocast(self.ranks.device.type, self.amp, enabled=self.amp is not None)

    def step(self, pieces: Iterable[Batch], count: int) -> Tensor:
        """One optimizer step over this rank's pieces of a global batch of `count` images.

        Returns [sum of the cross-entropy in nats, wrong predictions] of the pieces, on the device: nothing waits for
        them here. The gradient is that of the mean over the global batch, however it is divided.
        """
        self.optimizer.zero_grad()
        totals = torch.zeros(2, dtype=self.ranks.sums_dtype, device=self.ranks.device)
        pieces = list(pieces)
        for i, (images, labels) in enumerate(pieces):
            images = images.to(self.ranks.device, self.dtype, non_blocking=True)
            labels = labels.to(self.ranks.device, non_blocking=True)
            unfinished = i < len(pieces) - 1
            with self._without_exchange() if unfinished else nullcontext():
                with self.autocast():
                    loss, wrong = self._loss(images, labels)
                # DistributedDataParallel divides the summed gradients by the number of ranks.
                self.scaler.scale(loss * (self.ranks.world / count)).backward()
            totals += torch.stack([loss.detach(), wrong])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return totals

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _without_exchange(self) -> Any:
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of wrong predictions; under mixup (Zhang et al., 2018) of the larger share."""
        share, other = 1.0, labels
        if self.mixup:
            share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
            images, other = share * images + (1 - share) * images.flip(0), labels.flip(0)
        logits = self.parallel(images)
        loss = share * self._cross_entropy(logits, labels)
        if share < 1:
            loss = loss + (1 - share) * self._cross_entropy(logits, other)
        return loss, (logits.detach().argmax(1) != (labels if share >= 0.5 else other)).sum()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)


def build_trainer(config: Config, arch: dict[str, Any], ranks: Ranks) -> Trainer:
    """The network of `arch` (Config.arch), with weights from the run's seed, on this rank's device, and its trainer."""
    seed_everything(config.seed, "weights")
    model = architecture.build(arch, device=ranks.device)
    if config.sync_bn:
        sct.convert_sync_batchnorm(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(
        model, config.recipe, ranks, amp=config.amp, label_smoothing=config.label_smoothing, mixup=config.mixup,
        ema=config.ema,
    )  # fmt: skip
    if config.compile:
        model.compile()
    return trainer

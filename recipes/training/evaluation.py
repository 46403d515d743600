"""Loss, errors and class probabilities of a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.training.distributed import Ranks
from recipes.training.source import Batch


@dataclass(frozen=True)
class Evaluation:
    """Means over `images`: cross-entropy in nats, errors in per cent (top-5: None with five classes or fewer)."""

    images: int
    loss: float
    error: float
    top5_error: float | None


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], ranks: Ranks, autocast: Callable[[], Any] = nullcontext
) -> Evaluation:
    """Loss and errors over all ranks' batches. Raises ValueError where there is not one image."""
    model.eval()
    dtype = next(model.parameters()).dtype
    totals = torch.zeros(4, dtype=ranks.sums_dtype, device=ranks.device)
    classes = 0
    for images, labels in batches:
        labels = labels.to(ranks.device, non_blocking=True)
        with autocast():
            logits = model(images.to(ranks.device, dtype, non_blocking=True))
        classes = logits.shape[1]
        loss = F.cross_entropy(logits.to(totals.dtype), labels, reduction="sum")
        hits = logits.topk(min(5, classes)).indices == labels[:, None]
        totals += torch.stack([loss, (~hits[:, 0]).sum(), (~hits.any(1)).sum(), loss.new_tensor(len(labels))])
    loss, wrong, wrong5, count = ranks.sum_(totals).tolist()
    if not count:
        raise ValueError("there is not one image to evaluate on")
    return Evaluation(int(count), loss / count, 100 * wrong / count, 100 * wrong5 / count if classes > 5 else None)


@torch.inference_mode()
def class_probabilities(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Class probabilities [N, classes], on the CPU, of normalised images [N, C, H, W]."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(batch.to(device)).softmax(1).cpu() for batch in images.split(batch_size)])

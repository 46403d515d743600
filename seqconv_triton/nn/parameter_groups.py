"""Parameter groups for optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for any torch.optim optimizer: weights with `weight_decay`, biases and BN affines without.

    Rules that go by a parameter's dimensions (one: no decay) are wrong for this package, whose packed weights are
    flat where windows differ. Frozen parameters are left out. Raises ValueError for a negative weight_decay.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay ({weight_decay}) must be at least 0")
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
        for parameter in module.parameters(recurse=False)
    }
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = id(parameter) in norms or name.rsplit(".", 1)[-1] == "bias"
            groups[spared].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]

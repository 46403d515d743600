"""Registers all models with timm: after `import seqconv_triton.interop.timm`, timm.create_model knows their names.

Raises ImportError where timm (extra `timm`) cannot be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from seqconv_triton.interop.published import load_published
from seqconv_triton.models.backbone import Backbone
from seqconv_triton.models.cifar import CifarSeqResNet
from seqconv_triton.models.imagenet import SeqResNetB22, SeqResNetB42, SeqResNeXt24
from seqconv_triton.models.registry import MODELS

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

    from seqconv_triton.interop.timm_network import (
        TimmCifarSeqResNet,
        TimmNetwork,
        TimmSeqResNetB22,
        TimmSeqResNetB42,
        TimmSeqResNeXt24,
    )
except (ImportError, RuntimeError) as error:  # a torchvision beside another build of torch: RuntimeError
    raise ImportError(
        f"seqconv_triton.interop.timm needs timm (pip install 'seqconv-triton[timm]'), which fails to import: {error}"
    ) from error

__all__ = ["TimmNetwork"]  # register_model adds the models' names

CLASSES: dict[Any, type[TimmNetwork]] = {
    SeqResNetB22: TimmSeqResNetB22,
    SeqResNetB42: TimmSeqResNetB42,
    SeqResNeXt24: TimmSeqResNeXt24,
    CifarSeqResNet: TimmCifarSeqResNet,
}
NAMES = {"first_conv": "stem.0", "classifier": "classifier"}
PAPER = "Sequentially Aggregated Convolutional Networks"
# ImageNet as in the paper: the short side to 256, the middle 224². CIFAR: 32² as they are.
IMAGENET = {"input_size": (3, 224, 224), "pool_size": (7, 7), "num_classes": 1000, "crop_pct": 0.875}
CIFAR = {
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "num_classes": 10,
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
default_cfgs = generate_default_cfgs(
    {
        name: {
            **(CIFAR if name.startswith("cifar") else IMAGENET),
            **NAMES,
            "interpolation": "bilinear",
            "paper_name": PAPER,
        }
        for name in MODELS
    }
)


def network(name: str) -> Callable[..., TimmNetwork]:
    """The timm class of a registered model, with its own arguments bound."""
    entry = MODELS[name]
    if isinstance(entry, partial):
        return partial(CLASSES[entry.func], *entry.args, **entry.keywords)
    return CLASSES[entry]


def from_published(state: Mapping[str, Tensor], model: Backbone) -> Mapping[str, Tensor]:
    """A state dict as it is, or one under the published names turned into ours."""
    return load_published(model, state).state_dict() if "Classifier.weight" in state else state


def _entrypoint(name: str) -> Callable[..., Any]:
    stages = 3 if name.startswith("cifar") else 4

    def create(pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            cfg = resolve_pretrained_cfg(name, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
            if not (cfg.has_weights or cfg.state_dict):
                raise RuntimeError(
                    f"no weights are shipped for {name}; use pretrained=False, or name a checkpoint of your own: "
                    "pretrained_cfg_overlay=dict(file=…)"
                )
        kind = options.pop("feature_cls", "getter")
        if kind != "getter":
            raise ValueError(f"feature_cls ({kind!r}) must be 'getter': a stage's output is raw, its features are not")
        return build_model_with_cfg(
            network(name),
            name,
            pretrained,
            pretrained_filter_fn=from_published,
            feature_cfg={"out_indices": tuple(range(stages)), "feature_cls": "getter"},
            **options,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name} with timm's interface; options as in timm.create_model."
    return register_model(create)


for _name in MODELS:
    setattr(sys.modules[__name__], _name, _entrypoint(_name))

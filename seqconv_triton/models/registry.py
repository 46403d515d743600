"""Models by name: the ImageNet networks, and one name for every row of the paper's CIFAR tables."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

from seqconv_triton.models.backbone import Backbone
from seqconv_triton.models.cifar import CifarSeqResNet
from seqconv_triton.models.imagenet import SeqResNetB22, SeqResNetB42, SeqResNeXt24

# r is the widening factor and k the group width; a name says what differs from one windowed block a stage.
MODELS: dict[str, Callable[..., Backbone]] = {
    "seqresnet_b22": SeqResNetB22,
    "seqresnet_b42": SeqResNetB42,
    "seqresnext_24": SeqResNeXt24,
    "cifar_seqresnet_r4_k8": partial(CifarSeqResNet, 8, 4),
    "cifar_seqresnet_r10_k8": partial(CifarSeqResNet, 8, 10),
    "cifar_seqresnet_b_r7_k16": partial(CifarSeqResNet, 16, 7, bottleneck=True),
    "cifar_seqresnet_b_r20_k32": partial(CifarSeqResNet, 32, 20, bottleneck=True),
    "cifar_seqresnet_dense_r3_k8_n121": partial(CifarSeqResNet, 8, 3, (1, 2, 1), windowed=False),
    "cifar_seqresnet_r4_k16": partial(CifarSeqResNet, 16, 4),
    "cifar_seqresnet_r3_k16_n122": partial(CifarSeqResNet, 16, 3, (1, 2, 2)),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models, or of those that match a shell pattern such as `cifar_*`, sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **options: Any) -> Backbone:
    """A model by name; `options` go to its class (num_classes, in_chans, device, …).

    Raises ValueError for an unknown name, with the nearest ones.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} (all names: sct.list_models(), python -m seqconv_triton info)")
    return MODELS[name](**options)

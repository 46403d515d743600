"""Rooflines of other networks from the shapes of their convs: ResNet-50, ResNet-101, ResNet-152 (He et al., 2016).

Assumed is what a compiler makes of them at best. A conv reads its input and its weight and writes its output once. BN,
with ReLU and the shortcut's addition, is one pass in evaluation, which reads and writes, or folded into the conv. In
training statistics read once, normalising reads and writes, and backward is two passes over three tensors each; a
conv's backward is two convs. Pooling, classifier and issue slots are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from seqconv_triton.tools.ceilings import Ceilings

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
EXPANSION = 4  # of a bottleneck block: its outputs over the channels inside
# Passes of a BN by mode, each by the number of tensors that it reads and writes.
PASSES = {"eval": (2,), "folded": (), "train": (1, 2, 3, 3)}


class Conv(NamedTuple):
    """Elements of input, weight and output, and multiply-adds."""

    inputs: int
    weights: int
    outputs: int
    multiply_adds: int


class Roofline(NamedTuple):
    """Seconds of bytes and of FLOPs, and the sum over convs and passes of the larger of the two."""

    launches: int
    bytes_seconds: float
    operations_seconds: float
    roofline_seconds: float


def conv(c_in: int, c_out: int, kernel: int, size: int, stride: int, batch: int) -> Conv:
    """Of `size`² inputs."""
    weights, outputs = c_in * c_out * kernel**2, batch * c_out * (size // stride) ** 2
    return Conv(batch * c_in * size**2, weights, outputs, outputs * c_in * kernel**2)


def convs(name: str, batch: int, image: int = 224) -> Iterator[Conv]:
    """All convs of a network, each of which has a BN behind it. `image` is a multiple of 32."""
    yield conv(3, 64, 7, image, 2, batch)
    size, channels = image // 4, 64  # behind the pooling
    for stage, blocks in enumerate(BLOCKS[name]):
        inside = 64 << stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            yield conv(channels, inside, 1, size, 1, batch)
            yield conv(inside, inside, 3, size, stride, batch)
            yield conv(inside, EXPANSION * inside, 1, size // stride, 1, batch)
            if block == 0:
                yield conv(channels, EXPANSION * inside, 1, size, stride, batch)
            size, channels = size // stride, EXPANSION * inside


def roofline(name: str, mode: str, batch: int, ceilings: Ceilings, element_size: int = 2, image: int = 224) -> Roofline:
    """Of "eval", "folded" (an evaluation with the BNs folded into the convs) or "train"."""
    work: list[tuple[int, int]] = []  # FLOPs, bytes
    for c in convs(name, batch, image):
        work += [(2 * c.multiply_adds, element_size * (c.inputs + c.weights + c.outputs))] * (
            3 if mode == "train" else 1
        )
        work += [(0, element_size * tensors * c.outputs) for tensors in PASSES[mode]]
    return Roofline(
        len(work),
        sum(moved for _, moved in work) / ceilings.bytes_per_second,
        sum(operations for operations, _ in work) / ceilings.operations_per_second,
        sum(ceilings.roofline(operations, moved) for operations, moved in work),
    )

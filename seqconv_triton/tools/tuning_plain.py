"""What the tunable launchers compute, written with PyTorch's own convolutions in float32: the tuner's yardstick.

Each function takes what its launcher takes, changes nothing, and returns the launcher's results in the order of
`tuning_calls.results`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from seqconv_triton.kernels.data_gradient import Fresh
from seqconv_triton.kernels.launch import (
    BIAS,
    MEAN,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    A,
    B,
    C,
    ConvShape,
    Features,
    Readers,
    Scratch,
)


def convolution(
    source: Features,
    start: int,
    weight: Tensor,
    shape: ConvShape,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    shortcut: Tensor | None = None,
    norm: Tensor | None = None,
    scratch: Scratch | None = None,
    eps: float = 0.0,
) -> list[Tensor]:
    """The output, and where statistics are taken `norm`'s MEAN, VAR, SCALE and SHIFT."""
    x = _repeated(_activated(source, start, shape.read), mask, shape)
    y = _rows(conv2d(x, _square(weight, shape), None, shape.stride, shape.kernel // 2, 1, _groups(shape)))
    if shortcut is not None:
        y = y + shortcut.float()
    if norm is None or scratch is None:
        return [y]
    var, mean = torch.var_mean(y, 0, unbiased=False)
    scale = norm[WEIGHT] * (var + eps).rsqrt()
    return [y, mean, var, scale, norm[BIAS] - scale * mean]


def data_gradient(
    dy: Tensor,
    weight: Tensor,
    shape: ConvShape,
    readers: Readers,
    span: tuple[int, int],
    target: int,
    channels: int,
    out: Tensor,
    eps: float,
    *,
    windows: bool,
    fresh: Fresh | None = None,
    mask: Tensor | None = None,
    upstream: Tensor | None = None,
    raw: Tensor | None = None,
    norm: Tensor | None = None,
    scratch: Scratch | None = None,
    batch: bool = True,
) -> list[Tensor]:
    """The gradient; with `norm` that BN's rows from D_WEIGHT on; with `fresh` the first reader's completed dy."""
    g = torch.zeros((shape.in_pixels, channels), dtype=torch.float32, device=out.device)
    completed = None if fresh is None else _through_norm(fresh).to(dy.dtype)
    for i in range(*span):
        begin, width, offset, dropped = readers.rows.tolist()[i]
        own = completed if completed is not None and i == span[0] else dy[i]
        own_shape = shape._replace(group_in=width, group_out=shape.c_out) if windows else shape
        size = shape.c_out * shape.kernel**2 * own_shape.group_in
        own_weight = _square(weight.reshape(-1)[offset : offset + size], own_shape)
        dx = conv2d_input(
            (shape.batch, own_shape.total_in, shape.height, shape.width), own_weight,
            _images(own.float(), shape.batch, shape.out_height, shape.out_width),
            shape.stride, shape.kernel // 2, 1, _groups(own_shape),
        )  # fmt: skip
        first, last = max(target, begin), min(target + channels, begin + width)
        if first >= last:
            continue
        seen = _rows(dx[:, first - begin : last - begin])
        if mask is not None:
            keep = mask[:, dropped + first - begin : dropped + last - begin].float()
            seen = seen * keep.repeat_interleave(shape.height * shape.width, 0)
        g[:, first - target : last - target] += seen
    if upstream is not None:
        g += upstream.float()
    results = [g]
    if norm is not None and raw is not None:
        value = raw.float()
        results[0] = g = torch.where(value * norm[SCALE] + norm[SHIFT] > 0, g, 0.0)
        results.extend(_norm_gradients(g, value, norm, eps, batch))
    return results if completed is None else [*results, completed]


def weight_gradient(
    dy: Tensor,
    source: Features,
    shape: ConvShape,
    groups: Readers,
    widest: int,
    windows: bool,
    size: int,
    *,
    own_source: bool = False,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """The flat gradient."""
    flat = torch.zeros(size, dtype=torch.float32, device=dy.device)
    for i, (start, width, offset, dropped) in enumerate(groups.rows.tolist()):
        given, own = source, shape
        if windows:
            own = shape._replace(group_in=width, group_out=shape.c_out, read=width)
        if own_source:
            part = slice(i * source.rows.shape[-1], (i + 1) * source.rows.shape[-1])
            given = Features(source.rows[i], source.scale[part], source.shift[part], source.identity)
        kept = None if mask is None else mask[:, dropped : dropped + own.read]
        x = _repeated(_activated(given, start, own.read), kept, own)
        grid = _images(dy[i].float(), shape.batch, shape.out_height, shape.out_width)
        gradient = conv2d_weight(
            x, (own.c_out, own.group_in, own.kernel, own.kernel), grid, own.stride, own.kernel // 2, 1, _groups(own)
        )
        gradient = gradient.permute(0, 2, 3, 1).reshape(-1)
        flat[offset : offset + len(gradient)] = gradient
    return [flat]


def _groups(shape: ConvShape) -> int:
    return shape.c_out // shape.group_out


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _images(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _square(weight: Tensor, shape: ConvShape) -> Tensor:
    """[c_out, taps, c_in] as [c_out, c_in, kernel, kernel] in float32."""
    return weight.float().reshape(shape.c_out, shape.kernel, shape.kernel, shape.group_in).permute(0, 3, 1, 2)


def _activated(source: Features, start: int, read: int) -> Tensor:
    """[P, read] as a reader sees it, in float32."""
    rows = source.rows
    if source.block:
        first = start // source.block
        rows = rows[first : -(-(start + read) // source.block)].transpose(0, 1).flatten(1)
        raw = rows[:, start - first * source.block :][:, :read].float()
    else:
        raw = rows[:, start : start + read].float()
    positive = (raw * source.scale[start : start + read] + source.shift[start : start + read]).relu()
    identity = max(0, source.identity - start)
    positive[:, :identity] = raw[:, :identity]
    return positive


def _repeated(rows: Tensor, mask: Tensor | None, shape: ConvShape) -> Tensor:
    """The channels that a conv reads, as often as it reads them, as images; dropped channels are zero."""
    if mask is not None:
        rows = rows * mask[:, : rows.shape[1]].float().repeat_interleave(shape.height * shape.width, 0)
    rows = rows.repeat(1, -(-shape.total_in // shape.read))[:, : shape.total_in]
    return _images(rows, shape.batch, shape.height, shape.width)


def _through_norm(fresh: Fresh) -> Tensor:
    norm = fresh.norm
    dy = norm[A] * fresh.g.float() + norm[B] * fresh.raw.float() + norm[C]
    for more in (fresh.upstream, fresh.passed):
        if more is not None:
            dy = dy + more.float()
    return dy


def _norm_gradients(g: Tensor, raw: Tensor, norm: Tensor, eps: float, batch: bool) -> list[Tensor]:
    rstd = (norm[VAR] + eps).rsqrt()
    normal = (raw - norm[MEAN]) * rstd
    d_weight, d_bias = (g * normal).sum(0), g.sum(0)
    a = norm[WEIGHT] * rstd
    b = -a * rstd * d_weight / len(g) if batch else torch.zeros_like(a)
    c = -a * d_bias / len(g) - b * norm[MEAN] if batch else torch.zeros_like(a)
    return [d_weight, d_bias, a, b, c]

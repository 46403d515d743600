"""The kernels of the backward pass alone, in the interpreter, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import error

pytest.importorskip("triton", reason="Triton is for Linux only")

from kernel_operands import (
    CONVOLUTIONS,
    EPS,
    NAN,
    assert_bn_backward,
    conv,
    empty_gradient,
    flat,
    images,
    normal,
    random_norm,
    random_weight,
    shape_of,
)

from seqconv_triton.backend.triton.parts import in_blocks, mirrored, packed
from seqconv_triton.kernels import launch
from seqconv_triton.kernels.launch import BatchNorm, ConvShape, Scratch, Windows
from seqconv_triton.kernels.pixels import pixel_table
from seqconv_triton.kernels.pull import NewestGradient, pull
from seqconv_triton.kernels.transposed import transposed
from seqconv_triton.kernels.weight_gradient import conv_gradient, window_gradient


@pytest.mark.parametrize("through", [True, False], ids=["through-relu", "plain"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_transposed(case: str, through: bool) -> None:
    shape = shape_of(case)
    weight, channels = random_weight(shape), shape.total_in
    ready = mirrored(in_blocks(weight, shape), packed(shape).group_out)
    raw, norm, into = torch.randn(shape.in_pixels, channels), random_norm(channels), empty_gradient(channels)
    scratch, g = Scratch.allocate(raw, shape.in_pixels, channels), torch.full((shape.in_pixels, channels), NAN)
    dy = torch.randn(shape.out_pixels, shape.c_out + 2)[:, 1:-1]
    x = images(raw, shape).requires_grad_()
    (exact,) = torch.autograd.grad(conv(x, weight, shape), x, images(dy.contiguous(), shape, out=True))
    if not through:
        transposed(dy, ready, packed(shape), g)
        assert error(g, flat(exact)) < 1e-6
    elif shape.stride > 1:
        with pytest.raises(ValueError, match=f"stride {shape.stride}"):
            transposed(dy, ready, packed(shape), g, raw=raw, norm=norm, into=into, scratch=scratch, eps=EPS)
    else:
        transposed(dy, ready, packed(shape), g, raw=raw, norm=norm, into=into, scratch=scratch, eps=EPS)
        exact = flat(exact) * (normal(raw, norm) > 0)
        assert error(g, exact) < 1e-6
        assert_bn_backward(norm, into, exact, raw)
        assert scratch.counters.eq(0).all()


def windows_of(shape: ConvShape, table: list[tuple[int, int]] | None) -> tuple[Windows, list[tuple[int, int]]]:
    """Three groups' windows, uniform or any, and where each begins and how many channels it has."""
    k, taps = shape.c_out, shape.kernel**2
    if table is None:
        c = shape.group_in
        return Windows(shape, c, c, None, launch.alignment(k, c)), [(i * k, c) for i in range(3)]
    rows, weight, mask = [], 0, 0
    for start, channels in table:
        rows.append((start, channels, weight, mask))
        weight, mask = weight + k * taps * channels, mask + channels
    most = max(channels for _, channels in table)
    align = launch.alignment(*(entry for row in rows for entry in row))
    return Windows(shape._replace(group_in=most), most, most, torch.tensor(rows), align), table


WINDOWS = {
    "uniform": None,
    "dense": [(0, 16), (0, 24), (0, 32)],
    "odd": [(0, 5), (0, 13), (2, 19)],
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropout"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_backward(case: str, kernel: int, masked: bool) -> None:
    """Pull and weight gradient of three groups of eight channels, against autograd on their convs."""
    k, shape = 8, ConvShape(2, 4, 3, kernel, 1, 8, 16, 8)
    windows, spans = windows_of(shape, WINDOWS[case])
    channels = max(start + count for start, count in spans)
    size = sum(k * kernel**2 * count for _, count in spans)
    flat_weight, dz = torch.randn(size), torch.randn(3, shape.in_pixels, k)
    mask = torch.rand(2, sum(count for _, count in spans)) if masked else None
    raw, norm = torch.randn(shape.in_pixels, channels), random_norm(channels)
    x = images(normal(raw, norm).relu(), shape).requires_grad_()
    weights, outs, place, column = [], [], 0, 0
    for start, count in spans:
        length = k * kernel**2 * count
        own = flat_weight[place : place + length].view(k, kernel, kernel, count).permute(0, 3, 1, 2)
        weights.append(own.double().requires_grad_())
        seen = x[:, start : start + count]
        if mask is not None:
            seen = seen * mask[:, column : column + count].double()[:, :, None, None]
        outs.append(F.conv2d(seen, weights[-1], padding=kernel // 2))
        place, column = place + length, column + count
    exact_x, *exact_weights = torch.autograd.grad(outs, [x, *weights], [images(d, shape) for d in dz])

    for target, count, upstream in ((0, channels, None), (5, 8, torch.randn(shape.in_pixels, 8)), (8, 8, None)):
        g = torch.full((shape.in_pixels, count), NAN)
        pull(dz, flat_weight, windows, (0, 3), target, g, mask=mask, upstream=upstream)
        expected = flat(exact_x)[:, target : target + count] + (0 if upstream is None else upstream)
        assert error(g, expected) < 1e-6
    bits = pixel_table(shape, raw)[0] if kernel > 1 else None
    got = window_gradient(dz, raw, windows, size, norm=norm, identity=0, bits=bits, mask=mask, eps=EPS)
    assert error(got, torch.cat([w.flatten() for w in exact_weights])) < 1e-6


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "running"])
def test_pull_completes_the_first_readers_gradient(batch: bool) -> None:
    """g and z of the first reader, in front of its BN: dz is stored, and the sums of the next BN are taken."""
    k, shape = 8, ConvShape(2, 5, 3, 1, 1, 8, 16, 8)
    windows, _ = windows_of(shape, None)
    weight, dz = torch.randn(3 * k * 16), torch.randn(3, shape.in_pixels, k)
    g, z, coefficients = torch.randn(shape.in_pixels, k), torch.randn(shape.in_pixels, k), torch.randn(3, k)
    a, b, c = coefficients.double()
    exact_dz = dz.double()
    exact_dz[1] = a * g + b * z + c
    dz[1] = NAN
    exact = sum(exact_dz[i] @ weight.double().view(3, k, 16)[i, :, 16 - 8 * i : 24 - 8 * i] for i in (1, 2))
    raw, norm, into = torch.randn(shape.in_pixels, k), random_norm(k), empty_gradient(k)
    out, scratch = torch.full((shape.in_pixels, k), NAN), Scratch.allocate(raw, shape.in_pixels, k)
    pull(
        dz, weight, windows, (1, 3), 16, out, newest=NewestGradient(g, z, coefficients), raw=raw, norm=norm, into=into,
        scratch=scratch, eps=EPS, batch=batch,
    )  # fmt: skip
    exact = exact * (normal(raw, norm) > 0)
    assert error(out, exact) < 1e-6 and error(dz, exact_dz) < 1e-6
    if batch:
        assert_bn_backward(norm, into, exact, raw)
    else:
        scale = norm.weight.double() * (norm.var.double() + EPS).rsqrt()
        assert error(into.coefficients, torch.stack([scale, 0 * scale, 0 * scale])) < 1e-6


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv_gradient(case: str) -> None:
    """Of two convs of one shape; the first channels of the input are activated already."""
    shape, identity = shape_of(case), 5
    x, norms = torch.randn(2, shape.in_pixels, shape.total_in), [random_norm(shape.total_in) for _ in range(2)]
    dy = torch.randn(2, shape.out_pixels, shape.c_out)
    table = pixel_table(shape, x) if shape.kernel > 1 or shape.stride > 1 else None
    both = BatchNorm(*(torch.cat(vectors) for vectors in zip(*norms, strict=True)))
    size = shape.c_out * shape.group_in * shape.kernel**2
    got = conv_gradient(dy, x, shape, 2 * size, norm=both, table=table, eps=EPS).view(2, -1)
    exacts = []
    for i in range(2):
        weight = random_weight(shape).double().requires_grad_()
        out = conv(images(normal(x[i], norms[i]).relu(), shape), weight, shape)
        exacts.append(torch.autograd.grad(out, weight, images(dy[i], shape, out=True))[0])
        assert error(got[i], exacts[i].flatten()) < 1e-6

    behind = BatchNorm(*(vector[identity:] for vector in norms[0]))
    mask = torch.rand(shape.batch, shape.total_in)
    got = conv_gradient(
        dy[:1], x[:1], shape, size, norm=behind, identity=identity, table=table, mask=mask, eps=EPS
    )  # fmt: skip
    seen = normal(x[0], norms[0]).relu()
    seen[:, :identity] = x[0, :, :identity].double()
    weight = random_weight(shape).double().requires_grad_()
    out = conv(images(seen, shape) * mask.double()[:, :, None, None], weight, shape)
    (exact,) = torch.autograd.grad(out, weight, images(dy[0], shape, out=True))
    assert error(got, exact.flatten()) < 1e-6

"""Backward-data in pull form: a channel's gradient is gathered from every later conv that read it.

g[p, c] = Σ_i mask_i · Σ_taps W_i[:, c − start_i, tap]ᵀ · dy_i[p − tap]  over the readers i whose window holds c; then
the ReLU mask of channel c, and the two sums that BN's backward needs. Written once, accumulated in float32.
The same kernel takes a gradient back through a group's 3×3 conv and through the tail: one reader, all channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_reader", "last_reader"])
def data_gradient_kernel(
    dy_ptr, weight_ptr, readers_ptr, mask_ptr, upstream_ptr, raw_ptr, scale_ptr, shift_ptr, mean_ptr, var_ptr,
    g_ptr, tile_g_ptr, tile_gx_ptr,
    first_reader, last_reader, target, P, H, W, OUT_H, OUT_W, eps,
    stride_dy, step_dy, stride_mask, stride_upstream, stride_raw, stride_g,
    C: tl.constexpr, ROWS: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr, RANGE: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_UPSTREAM: tl.constexpr, NORM: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of buffer channels [target, target + C).

    A row of `readers` is (window start, window width, offset of its weight, offset of its mask); reader i's dy begins
    i·step_dy elements on. WINDOWS: a reader's conv is dense over its own window; otherwise conv groups of GROUP_IN to
    GROUP_OUT channels, of which RANGE outputs, from the tile's first group on, cover the tile.
    """
    pid_p, pid_n = tl.program_id(0), tl.program_id(1)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    if WIDE:
        offs_p = offs_p.to(tl.int64)
    mask_p = offs_p < P
    image = offs_p // (H * W)
    at_h, at_w = (offs_p // W) % H, offs_p % W
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C

    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for reader in range(first_reader, last_reader):
        start = tl.load(readers_ptr + reader * 4)
        width = tl.load(readers_ptr + reader * 4 + 1)
        weights = weight_ptr + tl.load(readers_ptr + reader * 4 + 2)
        source = dy_ptr + tl.cast(reader, tl.int64) * step_dy
        column = target + offs_n - start  # of the tile's channels in the reader's window
        seen = mask_n & (column >= 0) & (column < width)
        part = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
        for tap in range(KERNEL * KERNEL):
            up_h = at_h + KERNEL // 2 - tap // KERNEL
            up_w = at_w + KERNEL // 2 - tap % KERNEL
            out_h, out_w = up_h // STRIDE, up_w // STRIDE
            inside = mask_p & (up_h >= 0) & (up_w >= 0) & (out_h < OUT_H) & (out_w < OUT_W)
            if STRIDE > 1:
                inside = inside & (up_h % STRIDE == 0) & (up_w % STRIDE == 0)
            rows = source + ((image * OUT_H + out_h) * OUT_W + out_w) * stride_dy
            for k0 in range(0, RANGE, BLOCK_K):
                offs_k = k0 + tl.arange(0, BLOCK_K)
                if WINDOWS:
                    inner = column[None, :] + tl.zeros((BLOCK_K, 1), dtype=tl.int64)
                    row_length = width
                    held = seen[None, :]
                else:
                    lowest = pid_n * BLOCK_N + target - start
                    offs_k += (lowest // GROUP_IN) * GROUP_OUT
                    inner = column[None, :] - (offs_k // GROUP_OUT)[:, None] * GROUP_IN
                    row_length = GROUP_IN
                    held = seen[None, :] & (inner >= 0) & (inner < GROUP_IN)
                mask_k = (k0 + tl.arange(0, BLOCK_K) < RANGE) & (offs_k < ROWS)
                dy = tl.load(rows[:, None] + offs_k[None, :], mask=inside[:, None] & mask_k[None, :], other=0.0)
                place = (offs_k[:, None] * (KERNEL * KERNEL) + tap) * row_length + inner
                weight = tl.load(weights + place, mask=mask_k[:, None] & held, other=0.0)  # [BLOCK_K, BLOCK_N]
                part = tl.dot(dy, weight, part, input_precision=PRECISION)
        if HAS_MASK:
            dropped = mask_ptr + tl.load(readers_ptr + reader * 4 + 3) + image[:, None] * stride_mask + column[None, :]
            part *= tl.load(dropped, mask=mask_p[:, None] & seen[None, :], other=0.0).to(tl.float32)
        acc += part

    valid = mask_p[:, None] & mask_n[None, :]
    if HAS_UPSTREAM:
        upstream = upstream_ptr + offs_p[:, None] * stride_upstream + offs_n[None, :]
        acc += tl.load(upstream, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        raw = tl.load(raw_ptr + offs_p[:, None] * stride_raw + offs_n[None, :], mask=valid, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
        shift = tl.load(shift_ptr + offs_n, mask=mask_n, other=0.0)
        acc = tl.where(valid & (raw * scale[None, :] + shift[None, :] > 0), acc, 0.0)
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)
        rstd = 1.0 / tl.sqrt(tl.load(var_ptr + offs_n, mask=mask_n, other=1.0) + eps)
        normal = (raw - mean[None, :]) * rstd[None, :]
        tl.store(tile_g_ptr + pid_p * C + offs_n, tl.sum(acc, axis=0), mask=mask_n)
        tl.store(tile_gx_ptr + pid_p * C + offs_n, tl.sum(acc * normal, axis=0), mask=mask_n)
    tl.store(g_ptr + offs_p[:, None] * stride_g + offs_n[None, :], acc.to(g_ptr.dtype.element_ty), mask=valid)

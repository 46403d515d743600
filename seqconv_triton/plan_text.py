"""A plan as a line of text, the form in which it goes through a registered op, whose arguments cannot be objects.

    k16 bottleneck s1 | raw | 64>64w 64>64wr | 64 | 128 3 2 4 1

Group width, kind of layer, subgroups; what the input is; layers (w: windowed, r: residual, e: entry); channels read;
tail (channels, kernel size, stride, groups, repeats), or `none`.
"""

from __future__ import annotations

from functools import lru_cache

from seqconv_triton.plan import Layer, Plan, Tail


def encode(plan: Plan) -> str:
    layers = " ".join(
        f"{layer.in_channels}>{layer.out_channels}{'w' * layer.windowed}{'r' * layer.residual}{'e' * layer.entry}"
        for layer in plan.layers
    )
    kind = f"k{plan.group_width} {'bottleneck' if plan.bottleneck else 'basic'} s{plan.subgroups}"
    source = "raw" if plan.raw_input else "activated"
    tail = plan.tail
    end = "none" if tail is None else (
        f"{tail.out_channels} {tail.kernel_size} {tail.stride} {tail.groups} {tail.repeats}"
    )  # fmt: skip
    return f"{kind} | {source} | {layers} | {plan.read_channels} | {end}"


@lru_cache(maxsize=1024)
def decode(text: str) -> Plan:
    """The inverse of `encode`; the same object for the same text, so that what the plan has computed is kept."""
    kind, source, layers, read, end = text.split(" | ")
    group_width, shape, subgroups = kind.split()
    parsed = []
    for item in layers.split():
        channels = item.rstrip("wre")
        in_channels, out_channels = map(int, channels.split(">"))
        flags = item[len(channels) :]
        parsed.append(Layer(in_channels, out_channels, "w" in flags, "r" in flags, "e" in flags))
    tail = None if end == "none" else Tail(*map(int, end.split()))
    return Plan(
        tuple(parsed), int(group_width[1:]), shape == "bottleneck", int(subgroups[1:]), int(read), source == "raw", tail
    )

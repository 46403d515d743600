"""Plans: which channels every group of a stage reads, and where its output goes, as plain integers.

A stage is one append-only buffer of raw features, [x | y_0 | y_1 | …]. Group j reads the channels
[window_start, window_start + window_width) and appends `group_width` channels; a layer B also adds the raw channels
from `residual_start` on (paper, sections 3.1 to 3.3). Nothing here knows torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from seqconv_triton.plan_picture import draw


@dataclass(frozen=True)
class Group:
    """One group: the window it reads and the raw channels it adds (None: no shortcut)."""

    window_start: int
    window_width: int
    residual_start: int | None = None


@dataclass(frozen=True)
class Layer:
    """One SeqConv layer in the paper's terms.

    `residual` marks a block's layer B, `entry` the network's first layer (dense, and without dropout).
    """

    in_channels: int
    out_channels: int
    windowed: bool = True
    residual: bool = False
    entry: bool = False


@dataclass(frozen=True)
class Tail:
    """The convolution behind a stage: the downsizing conv, or the last 1×1 conv.

    It reads the stage's last channels, `repeats` times over (2 only for the published SeqResNeXt-24's quirk).
    Its padding keeps the image size at stride 1.
    """

    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class Plan:
    """A stage (or a single layer): its layers, its tail, and from them the windows of all groups.

    `read_channels` counts the last buffer channels that leave the stage: activated, or through the tail.
    `raw_input` says that the input is raw, so that the stage owns its BN-ReLU; otherwise it is already activated.
    """

    layers: tuple[Layer, ...]
    group_width: int
    bottleneck: bool
    subgroups: int
    read_channels: int
    raw_input: bool
    tail: Tail | None = None

    def __post_init__(self) -> None:
        if self.group_width < 1:
            raise ValueError(f"group_width ({self.group_width}) must be at least 1")
        if self.subgroups < 1 or self.group_width % self.subgroups:
            raise ValueError(f"group_width ({self.group_width}) must be a multiple of subgroups ({self.subgroups})")
        if self.subgroups > 1 and not self.bottleneck:
            raise ValueError(
                f"subgroups ({self.subgroups}) divide the 3×3 conv of a bottleneck layer; use bottleneck=True"
            )
        for layer in self.layers:
            if layer.in_channels < 1:
                raise ValueError(f"in_channels ({layer.in_channels}) must be at least 1")
            if layer.out_channels < 1 or layer.out_channels % self.group_width:
                raise ValueError(
                    f"out_channels ({layer.out_channels}) must be a multiple of group_width ({self.group_width})"
                )

    @classmethod
    def layer(
        cls,
        in_channels: int,
        out_channels: int,
        group_width: int,
        *,
        bottleneck: bool = False,
        windowed: bool = True,
        subgroups: int = 1,
    ) -> Plan:
        """A single SeqConv layer on an activated input; its whole output leaves it."""
        layers = (Layer(in_channels, out_channels, windowed),)
        return cls(layers, group_width, bottleneck, subgroups, out_channels, raw_input=False)

    @classmethod
    def stage(
        cls,
        channels: int,
        group_width: int,
        blocks: int,
        *,
        entry_channels: int | None = None,
        extension: int = 0,
        bottleneck: bool = True,
        windowed: bool = True,
        subgroups: int = 1,
        tail: Tail | None = None,
    ) -> Plan:
        """A whole stage on a raw input: entry layer, residual blocks, extension, tail.

        `entry_channels` puts a dense layer entry_channels → channels in front (the paper's first layer); `extension`
        is the number of channels that the down-sampling block adds before its downsizing conv (Section 3.3).
        """
        entry = () if entry_channels is None else (Layer(entry_channels, channels, windowed=False, entry=True),)
        block = (Layer(channels, channels, windowed), Layer(channels, channels, windowed, residual=True))
        extend = (Layer(channels, extension, windowed),) if extension else ()
        repeats = tail.repeats if tail is not None else 1
        read = (channels + extension) // repeats
        return cls(entry + block * blocks + extend, group_width, bottleneck, subgroups, read, True, tail)

    @property
    def in_channels(self) -> int:
        return self.layers[0].in_channels

    @property
    def total_channels(self) -> int:
        """Channels of the buffer: the input's and every group's."""
        return self.in_channels + len(self.groups) * self.group_width

    @property
    def normalized_channels(self) -> int:
        """Buffer channels that pass through a BN: all of them, or all but an already activated input."""
        return self.total_channels - (0 if self.raw_input else self.in_channels)

    @property
    def out_channels(self) -> int:
        return self.read_channels if self.tail is None else self.tail.out_channels

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return tuple(self._slide())

    def _slide(self) -> Iterator[Group]:
        k = self.group_width
        end = self.in_channels  # channels in the buffer when a layer starts
        residual = None
        for layer in self.layers:
            start = end - layer.in_channels
            if layer.residual:
                assert residual is not None, "a residual layer B follows a layer A"
            for i in range(layer.out_channels // k):
                shortcut = residual + i * k if layer.residual and residual is not None else None
                if layer.windowed:
                    yield Group(start + i * k, layer.in_channels, shortcut)
                else:
                    yield Group(start, layer.in_channels + i * k, shortcut)
            residual, end = start, end + layer.out_channels

    @property
    def is_single_layer(self) -> bool:
        """Whether this is one layer and nothing else, whose raw output others may see and add to."""
        return len(self.layers) == 1 and self.tail is None

    @property
    def entry_groups(self) -> int:
        """Groups of the network's first layer, at the front of the buffer; dropout leaves them alone."""
        return sum(layer.out_channels // self.group_width for layer in self.layers if layer.entry)

    @cached_property
    def uniform(self) -> bool:
        """Whether all windows are equally wide, so that the window weights pack into a rectangle."""
        return len({group.window_width for group in self.groups}) == 1

    @cached_property
    def widest_window(self) -> int:
        """Channels of the widest one."""
        return max(group.window_width for group in self.groups)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """First buffer channel of every group."""
        return tuple(self.slot(j) for j in range(len(self.groups)))

    @cached_property
    def awaited_slots(self) -> tuple[int, ...]:
        """Those of the groups whose raw output a later shortcut adds."""
        awaited = {group.residual_start for group in self.groups}
        return tuple(c for c in self.slots if c in awaited)

    @cached_property
    def window_offsets(self) -> tuple[int, ...]:
        """Where each group's window begins when all windows are laid end to end; the last entry is the total."""
        offsets = [0]
        for group in self.groups:
            offsets.append(offsets[-1] + group.window_width)
        return tuple(offsets)

    @property
    def mask_channels(self) -> int:
        """Columns of a dropout mask: every window, then what the tail reads."""
        return self.window_offsets[-1] + (0 if self.tail is None else self.read_channels)

    @cached_property
    def readers(self) -> tuple[tuple[int, int], ...]:
        """For the input, then for every group's slot: the groups [first, last) whose windows reach into it."""
        places = [(0, self.in_channels), *((slot, self.group_width) for slot in self.slots)]
        spans = []
        for start, count in places:
            readers = [
                i
                for i, group in enumerate(self.groups)
                if group.window_start < start + count and start < group.window_start + group.window_width
            ]
            spans.append((readers[0], readers[-1] + 1) if readers else (0, 0))
        return tuple(spans)

    def slot(self, j: int) -> int:
        """First buffer channel that group j writes."""
        return self.in_channels + j * self.group_width

    def window_weight_shape(self, kernel_size: int) -> tuple[int, ...]:
        """Packed shape of the convs over the windows: [J·k, C] or [J·k, C, 3, 3]; flat where windows differ."""
        area = kernel_size**2
        if not self.uniform:
            return (self.window_offsets[-1] * self.group_width * area,)
        shape = (len(self.groups) * self.group_width, self.groups[0].window_width)
        return shape if kernel_size == 1 else (*shape, kernel_size, kernel_size)

    @property
    def reduce_weight_shape(self) -> tuple[int, ...] | None:
        """Packed shape of all 1×1 convs, or None in basic layers."""
        return self.window_weight_shape(1) if self.bottleneck else None

    @property
    def transform_weight_shape(self) -> tuple[int, ...]:
        """Packed shape of all 3×3 convs: [J·k, k/s, 3, 3], or over the windows in basic layers."""
        if not self.bottleneck:
            return self.window_weight_shape(3)
        return (len(self.groups) * self.group_width, self.group_width // self.subgroups, 3, 3)

    @property
    def tail_weight_shape(self) -> tuple[int, ...] | None:
        if self.tail is None:
            return None
        inputs = self.read_channels * self.tail.repeats // self.tail.groups
        return (self.tail.out_channels, inputs, self.tail.kernel_size, self.tail.kernel_size)

    def multiply_adds(self, height: int, width: int) -> tuple[int, int, int]:
        """Of one image's 1×1 convs, 3×3 convs and tail."""
        pixels, behind = height * width, self.out_size(height) * self.out_size(width)
        shapes = self.reduce_weight_shape, self.transform_weight_shape, self.tail_weight_shape
        reduce, transform, tail = (0 if shape is None else math.prod(shape) for shape in shapes)
        return reduce * pixels, transform * pixels, tail * behind

    def out_size(self, size: int) -> int:
        """Height or width behind the tail."""
        return size if self.tail is None else (size - 1) // self.tail.stride + 1

    def __str__(self) -> str:
        """A line about the groups, their picture, a line about the tail."""
        k, tail, windows = self.group_width, self.tail, sorted({group.window_width for group in self.groups})
        window = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
        conv = "1×1 and 3×3" if self.bottleneck else "3×3"
        subgroups = f" in {self.subgroups} subgroups" if self.subgroups > 1 else ""
        head = f"{self.in_channels} channels + {len(self.groups)} groups of {k}, window {window}, {conv} conv"
        rows = [(g.window_start, g.window_width, self.slot(j), g.residual_start) for j, g in enumerate(self.groups)]
        text = f"{head}{subgroups}\n{draw(rows, k, self.in_channels, self.total_channels)}"
        if tail is None:
            return text
        return (
            f"{text}\ntail: {tail.kernel_size}×{tail.kernel_size} conv, stride {tail.stride}, {tail.groups} groups, "
            f"reads the last {self.read_channels} channels, gives {tail.out_channels}"
        )

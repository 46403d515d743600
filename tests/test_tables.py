"""Stored tables: what is looked up first, what a broken file does, what is left when writing fails."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seqconv_triton import cli
from seqconv_triton.kernels import configs, tables
from seqconv_triton.kernels.configs import config_for
from seqconv_triton.kernels.heuristic import TWO_STAGES, Key, LaunchConfig

pytestmark = pytest.mark.usefixtures("triton_that_fences")
GPU, ARCH = "Test GPU 80GB", "sm_90:Test GPU 80GB"
KEY = Key("convolution", 512, 64, 2, 1)
SHIPPED, OWN = LaunchConfig(32, 64, 32, 4, 2), LaunchConfig(256, 64, 64, 8, 2)


def row(config: LaunchConfig, key: Key = KEY) -> tables.Row:
    return {"key": key._asdict(), "config": config._asdict(), "provenance": {"date": "2026-01-01"}}


def looked_up(key: Key = KEY, arch: str = ARCH) -> LaunchConfig:
    return config_for(key.kernel, key.reduction, key.block_n, key.element_size, arch, key.taps)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Paths of the user's own table and of the shipped one, both empty directories; tables are read anew."""
    monkeypatch.setattr(tables, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    configs.reload_tables()
    yield tables.user_file(GPU), tables.shipped_file(GPU)
    configs.reload_tables()


def test_pinned_before_own_before_shipped_before_heuristic(stored: tuple[Path, Path]) -> None:
    own, shipped = stored
    heuristic = looked_up(arch="sm_90")
    tokens = {configs.pinned()}
    assert looked_up() == heuristic
    for path, config in ((shipped, SHIPPED), (own, OWN)):
        tables.write(path, GPU, [row(config)])
        assert looked_up() != config, "tables are read once"
        configs.reload_tables()
        tokens.add(configs.pinned())
        assert looked_up() == config
    with configs.pin("convolution", 16, 16):
        tokens.add(configs.pinned())
        assert looked_up() == (16, 64, 16, 4, 2)
    with configs.use_tables():
        tokens.add(configs.pinned())
        assert looked_up() == heuristic
    assert looked_up() == OWN
    assert looked_up(arch="sm_90") == looked_up(arch="sm_90:Another GPU") == heuristic
    assert looked_up(KEY._replace(taps=9)) == looked_up(KEY._replace(taps=9), "sm_90")
    assert len(tokens) == 5, "launchers would go on with what they derived before"


def test_nothing_is_read_before_a_gpu_asks(stored: tuple[Path, Path]) -> None:
    own, _ = stored
    own.parent.mkdir(parents=True)
    own.write_text("not JSON")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looked_up(arch="sm_90")
        with configs.use_tables():
            looked_up()
    with pytest.warns(RuntimeWarning, match="heuristic"):
        looked_up()


@pytest.mark.parametrize("family", TWO_STAGES)
def test_smallest_tile_follows_the_table_in_use(family: str) -> None:
    with configs.use_tables({Key(family, 64, 64, 2, 1): LaunchConfig(16, 64, 64, 4, 2)}):
        assert configs.smallest_tile("sm_90") == (16 if family in configs.WITH_SUMS else 64)
    assert configs.smallest_tile("sm_90") == 64


def edited(change: Callable[[Any], object]) -> str:
    """A good table with one thing changed."""
    table = json.loads(tables.document([row(OWN)], GPU))
    change(table)
    return json.dumps(table)


def setter(part: str, name: str, value: object) -> Callable[[Any], object]:
    return lambda table: (table["entries"][0][part] if part else table).__setitem__(name, value)


BROKEN = {
    "empty": "",
    "half-written": edited(lambda table: None)[:-40],
    "not-a-table": "[1, 2]",
    "deeply-nested": "[" * 200_000,
    "no-text": "\udcff\udcfe",
    "another-version": edited(setter("", "format", tables.FORMAT - 1)),
    "another-gpu": edited(setter("", "gpu", "Another GPU")),
    "no-entries": edited(lambda table: table.pop("entries")),
    "entries-of-text": edited(setter("", "entries", ["a"])),
    "no-configuration": edited(lambda table: table["entries"][0].pop("config")),
    "no-tile": edited(setter("config", "block_p", 48)),
    "a-tile-of-text": edited(setter("config", "block_k", "64")),
    "odd-warps": edited(setter("config", "num_warps", 3)),
    "half-a-stage": edited(setter("config", "num_stages", 2.5)),
    "unknown-kernel": edited(setter("key", "kernel", "pooling")),
    "unknown-part-of-a-key": edited(setter("key", "batch", 256)),
    "negative-reduction": edited(setter("key", "reduction", -1)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_warning_and_not_used(case: str, stored: tuple[Path, Path]) -> None:
    own, shipped = stored
    tables.write(shipped, GPU, [row(SHIPPED)])
    own.parent.mkdir(parents=True)
    own.write_bytes(BROKEN[case].encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning, match=own.name) as caught:
        assert looked_up() == SHIPPED, "what ships is still used"
    assert len(caught) == 1 and "heuristic" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looked_up(KEY._replace(taps=9))


def test_a_directory_in_the_way_and_no_home(stored: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stored[0].mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="heuristic"):
        assert looked_up() == looked_up(arch="sm_90")
    monkeypatch.undo()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    configs.reload_tables()
    with pytest.warns(RuntimeWarning, match="home directory"):
        assert looked_up() == looked_up(arch="sm_90")


def test_read_gives_what_was_written(tmp_path: Path) -> None:
    rows = [row(OWN), row(SHIPPED, KEY._replace(taps=9))]
    path = tmp_path / "new" / "directory" / "table.json"
    assert tables.read(path, GPU) == []
    tables.write(path, GPU, rows)
    assert tables.read(path, GPU) == rows
    assert configs.stored_table(path, GPU) == {KEY: OWN, KEY._replace(taps=9): SHIPPED}
    with pytest.raises(ValueError, match="measured on 'Test GPU 80GB', not on 'Another GPU'"):
        tables.read(path, "Another GPU")


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(
    fails: str, stored: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = stored
    tables.write(own, GPU, [row(OWN)])
    before = own.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            tables.write(own, GPU, [row(SHIPPED)])
    assert own.read_text() == before and list(own.parent.iterdir()) == [own]
    tables.write(own, GPU, [row(SHIPPED)])
    assert looked_up() == SHIPPED


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": os.path.abspath("elsewhere")}, os.path.abspath("elsewhere")),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache"),
        ("linux", {}, "~/.cache"),
        ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "~/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
        ("win32", {}, "~/AppData/Local"),
    ],
)
def test_cache_directory_of_the_platform(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tables.sys, "platform", platform)
    assert tables.cache_directory() == Path(expected).expanduser() / "seqconv_triton"


@pytest.mark.parametrize(
    ("properties", "hip", "expected"),
    [
        ({"major": 9, "minor": 0, "name": "NVIDIA H200"}, None, "sm_90:NVIDIA H200"),
        ({"gcnArchName": "gfx942:sramecc+:xnack-", "name": "AMD Instinct MI300X"}, "6.4", "gfx942:AMD Instinct MI300X"),
    ],
)
def test_an_architecture_names_its_gpu(
    properties: dict[str, object], hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    configs._architecture.cache_clear()
    try:
        assert configs.architecture(torch.device("cuda", 0)) == expected
    finally:
        configs._architecture.cache_clear()
    assert configs.architecture(torch.device("cpu")) == configs.architecture(torch.device("meta")) == "sm_90"


def test_tables_that_ship_are_readable_and_say_where_they_come_from() -> None:
    for path in tables.SHIPPED.glob("*.json"):
        gpu = json.loads(path.read_text("utf-8"))["gpu"]
        assert path.name == tables.file_name(gpu)
        assert configs.shipped(gpu)
        for shipped in tables.read(path, gpu):
            assert set(shipped["provenance"]) >= {"seqconv_triton", "torch", "triton", "date", "command"}
    assert configs.shipped("a GPU that nobody has") == {}


def test_kernels_with_a_table_that_does_not_ship(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton = pytest.importorskip("triton", reason="Triton is for Linux only")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert cli.main(["kernels", "--tuned", "a GPU that nobody has"]) == 2
    assert "no table ships for 'a GPU that nobody has'" in capsys.readouterr().err

"""Stored tables: what is looked up first, what a broken file does, what concurrent writers and a full disk do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seqconv_triton.kernels import configs, tuning_tables
from seqconv_triton.kernels.configs import Key, LaunchConfig, config_for
from seqconv_triton.kernels.tuning_tables import Entry

GPU, ARCH = "Test GPU 80GB", "sm_90:Test GPU 80GB"
KEY = Key("convolution", 512, 64, 2, 1)
SHIPPED, OWN = LaunchConfig(32, 64, 32, 4, 2), LaunchConfig(256, 64, 64, 8, 2)


def entry(config: LaunchConfig) -> Entry:
    return Entry(config, 0.01, LaunchConfig(128, 64, 64, 8, 3), 0.02, {"date": "2026-01-01", "command": "by hand"})


def looked_up(key: Key = KEY, arch: str = ARCH) -> LaunchConfig:
    return config_for(key.kernel, key.reduction, key.block_n, key.element_size, arch, key.taps)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Paths of the user's own table and of the shipped one, both empty directories; tables are read anew."""
    monkeypatch.setattr(tuning_tables, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped")
    configs.reload_tables()
    yield tuning_tables.user_file(GPU), tuning_tables.shipped_file(GPU)
    configs.reload_tables()


def test_pinned_before_own_before_shipped_before_heuristic(stored: tuple[Path, Path]) -> None:
    own, shipped = stored
    heuristic = looked_up(arch="sm_90")
    tokens = {configs.pinned()}
    assert looked_up() == heuristic
    for path, config in ((shipped, SHIPPED), (own, OWN)):
        tuning_tables.update(path, GPU, {KEY: entry(config)})
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
    assert looked_up(KEY._replace(taps=9)) == config_for("convolution", 512, 64, 2, "sm_90", 9)
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


@pytest.mark.parametrize("family", ["convolution", "data_gradient", "weight_gradient"])
def test_smallest_tile_follows_the_table_in_use(family: str) -> None:
    with configs.use_tables({Key(family, 64, 64, 2, 1): LaunchConfig(16, 64, 64, 4, 2)}):
        assert configs.smallest_tile("sm_90") == (64 if family == "weight_gradient" else 16)
    assert configs.smallest_tile("sm_90") == 64


def edited(change: object) -> str:
    """A good table with one thing changed."""
    table = json.loads(tuning_tables.document({KEY: entry(OWN)}, GPU))
    change(table)  # type: ignore[operator]
    return json.dumps(table)


def setter(part: str, name: str, value: object) -> object:
    return lambda table: (table["entries"][0][part] if part else table).__setitem__(name, value)


BROKEN = {
    "empty": "",
    "half-written": edited(lambda table: None)[:-40],
    "not-a-table": "[1, 2]",
    "deeply-nested": "[" * 200_000,
    "another-version": edited(setter("", "format", tuning_tables.FORMAT + 1)),
    "another-gpu": edited(setter("", "gpu", "Another GPU")),
    "no-entries": edited(lambda table: table.pop("entries")),
    "no-tile": edited(setter("config", "block_p", 48)),
    "a-tile-of-text": edited(setter("config", "block_k", "64")),
    "odd-warps": edited(setter("config", "num_warps", 3)),
    "unknown-kernel": edited(setter("key", "kernel", "pooling")),
    "unknown-part-of-a-key": edited(setter("key", "batch", 256)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_one_warning_and_kept(case: str, stored: tuple[Path, Path]) -> None:
    own, shipped = stored
    tuning_tables.update(shipped, GPU, {KEY: entry(SHIPPED)})
    own.parent.mkdir(parents=True)
    own.write_text(BROKEN[case])
    with pytest.warns(RuntimeWarning, match="heuristic"):
        assert looked_up() == SHIPPED, "what ships is still used"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looked_up(KEY._replace(taps=9))
    with pytest.warns(RuntimeWarning, match="unreadable"):
        tuning_tables.update(own, GPU, {KEY: entry(OWN)})
    assert own.with_suffix(".unreadable").read_text() == BROKEN[case]
    configs.reload_tables()
    assert looked_up() == OWN


def test_bytes_that_are_no_text_and_a_directory_in_the_way(stored: tuple[Path, Path]) -> None:
    own, _ = stored
    own.parent.mkdir(parents=True)
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match="heuristic"):
        assert looked_up() == looked_up(arch="sm_90")
    own.unlink()
    own.mkdir()
    configs.reload_tables()
    with pytest.warns(RuntimeWarning, match="heuristic"):
        assert looked_up() == looked_up(arch="sm_90")


def test_what_does_not_fit_the_gpu_is_not_used(stored: tuple[Path, Path]) -> None:
    """A well-formed entry, but more shared memory than there is: it would fail at every launch."""
    tuning_tables.update(stored[0], GPU, {KEY: entry(LaunchConfig(512, 64, 512, 16, 4))})
    assert looked_up() == looked_up(arch="sm_90")


def test_document_and_parse_are_inverse() -> None:
    entries = {KEY: entry(OWN), KEY._replace(taps=9): Entry(SHIPPED, 1.0, OWN, None, {"date": "2026-01-01"})}
    assert tuning_tables.parse(json.loads(tuning_tables.document(entries, GPU)), GPU) == entries


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning_tables, "cache_directory", homeless)
    configs.reload_tables()
    with pytest.warns(RuntimeWarning, match="home directory"):
        assert looked_up() == looked_up(arch="sm_90")
    configs.reload_tables()


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
    monkeypatch.setattr(tuning_tables.sys, "platform", platform)
    assert tuning_tables.cache_directory() == Path(expected).expanduser() / "seqconv_triton"


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
    for path in tuning_tables.SHIPPED.glob("*.json"):
        gpu = json.loads(path.read_text("utf-8"))["gpu"]
        assert path.name == tuning_tables.file_name(gpu)
        for shipped in tuning_tables.read(path, gpu).values():
            assert set(shipped.provenance) >= {"seqconv_triton", "torch", "triton", "date", "command"}
    assert tuning_tables.shipped("a GPU that nobody has") == {}


WRITER = """
    import sys, time
    from pathlib import Path
    from seqconv_triton.kernels import tuning_tables
    from seqconv_triton.kernels.configs import Key, LaunchConfig
    path, gpu, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = LaunchConfig(32, 64, 32, 4, 2)
    print("ready", flush=True)
    sys.stdin.readline()
    for taps in range(first, first + 20):
        entry = tuning_tables.Entry(config, 1.0, config, 2.0, {})
        tuning_tables.update(path, gpu, {Key("convolution", 512, 64, 2, taps): entry})
"""


def test_two_processes_write_at_once_and_every_entry_survives(stored: tuple[Path, Path]) -> None:
    own, _ = stored
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(own), GPU, str(first)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for first in (1, 101)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    taps = {key.taps for key in tuning_tables.read(own, GPU)}
    assert taps == {*range(1, 21), *range(101, 121)}
    assert not list(own.parent.glob("*.tmp"))


FULL = """
    import resource, sys
    from pathlib import Path
    from seqconv_triton.kernels import tuning_tables
    from seqconv_triton.kernels.configs import Key, LaunchConfig
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    config = LaunchConfig(32, 64, 32, 4, 2)
    try:
        entry = tuning_tables.Entry(config, 1.0, config, 2.0, {})
        tuning_tables.update(Path(sys.argv[1]), sys.argv[2], {Key("convolution", 512, 64, 2, 9): entry})
    except OSError as error:
        print("refused:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_a_file_that_cannot_grow_leaves_the_old_one(stored: tuple[Path, Path]) -> None:
    """The system itself refuses to write more than 200 bytes."""
    own, _ = stored
    tuning_tables.update(own, GPU, {KEY: entry(OWN)})
    before = own.read_text()
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(own), GPU]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("refused:"), done.stderr
    assert own.read_text() == before
    assert not list(own.parent.glob("*.tmp"))


@pytest.mark.parametrize("fails", ["replace", "fsync", "mkdir"])
def test_a_write_that_fails_loses_nothing(
    fails: str, stored: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = stored
    tuning_tables.update(own, GPU, {KEY: entry(OWN)})
    before = own.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "mkdir") if fails == "mkdir" else (os, fails)), full)
        with pytest.raises(OSError, match="No space left"):
            tuning_tables.update(own, GPU, {KEY: entry(SHIPPED)})
    assert own.read_text() == before
    assert not list(own.parent.glob("*.tmp"))
    tuning_tables.update(own, GPU, {KEY: entry(SHIPPED)})  # the lock was given back
    assert looked_up() == SHIPPED


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError), match="file"):
        tuning_tables.update(tmp_path / "file" / "table.json", GPU, {KEY: entry(OWN)})


def test_a_lock_that_is_not_given_back(stored: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    own, _ = stored
    tuning_tables.update(own, GPU, {KEY: entry(OWN)})
    monkeypatch.setattr(tuning_tables, "LOCK_SECONDS", 0.05)
    with FileLock(f"{own}.lock"), pytest.raises(OSError, match="lock"):
        tuning_tables.update(own, GPU, {KEY: entry(SHIPPED)})
    assert looked_up() == OWN


def test_a_file_system_without_locks(stored: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def none(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    for key in (KEY, KEY._replace(taps=9)):
        tuning_tables.update(stored[0], GPU, {key: entry(OWN)})
    assert set(tuning_tables.read(stored[0], GPU)) == {KEY, KEY._replace(taps=9)}

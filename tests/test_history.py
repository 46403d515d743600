"""Training curves: what counts as a row of a log, what is drawn, and every file that is no log."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import run_recipe

from recipes.history import read_log, run_names

HEADER = "epoch,learning_rate,train_loss,train_error,val_loss,val_error,images_per_second,seconds\n"


def row(epoch: object, train: object, val: object) -> str:
    return f"{epoch},0.1,0.5,{train},0.6,{val},1000,3.5\n"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "epochs", "val", "train", "ignored"),
    [
        pytest.param(row(1, 50, 40) + row(2, 30, 20), [1, 2], [40, 20], [50, 30], [], id="whole"),
        pytest.param(row(1, 50, 40) + "2,0.1,0.5,30,0.", [1], [40], [50], [3], id="cut-off"),
        pytest.param(row(1, 50, 40) + row(2, 30, 20)[:-3], [1, 2], [40, 20], [50, 30], [], id="cut-in-seconds"),
        pytest.param(row(1, 5, 4) + "2,0.\n" + row(2, 3, 2), [1, 2], [4, 2], [5, 3], [3], id="went-on-after-a-cut"),
        pytest.param(row(1, 5, 4) + row(2, 3, 2) + row(2, 3, 1), [1, 2], [4, 1], [5, 3], [], id="resumed"),
        pytest.param(row(1, 5, 4) + row(2, "", ""), [1, 2], [4, math.nan], [5, math.nan], [], id="not-measured"),
        pytest.param(row(1, 5, 4) + "\0" * 40, [1], [4], [5], [3], id="zero-bytes-of-a-crash"),
        pytest.param(row(1, 5, 4) + row(2, "x", 3) + row(0, 5, 3), [1], [4], [5], [3, 4], id="no-numbers"),
        pytest.param(row(1, 5, 4) + row(2, 150, 3) + row(3, -1, 3), [1], [4], [5], [3, 4], id="no-percentages"),
        pytest.param(row(1, 5, 4) + row(2, "inf", 3), [1], [4], [5], [3], id="infinite"),
    ],
)
def test_rows(
    text: str, epochs: list[int], val: list[float], train: list[float], ignored: list[int], tmp_path: Path
) -> None:
    write(tmp_path / "run" / "log.csv", HEADER + text)
    for source in (tmp_path / "run", tmp_path / "run" / "log.csv"):
        curve = read_log(source, "run")
        assert curve.epochs == epochs and curve.ignored == ignored
        assert curve.val_error == pytest.approx(val, nan_ok=True)
        assert curve.train_error == pytest.approx(train, nan_ok=True)


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", "val_error,note,epoch,train_error\r\n4,fine,1,5\r\n")
    curve = read_log(file, "run")
    assert (curve.epochs, curve.val_error, curve.train_error) == ([1], [4], [5])


def test_names_are_told_apart() -> None:
    assert run_names([Path("out/a"), Path("out/b/log.csv")]) == ["a", "b"]
    assert run_names([Path("one/a"), Path("two/a"), Path("two/b")]) == ["one/a", "two/a", "two/b"]
    assert len(run_names([Path("a"), Path("a")])) == 2


def test_picture(tmp_path: Path) -> None:
    """Solid validation and dashed training lines, a colour a run, in the legend too."""
    pytest.importorskip("matplotlib", reason="the plot extra")
    from recipes.history import COLOURS, draw

    for name, scale in (("a", 1), ("b", 2)):
        write(tmp_path / name / "log.csv", HEADER + row(1, 8 * scale, 9 * scale) + row(2, 0, 3 * scale))
    figure = draw([read_log(tmp_path / name, name) for name in "ab"], log=True, max_error=30)
    (axes,) = figure.axes
    drawn = [(line.get_color(), line.get_linestyle(), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [
        (COLOURS[0], "-", [9, 3]),
        (COLOURS[0], "--", [8, 0]),
        (COLOURS[1], "-", [18, 6]),
        (COLOURS[1], "--", [16, 0]),
    ]
    assert axes.get_yscale() == "log" and axes.get_ylim()[1] == 30
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "error (%)")
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["a (last 3.00 %, best 3.00 %)", "b (last 6.00 %, best 6.00 %)", "validation", "training"]


def test_command_draws_and_notes_what_it_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra")
    write(tmp_path / "a" / "log.csv", HEADER + row(1, 50, 40) + "2,0.1")
    write(tmp_path / "b" / "log.csv", HEADER + row(1, 50, 40))
    picture = tmp_path / "curves.png"
    assert run_recipe(["history", str(tmp_path / "a"), str(tmp_path / "b"), "--log", "--output", str(picture)]) == 0
    printed = capsys.readouterr()
    assert "1 incomplete line(s) ignored: 3" in printed.err and "2 runs" in printed.out
    assert picture.read_bytes().startswith(b"\x89PNG")


ERRORS: dict[str, tuple[str | bytes | None, list[str], str]] = {
    "nothing-there": (None, [], "does not exist"),
    "zero-bytes": ("", [], "is empty"),
    "no-epoch": (HEADER, [], "has no finished epoch yet"),
    "only-half-an-epoch": (HEADER + "1,0.1,0", [], "has no finished epoch yet"),
    "foreign-csv": ("epoch,loss\n1,2\n", [], "no training log: it has no column val_error, train_error"),
    "picture": (b"\x89PNG\r\n\x1a\n\x00\xff", [], "no training log"),
    "labels": (HEADER + row(1, 5, 4), ["--labels", "a", "b"], "labels (2) must be as many as runs (1)"),
    "max-error": (HEADER + row(1, 5, 4), ["--max-error", "0"], "max_error (0.0) must be above 0"),
    "format": (HEADER + row(1, 5, 4), ["--output", "curves.gif"], "must end in .png"),
    "too-many": (HEADER + row(1, 5, 4), ["log.csv"] * 7, "runs (8) must be at most 7"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_write_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, options, message = ERRORS[case]
    if content is not None:
        write(Path("log.csv"), content)
    before = sorted(tmp_path.iterdir())
    assert run_recipe(["history", "log.csv", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before


def test_folder_without_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(["history", str(tmp_path)]) == 2
    assert "has no log.csv" in capsys.readouterr().err

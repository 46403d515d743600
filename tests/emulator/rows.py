"""The file of finished tasks, docs/results/emulation-rows.jsonl.gz: a line of JSON each."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from emulator.results import RESULTS
from emulator.work import Row, Task

ROWS = RESULTS / "emulation-rows.jsonl.gz"


def finished(file: Path, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Row]]:
    """Names and rows of a file; complaints are to be seen again, so their tasks are not finished."""
    if file.exists():
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                fingerprint, name, fields = json.loads(line)
                if name in tasks and fingerprint == tasks[name].code and not fields["complaints"]:
                    yield name, Row(Counter(fields.pop("counts")), Counter(fields.pop("findings")), **fields)


def keep(file: Path, task: Task, row: Row) -> None:
    with gzip.open(file, "at", encoding="utf-8") as lines:
        lines.write(json.dumps([task.code, task.name, vars(row)]) + "\n")

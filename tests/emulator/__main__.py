"""`make emulate`: the whole table, every configuration and the mutations, and what was found into docs/results/.

PYTHONPATH=tests python -m emulator [--jobs 2] [--seeds 4] [--only TEXT] [--skip configurations …] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from emulator.build import compiler
from emulator.results import Results
from emulator.work import PARTS, Row, all_tasks, execute


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulator", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=4, help="orders of programs and warps that a case runs in")
    parser.add_argument("--only", default="", help="tasks whose name contains all of these words")
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--rows", type=Path, help="a file of finished tasks, read at the beginning and added to")
    parser.add_argument("--dry", action="store_true", help="write no file")
    given = parser.parse_args()
    compiler()
    started, results = time.monotonic(), Results()
    tasks = {
        task.name: task
        for task in all_tasks(given.seeds)
        if task.part not in given.skip and all(word in task.name for word in given.only.split())
    }
    for name, row in finished(given.rows):
        if name in tasks:
            results.add(tasks.pop(name), row)
    for number, (task, row) in enumerate(execute(list(tasks.values()), given.jobs), 1):
        results.add(task, row)
        keep(given.rows, task.name, row)
        print(f"{number}/{len(tasks)} {time.monotonic() - started:6.0f} s  {task.name}: {row}", flush=True)
        for complaint in row.complaints[:5]:
            print(f"    {complaint}", flush=True)
    print(results.page())
    if not given.dry and not given.only:
        results.write()
    return int(bool(results.complaints))


def finished(file: Path | None) -> Iterator[tuple[str, Row]]:
    """Names and rows of a file; complaints are to be seen again, so their tasks are not finished."""
    if file is not None and file.exists():
        for line in file.read_text("utf-8").splitlines():
            name, fields = json.loads(line)
            if not fields["complaints"]:
                yield name, Row(Counter(fields.pop("counts")), Counter(fields.pop("findings")), **fields)


def keep(file: Path | None, name: str, row: Row) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([name, vars(row)]) + "\n")


if __name__ == "__main__":
    sys.exit(main())

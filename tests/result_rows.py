"""Rows and contents of a results file, made by hand."""

from __future__ import annotations

from typing import Any


def row(subject: str, part: str, batch: int, contender: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "subject": subject, "part": part, "batch": batch, "dtype": "bfloat16", "contender": contender,
        "seconds": [seconds] * 3, "median": seconds, "lower": seconds, "upper": seconds, **more,
    }  # fmt: skip


def contents(*rows: dict[str, Any]) -> dict[str, Any]:
    source = {"gpu": "a GPU", "torch": "2", "date": "today", "revision": "r"}
    ceilings = {"bytes_per_second": 4e12, "operations_per_second": 8e14}
    return {"format": 2, "provenance": source, "rows": list(rows), "notes": ["a note"], "ceilings": ceilings}

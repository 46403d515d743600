"""At most one in twenty barriers, waits and acquire-releases of our kernels can be taken away unnoticed."""

from __future__ import annotations

from emulator.cases import CASES
from emulator.mutations import record, shares


def test_what_is_taken_away_is_noticed() -> None:
    """On sm_90 two barriers of the weight gradient stay silent: others of the same step do their work."""
    found = [
        share
        for recording in record(CASES["k8-s2-many-readers"], "fp16", "sm_90")
        for share in shares(recording, "sm_90", (1, 2, 3))
    ]
    assert {share.fault for share in found} == {"barrier deleted", "wait deleted", "atomic relaxed"}
    places, silent = sum(share.places for share in found), [line for share in found for line in share.silent]
    assert places > 100 and len(silent) <= places / 20, silent

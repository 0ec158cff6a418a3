"""What follows from the figures of a run: rates, shares, and how many times as fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.speed.methods import LOOP, OURS

Row = Mapping[str, Any]
Rates = Mapping[str, Mapping[str, float]]
SEAMLESS = 0.02
AS_NEAR = 2.0


def add_rates(rows: Sequence[Row], rates: Rates) -> list[dict[str, Any]]:
    """Return rows with FLOP/s achieved, and the shares of the device's limit and the floor.

    The limit is the best rate that the device was seen to multiply at in the precision of
    the row. The floor is the time that the whole work of the job takes at the best rate of
    any precision, at the overlap of canvas mode; a row that does less may go below it.
    """
    floor = floor_seconds(rows, rates)
    return [_rated(row, rates, floor) for row in rows]


def _rated(row: Row, rates: Rates, floor: float | None) -> dict[str, Any]:
    if not row.get("least"):
        return dict(row)
    per_second = row["tflop"] * 1e12 / row["least"]
    found = dict(row) | {"tflop_per_second": per_second / 1e12}
    found["share_of_rate"] = per_second / max(rates[row["precision"]].values())
    if floor is not None:
        found["share_of_floor"] = floor / row["least"]
    return found


def floor_seconds(rows: Sequence[Row], rates: Rates) -> float | None:
    """Return the least time that the work of the job can take on this device."""
    work = next((row["tflop"] for row in rows if row["kind"] == OURS and row["same_work"]), None)
    best = max(rate for kinds in rates.values() for rate in kinds.values())
    return None if work is None else work * 1e12 / best


def fastest(rows: Sequence[Row], *, same_work: bool) -> Row | None:
    """Return our fastest row that does all the work of the job, or may do less."""
    ours = [row for row in rows if row["kind"] == OURS and row.get("least")]
    kept = [row for row in ours if row["same_work"] or not same_work]
    return min(kept, key=lambda row: row["least"], default=None)


def against_loops(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, by precision of the loop, how many times as fast ours is with all the work.

    ``equal_overlap``: the loop at the overlap of ours. ``equal_quality``: the loop at its
    least overlap that has no seam and is at most ``AS_NEAR`` times as far from the untiled
    result; where none is, its largest overlap, and ``reached`` is False.
    """
    ours = fastest(rows, same_work=True)
    loops = [row for row in rows if row["kind"] == LOOP and row.get("least")]
    if ours is None:
        return []
    found = []
    for precision in dict.fromkeys(row["precision"] for row in loops):
        own = sorted((r for r in loops if r["precision"] == precision), key=lambda r: r["overlap"])
        equal = next((row for row in own if _as_good(row, ours)), None)
        beside = own[-1] if equal is None else equal
        found.append(
            {
                "precision": precision,
                "ours": ours["name"],
                "equal_overlap": own[0]["least"] / ours["least"],
                "equal_quality": beside["least"] / ours["least"],
                "overlap": beside["overlap"],
                "reached": equal is not None,
            }
        )
    return found


def _as_good(row: Row, ours: Row) -> bool:
    if "seam" not in row or "seam" not in ours:
        return False
    near = bool(row["distance"] <= AS_NEAR * ours["distance"])
    return near and abs(row["seam"] - 1) <= SEAMLESS

"""Writes the figures that are kept into the docs: `python -m bench.speed.page`.

Every ``bench/results/speed-*.json`` becomes a part of docs/performance.md, between two
marks, and a picture beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.speed.picture import bars
from bench.speed.summary import add_rates, against_loops, floor_seconds

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- made by bench.speed.page -->", "<!-- end -->"
Result = Mapping[str, Any]


def kept_results() -> dict[str, Result]:
    """Return the results that the docs show, by the name of their file without its end."""
    return {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("speed-*.json")}


def section(results: Mapping[str, Result]) -> str:
    """Return what stands between the marks, marks included."""
    parts = [line for name in sorted(results) for line in _part(name, results[name])]
    return "\n".join([BEGIN, "", *parts, END])


def with_section(page: str, results: Mapping[str, Result]) -> str:
    """Return a page with what stands between its marks made anew."""
    before, rest = page.split(BEGIN, 1)
    return before + section(results) + rest.split(END, 1)[1]


def drawn(result: Result) -> str:
    """Return the picture of a result's comparison."""
    compared = result["comparison"]
    rows = add_rates(compared["rows"], result["rates"])
    return bars(rows, f"Refine, {_work(result)}", f"{_where(result)}; least of each, in seconds")


def _part(name: str, result: Result) -> list[str]:
    return [
        f"### {_where(result)}",
        "",
        *_circumstances(result),
        "",
        *(_comparison(name, result) if "comparison" in result else ()),
        *_stages(result.get("whole", [])),
        *_growth(result.get("growth", [])),
        *_command(result.get("command_to_file")),
    ]


def _circumstances(result: Result) -> list[str]:
    machine = result["machine"]
    features = ", ".join(machine["features"]) or "nothing special"
    return [
        f"`{result['command']}` at commit {machine['commit']}, torch "
        f"{machine['libraries']['torch']}, {machine['threads']} threads; the processor has "
        f"{features}.",
        f"The device was seen to multiply at {_rates(result['rates'])} TFLOP/s.",
    ]


def _where(result: Result) -> str:
    machine = result["machine"]
    return str(machine["processor" if machine["device"] == "cpu" else "device"])


def _work(result: Result) -> str:
    job = result["job"]
    words = {"full": "Stable Diffusion 1.5 in full size", "small": "Stable Diffusion, small"}
    return f"{job['source']} to {job['side']} px, {words.get(job['size'], job['size'])}"


def _rates(rates: Mapping[str, Mapping[str, float]]) -> str:
    return " and ".join(
        f"{max(kinds.values()) / 1e12:.2f} ({name})" for name, kinds in rates.items()
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = "|---" + "|---:" * (len(heads) - 1) + "|"
    head, *lines = (f"| {' | '.join(line)} |" for line in (heads, *rows))
    return [head, marks, *lines, ""]


def _comparison(name: str, result: Result) -> list[str]:
    rates, rows = result["rates"], result["comparison"]["rows"]
    heads = ("method", "windows", "evaluations", "TFLOP", "least s", "median s", "TFLOP/s")
    more = ("of rate", "of floor", "peak MB", "outside nets", "seam", "distance")
    floor = floor_seconds(rows, rates)
    floor_line = [] if floor is None else [f"The floor of this work is {floor:.2f} s.", ""]
    return [
        f"![Seconds by method](pictures/{name}.svg)",
        "",
        f"**{_work(result)}**, refine alone, n = {_count(rows)}:",
        "",
        *_table((*heads, *more), [_cells(row) for row in add_rates(rows, rates)]),
        *floor_line,
        *(f"* Skipped: {name}: {why}." for name, why in result["comparison"]["skipped"].items()),
        *map(_factor, against_loops(rows)),
        "",
    ]


def _count(rows: Sequence[Mapping[str, Any]]) -> int:
    return min((len(row.get("seconds", ())) for row in rows), default=0)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        str(row["windows"]),
        str(row["evaluations"]),
        f"{row['tflop']:.2f}",
        _number(row, "least", ".2f"),
        _number(row, "median", ".2f"),
        _number(row, "tflop_per_second", ".3g"),
        _number(row, "share_of_rate", ".0%"),
        _number(row, "share_of_floor", ".0%"),
        _number(row, "peak_mb", ".0f"),
        _number(row, "outside_nets", ".1%"),
        _number(row, "seam", ".3f"),
        _number(row, "distance", ".4f"),
    ]


def _number(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row.get(name)
    return "" if value is None else format(value, form)


def _factor(found: Mapping[str, Any]) -> str:
    beside = f"at equal quality, which the loop has at {found['overlap']:.1%} overlap"
    if not found["reached"]:
        beside = f"beside its {found['overlap']:.1%} overlap, which is not as near to the untiled"
    return (
        f"* Beside diffusers by tiles in {found['precision']}, {found['ours']} is "
        f"{found['equal_overlap']:.2f} times as fast at equal overlap, and "
        f"{found['equal_quality']:.2f} times {beside}."
    )


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    stages = list(rows[0]["stages"])
    cells = [
        [
            row["name"],
            f"{row['seconds']:.2f}",
            *(f"{row['stages'][stage]:.2f}" for stage in stages),
            f"{row['outside_nets']:.1%}",
        ]
        for row in rows
    ]
    return [
        "Whole upscales, from picture to PNG, in seconds:",
        "",
        *_table(("upscale", "all", *stages, "outside nets"), cells),
    ]


def _growth(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "How the cost of a whole upscale grows:",
        "",
        *_table(
            (
                "megapixels",
                "windows",
                "seconds",
                "per megapixel",
                "refine per megapixel",
                "peak MB",
            ),
            [_grown(row) for row in rows],
        ),
    ]


def _grown(row: Mapping[str, Any]) -> list[str]:
    size = row["megapixels"]
    if "stopped" in row:
        return [str(size), "", "", "", "", row["stopped"]]
    refine = sum(row["stages"][stage] for stage in ("encode", "denoise", "decode"))
    return [
        str(size),
        str(row["windows"]),
        f"{row['seconds']:.2f}",
        f"{row['seconds'] / size:.2f}",
        f"{refine / size:.2f}",
        _number(row, "peak_mb", ".0f"),
    ]


def _command(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return []
    return [
        f"`tegula upscale` with mini, {row['source']} to {row['side']} px, from command to file: "
        f"{row['least']:.1f} s (least of {len(row['seconds'])}).",
        "",
    ]


def main() -> None:
    """Write the page and the pictures."""
    results = kept_results()
    PAGE.write_text(with_section(PAGE.read_text(), results))
    for name, result in results.items():
        if "comparison" in result:
            (PICTURES / f"{name}.svg").write_text(drawn(result))


if __name__ == "__main__":
    main()

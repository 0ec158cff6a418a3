"""The figures of a run as a picture: bars in SVG, without any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from bench.speed.methods import OURS

Row = Mapping[str, Any]
_WIDTH, _NAMES, _FIGURES = 900, 330, 170
_LINE, _BAR, _TOP = 26, 16, 52
_COLOURS = {True: "#2f6f8f", False: "#b0a090"}
_INK, _PAPER = "#222222", "#ffffff"


def bars(rows: Sequence[Row], title: str, note: str) -> str:
    """Draw the least seconds of every row as a bar, ours in a colour of their own.

    Args:
        rows: of a comparison, with rates.
        title: the line above.
        note: the line below the title, smaller.
    """
    shown = [row for row in rows if row.get("least")]
    longest = max((row["least"] for row in shown), default=1.0)
    height = _TOP + _LINE * len(shown) + 10
    lines = [part for at, row in enumerate(shown) for part in _bar(row, at, longest)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
            f'<rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>',
            _text(12, 22, title, "start", size=16),
            _text(12, 41, note, "start", size=12),
            *lines,
            "</svg>",
            "",
        ]
    )


def _bar(row: Row, at: int, longest: float) -> list[str]:
    y = _TOP + at * _LINE
    length = max(1.0, (_WIDTH - _NAMES - _FIGURES) * row["least"] / longest)
    colour = _COLOURS[row["kind"] == OURS]
    middle = y + _BAR - 3
    figure = f"{row['least']:.2f} s, {row['tflop_per_second']:.2g} TFLOP/s"
    return [
        _text(_NAMES - 8, middle, row["name"], "end"),
        f'<rect x="{_NAMES}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>',
        _text(_NAMES + length + 6, middle, figure, "start"),
    ]


def _text(x: float, y: float, words: str, anchor: str, size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{_INK}">'
        f"{escape(words)}</text>"
    )

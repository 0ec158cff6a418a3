"""Prompt notation: ``(word:1.2)``, ``(word)``, ``[word]`` and escapes.

The notation and its numbers are those of the AUTOMATIC1111 web interface, which is
what people who write Stable Diffusion prompts expect.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EMPHASIS = 1.1
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)


@dataclass(frozen=True)
class WeightedText:
    """A stretch of a prompt and the factor on its embeddings."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str) -> tuple[WeightedText, ...]:
    """Split a prompt into stretches of equal weight, brackets and escapes resolved.

    ``(x)`` multiplies by 1.1, ``[x]`` divides by it, ``(x:1.3)`` multiplies by 1.3, and
    they nest. A bracket that is never closed counts up to the end; one that was never
    opened is text.
    """
    parts: list[WeightedText] = []
    opened: list[tuple[str, int]] = []
    for match in _PIECE.finditer(prompt):
        if match["open"]:
            opened.append((match["open"], len(parts)))
        elif match["weight"] and opened and opened[-1][0] == "(":
            _weigh(parts, opened.pop()[1], float(match["weight"]))
        elif match["close"] and opened and opened[-1][0] == _OPENER[match["close"]]:
            _weigh(parts, opened.pop()[1], _FACTOR[match["close"]])
        else:
            parts.append(WeightedText(match["escaped"] or match[0]))
    for bracket, start in reversed(opened):
        _weigh(parts, start, _FACTOR[_CLOSER[bracket]])
    return _joined(parts)


_OPENER = {")": "(", "]": "["}
_CLOSER = {"(": ")", "[": "]"}
_FACTOR = {")": EMPHASIS, "]": 1 / EMPHASIS}


def _weigh(parts: list[WeightedText], start: int, factor: float) -> None:
    parts[start:] = [WeightedText(part.text, part.weight * factor) for part in parts[start:]]


def _joined(parts: list[WeightedText]) -> tuple[WeightedText, ...]:
    joined: list[WeightedText] = []
    for part in parts:
        if joined and joined[-1].weight == part.weight:
            joined[-1] = WeightedText(joined[-1].text + part.text, part.weight)
        else:
            joined.append(part)
    return tuple(joined)

r"""Weighted prompts: ``(word:1.2)``, ``(word)``, ``[word]`` and escapes.

One grammar for every family of models: that of AUTOMATIC1111's web UI, which is what people
who write prompts expect. Embeddings are weighed by it in Stable Diffusion, words in mini.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

EMPHASIS = 1.1
"""Factor of one pair of round brackets; square ones divide by it."""

# A run of digits is matched in one way only: with two, a long one takes quadratic time.
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)
_OPENING = {")": "(", "]": "["}
_FACTORS = {"(": EMPHASIS, "[": 1 / EMPHASIS}


@dataclass(frozen=True)
class WeightedText:
    """A stretch of a prompt and its weight."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str) -> tuple[WeightedText, ...]:
    """Split a prompt into stretches of equal weight, brackets and escapes resolved.

    ``(x)`` multiplies by 1.1, ``[x]`` divides by it, ``(x:1.3)`` multiplies by 1.3, and they
    nest. Square brackets take no number: in ``[x:1.3]`` it is text. A bracket that is never
    closed counts up to the end; one that was never opened is text.
    """
    texts: list[str] = []
    factors: list[tuple[int, int, float]] = []
    open_brackets: list[tuple[str, int]] = []

    def close(factor: float | None = None) -> None:
        bracket, start = open_brackets.pop()
        factors.append((start, len(texts), _FACTORS[bracket] if factor is None else factor))

    for piece in _PIECE.finditer(prompt):
        innermost = open_brackets[-1][0] if open_brackets else None
        if piece["open"]:
            open_brackets.append((piece["open"], len(texts)))
        elif piece["weight"] and innermost == "(":
            close(float(piece["weight"]))
        elif piece["close"] and innermost == _OPENING[piece["close"]]:
            close()
        else:
            texts.append(piece["escaped"] or piece[0])
    while open_brackets:
        close()

    # Factors are multiplied from the innermost bracket outwards, as the web UI does: another
    # order rounds otherwise. Numpy does it, because nesting makes the work quadratic.
    weights = np.ones(len(texts))
    with np.errstate(over="ignore", invalid="ignore"):
        for start, end, factor in factors:
            weights[start:end] *= factor
    pairs = zip(texts, weights.tolist(), strict=True)
    return tuple(
        WeightedText("".join(text for text, _ in stretch), weight)
        for weight, stretch in itertools.groupby(pairs, key=lambda pair: pair[1])
    )

r"""Weighted prompts: ``(word:1.2)``, ``(word)``, ``[word]`` and escapes.

One grammar for every family of models: that of AUTOMATIC1111's web UI, which is what people
who write prompts expect. Embeddings are weighed by it in Stable Diffusion, words in mini.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

EMPHASIS = 1.1
"""Factor of one pair of round brackets; square ones divide by it."""
_EXACT_DEPTH = 24

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
    # Each text belongs to the bracket that it stands in directly, and each bracket to the one
    # around it, which comes before it in the list.
    texts: list[tuple[str, int]] = []
    brackets = [_Bracket("", 0, 1.0)]
    innermost = 0
    for piece in _PIECE.finditer(prompt):
        bracket = brackets[innermost]
        if piece["open"]:
            brackets.append(_Bracket(piece["open"], innermost, _FACTORS[piece["open"]]))
            innermost = len(brackets) - 1
        elif piece["weight"] and bracket.opening == "(":
            bracket.factor = float(piece["weight"])
            innermost = bracket.outer
        elif piece["close"] and bracket.opening == _OPENING[piece["close"]]:
            innermost = bracket.outer
        else:
            texts.append((piece["escaped"] or piece[0], innermost))

    # The web UI multiplies from the innermost bracket outwards; another order rounds otherwise.
    # Deeper than anyone writes, the product of the outer brackets is taken from their own
    # weight, so that the time does not grow with the square of the depth.
    weights: list[float] = []
    for bracket in brackets:
        weight, outer, depth = bracket.factor, bracket.outer, 0
        while outer and depth < _EXACT_DEPTH:
            weight, outer, depth = weight * brackets[outer].factor, brackets[outer].outer, depth + 1
        weights.append(weight * weights[outer] if outer else weight)
    pairs = [(text, weights[number]) for text, number in texts]
    return tuple(
        WeightedText("".join(text for text, _ in stretch), weight)
        for weight, stretch in itertools.groupby(pairs, key=lambda pair: pair[1])
    )


@dataclass
class _Bracket:
    """An opened bracket, the index of the one around it, and its factor."""

    opening: str
    outer: int
    factor: float

r"""Weighted prompts: ``(word:1.2)``, ``(word)``, ``[word]``, ``BREAK`` and escapes.

One parser for every family of models, and two grammars: that of AUTOMATIC1111's web UI, which is
what people who write prompts expect, and ComfyUI's, for models by name whose originals run there.
Embeddings are weighed by it in Stable Diffusion, words in mini.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tegula.options import ResolvedOptions, Weighting

EMPHASIS = 1.1
"""Factor of one pair of round brackets; square ones divide by it."""
_EXACT_DEPTH = 24

# A run of digits is matched in one way only: with two, a long one takes quadratic time.
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])?"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_OPENING = {")": "(", "]": "["}
_FACTORS = {"(": EMPHASIS, "[": 1 / EMPHASIS}
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are read.

    weighting: whose grammar, and whose arithmetic of weights.
    clip_skip: which layer of CLIP from the end is taken; 1 is the last.
    """

    weighting: Weighting = "a1111"
    clip_skip: int = 1

    @classmethod
    def of(cls, options: ResolvedOptions) -> PromptStyle:
        """Return the style that options ask for."""
        return cls(options.prompt_weighting, options.clip_skip)


USUAL_STYLE = PromptStyle()


@dataclass(frozen=True)
class WeightedText:
    """A stretch of a prompt and its weight; ``after_break`` begins a new chunk of the prompt."""

    text: str
    weight: float = 1.0
    after_break: bool = False


@dataclass(frozen=True)
class Tag:
    """What stands in a prompt to have networks added: ``<lora:name:0.7>``.

    kind: the word before the first colon.
    name: of the file.
    given: what stands for the weight; empty for 1.
    """

    kind: str
    name: str
    given: str

    @property
    def weight(self) -> float | None:
        """The weight, None where what is given is not one number."""
        return _number(self.given) if self.given else 1.0

    @property
    def fault(self) -> str:
        """Why nothing can be added for it, whatever files there are; empty if something can."""
        if self.kind not in _LORA_KINDS:
            return "a prompt can only have LoRAs added"
        return "" if self.weight is not None else f"its weight is a number, not {self.given}"

    def left_out(self, reason: str) -> str:
        """Return the sentence on a tag for which nothing is added."""
        what = "LoRA" if self.kind in _LORA_KINDS else self.kind
        return f"The {what} {self.name} is left out: {reason}."


_TAG = re.compile(r"<(\w+):([^<>]+)>")
_LORA_KINDS = ("lora", "lyco")
"""What the web UI calls a LoRA."""


def split_tags(prompt: str, weighting: Weighting = "a1111") -> tuple[str, tuple[Tag, ...]]:
    """Return a prompt without its tags, and these.

    The web UI takes all that has the form of a tag for one. ComfyUI knows none; of those who
    write one for a LoRA there, nobody means the letters.
    """
    tags: list[Tag] = []

    def take(found: re.Match[str]) -> str:
        kind, (name, _, given) = found[1], found[2].partition(":")
        if weighting == "comfyui" and kind not in _LORA_KINDS:
            return found[0]
        tags.append(Tag(kind, name.strip(), given.strip()))
        return ""

    return _TAG.sub(take, prompt), tuple(tags)


def parse_prompt(prompt: str, weighting: Weighting = "a1111") -> tuple[WeightedText, ...]:
    r"""Split a prompt into stretches of equal weight, brackets and escapes resolved.

    The web UI's grammar: ``(x)`` multiplies by 1.1, ``[x]`` divides by it, ``(x:1.3)`` multiplies
    by 1.3, and they nest. Square brackets take no number: in ``[x:1.3]`` it is text. A bracket that
    is never closed counts up to the end; one that was never opened is text. ``\`` takes brackets
    and itself as text, and is left out before anything else. The word ``BREAK`` begins a new
    chunk, inside brackets too, where the web UI takes it for a word of negative weight.

    Tags, which ``split_tags`` returns, are left out in both grammars.

    ComfyUI's grammar: ``(x)`` multiplies by 1.1, ``(x:1.3)`` weighs 1.3 whatever is around it, and
    all else is text, but that ``\(`` and ``\)`` are brackets as text.
    """
    prompt = split_tags(prompt, weighting)[0]
    if weighting == "comfyui":
        text = prompt.replace(r"\)", _ESCAPED[")"]).replace(r"\(", _ESCAPED["("])
        return _joined((unescaped, w, False) for unescaped, w in _weigh_as_comfyui(text, 1.0, 0))
    return _joined(_weigh_as_a1111(prompt))


def _joined(pieces: Iterator[tuple[str, float, bool]]) -> tuple[WeightedText, ...]:
    """Join neighbours of equal weight, (text, weight, after_break), that no BREAK parts."""
    chunk = 0
    stretches: list[tuple[tuple[float, int], str]] = []
    for text, weight, after_break in pieces:
        chunk += after_break
        if text or after_break:
            stretches.append(((weight, chunk), text))
    joined, before = [], 0
    for (weight, chunk), group in itertools.groupby(stretches, key=lambda stretch: stretch[0]):
        text = "".join(text for _, text in group)
        joined.append(WeightedText(text, weight, chunk != before))
        before = chunk
    return tuple(joined)


def _weigh_as_a1111(prompt: str) -> Iterator[tuple[str, float, bool]]:
    # Each text belongs to the bracket that it stands in directly, and each bracket to the one
    # around it, which comes before it in the list.
    texts: list[tuple[str, int, bool]] = []
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
        elif piece["text"]:
            first, *others = _BREAK.split(piece["text"])
            texts.append((first, innermost, False))
            texts += [(other, innermost, True) for other in others]
        else:
            texts.append((piece["escaped"] or piece[0].lstrip("\\"), innermost, False))

    # The web UI multiplies from the innermost bracket outwards; another order rounds otherwise.
    # Deeper than anyone writes, the product of the outer brackets is taken from their own
    # weight, so that the time does not grow with the square of the depth.
    weights: list[float] = []
    for bracket in brackets:
        weight, outer, depth = bracket.factor, bracket.outer, 0
        while outer and depth < _EXACT_DEPTH:
            weight, outer, depth = weight * brackets[outer].factor, brackets[outer].outer, depth + 1
        weights.append(weight * weights[outer] if outer else weight)
    return ((text, weights[number], after_break) for text, number, after_break in texts)


@dataclass
class _Bracket:
    """An opened bracket, the index of the one around it, and its factor."""

    opening: str
    outer: int
    factor: float


_ESCAPED = {"(": "\0\2", ")": "\0\1"}
_DEEPEST = 32
"""Brackets within more brackets than this are text; every one is another pass over the text."""


def _weigh_as_comfyui(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    for item in _bracketed(text):
        if depth < _DEEPEST and len(item) > 1 and item[0] == "(" and item[-1] == ")":
            inside, colon, number = item[1:-1].rpartition(":")
            given = _number(number) if inside and colon else None
            own = weight * EMPHASIS if given is None else given
            yield from _weigh_as_comfyui(item[1:-1] if given is None else inside, own, depth + 1)
        else:
            yield item.replace(_ESCAPED["("], "(").replace(_ESCAPED[")"], ")"), weight


def _bracketed(text: str) -> Iterator[str]:
    """Split a text into its outermost brackets and what lies between, as ComfyUI does.

    One bracket that closes nothing makes text of all that follow it.
    """
    start = level = 0
    for found in re.finditer(r"[()]", text):
        at = found.start()
        if found[0] == "(":
            if level == 0 and at > start:
                yield text[start:at]
                start = at
            level += 1
        else:
            level -= 1
            if level == 0:
                yield text[start : at + 1]
                start = at + 1
    if start < len(text):
        yield text[start:]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None

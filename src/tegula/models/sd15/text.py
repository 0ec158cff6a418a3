"""CLIP as the text encoder: prompts of any length, with weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from tegula.models.prompt import WeightedText, parse_prompt


@dataclass(frozen=True)
class _Token:
    id: int
    weight: float


@dataclass(frozen=True)
class SdTextEncoder:
    """Encodes prompts with CLIP, as ``TextEncoder`` asks.

    A prompt longer than the encoder's context is cut into chunks, each framed by the
    start and end tokens, and the encodings are joined along the token axis. Weights
    multiply the encodings of their tokens, after which the mean of the chunk is
    restored (AUTOMATIC1111's rule). A short prompt without weights gives what the
    ``encode_prompt`` of the diffusers pipelines gives.
    """

    tokenizer: Any
    model: Any

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return [len(prompts), tokens, width]; all rows padded with empty chunks."""
        chunked = [self._chunks(prompt) for prompt in prompts]
        longest = max(len(chunks) for chunks in chunked)
        return torch.cat([self._row(chunks, longest) for chunks in chunked])

    def ignored_words(self, prompt: str) -> tuple[str, ...]:  # noqa: ARG002
        """Return no word: CLIP spells out what it does not know."""
        return ()

    @property
    def _context(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def _row(self, chunks: list[list[_Token]], length: int) -> Tensor:
        padded = chunks + [[]] * (length - len(chunks))
        return torch.cat([self._encode_chunk(chunk) for chunk in padded], dim=1)

    def _chunks(self, prompt: str) -> list[list[_Token]]:
        tokens = [token for part in parse_prompt(prompt) for token in self._tokens(part)]
        length = self._context - 2
        return [tokens[at : at + length] for at in range(0, max(1, len(tokens)), length)]

    def _tokens(self, part: WeightedText) -> list[_Token]:
        text = _spell_out_inversions(part.text, self.tokenizer)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [_Token(number, part.weight) for number in ids]

    def _encode_chunk(self, chunk: list[_Token]) -> Tensor:
        tokenizer = self.tokenizer
        ids = [tokenizer.bos_token_id, *(token.id for token in chunk), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (self._context - len(ids))
        encoded: Tensor = self.model(torch.tensor([ids], device=self.model.device))[0]
        weights = [1.0, *(token.weight for token in chunk)]
        weights += [1.0] * (len(ids) - len(weights))
        if all(weight == 1 for weight in weights):
            return encoded
        return _weighted(encoded, weights)


def _spell_out_inversions(text: str, tokenizer: Any) -> str:
    """Name all the vectors of a textual inversion that has several: x -> x x_1 x_2."""
    added = tokenizer.added_tokens_encoder
    several = sorted((name for name in added if f"{name}_1" in added), key=len, reverse=True)
    if not several:
        return text
    names = "|".join(map(re.escape, several))
    return re.sub(rf"(?:{names})(?!_\d)", lambda found: _vectors(found[0], added), text)


def _vectors(name: str, added: Mapping[str, int]) -> str:
    numbered = (f"{name}_{number}" for number in count(1))
    return " ".join([name, *takewhile(added.__contains__, numbered)])


def _weighted(encoded: Tensor, weights: list[float]) -> Tensor:
    exact = encoded.float()
    scaled = exact * torch.tensor(weights, device=encoded.device)[None, :, None]
    return (scaled * (exact.mean() / scaled.mean())).to(encoded.dtype)

"""CLIP as the text encoder: prompts of any length, with weights and words that users bring."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from tegula.errors import BrokenWeightsError
from tegula.models.files import existing_file, read_content
from tegula.models.prompt import WeightedText, parse_prompt
from tegula.models.stored import LOADING_FAILURES


@dataclass(frozen=True)
class _Token:
    id: int
    weight: float


@dataclass(frozen=True)
class SdTextEncoder:
    """Encodes prompts with CLIP.

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
        rows = []
        for chunks in chunked:
            padded = chunks + [[]] * (longest - len(chunks))
            rows.append(torch.cat([self._encode_chunk(chunk) for chunk in padded], dim=1))
        return torch.cat(rows)

    def ignored_words(self, prompt: str) -> tuple[str, ...]:  # noqa: ARG002
        """Return no word: CLIP spells out what it does not know."""
        return ()

    @property
    def _context(self) -> int:
        return int(self.model.config.max_position_embeddings)

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
        exact = encoded.float()
        scaled = exact * torch.tensor(weights, device=encoded.device)[None, :, None]
        return (scaled * (exact.mean() / scaled.mean())).to(encoded.dtype)


# Textual inversions: words with embeddings of their own.


class _InversionLoader(TextualInversionLoaderMixin):  # type: ignore[misc]
    """The part of a diffusers pipeline that its loading of textual inversions asks for."""

    hf_device_map = None

    def __init__(self, text_model: Any, tokenizer: Any) -> None:
        self.text_encoder = text_model
        self.tokenizer = tokenizer
        self.components: dict[str, Any] = {}


def add_inversions(text_model: Any, tokenizer: Any, references: Sequence[str]) -> None:
    """Teach a text encoder the words of textual inversion files.

    A file of the diffusers format names its word, any other is used by its file name.

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, no textual inversion, or of another family.
    """
    loader = _InversionLoader(text_model, tokenizer)
    for reference in references:
        path = existing_file(reference)
        word, vectors = _read_inversion(path)
        try:
            loader.load_textual_inversion({word: vectors}, token=word)
        except LOADING_FAILURES as error:
            raise BrokenWeightsError(
                f"{path} cannot be used as the word {word}: the word must be new and its vectors "
                f"{text_model.config.hidden_size} wide."
            ) from error


def _read_inversion(path: Path) -> tuple[str, Tensor]:
    """Return the word and its vectors, from the web UI's or the diffusers format."""
    content = read_content(path)
    parameters = content.get("string_to_param")
    if isinstance(parameters, Mapping) and isinstance(parameters.get("*"), Tensor):
        return path.stem, parameters["*"].detach()
    tensors = {name: part for name, part in content.items() if isinstance(part, Tensor)}
    if len(tensors) != 1:
        raise BrokenWeightsError(
            f"{path} is no textual inversion for Stable Diffusion 1.5; give one with the vectors "
            f"of one word."
        )
    name, vectors = next(iter(tensors.items()))
    return path.stem if name == "emb_params" else name, vectors


def _spell_out_inversions(text: str, tokenizer: Any) -> str:
    """Name all the vectors of a textual inversion that has several: x -> x x_1 x_2."""
    known = tokenizer.added_tokens_encoder
    several = sorted((name for name in known if f"{name}_1" in known), key=len, reverse=True)
    if not several:
        return text

    def with_all_vectors(found: re.Match[str]) -> str:
        numbered = (f"{found[0]}_{number}" for number in count(1))
        return " ".join([found[0], *takewhile(known.__contains__, numbered)])

    names = "|".join(map(re.escape, several))
    return re.sub(rf"(?:{names})(?!_\d)", with_all_vectors, text)

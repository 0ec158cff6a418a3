"""CLIP as the text encoder: prompts of any length, with weights and words that users bring."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tegula.errors import BrokenWeightsError, OptionError
from tegula.models.files import existing_file, read_content
from tegula.models.identify import EMBEDDING, SD15, family_of_width, identify, refuse_other
from tegula.models.library import without_suffix
from tegula.models.prompt import USUAL_STYLE, PromptStyle, WeightedText, parse_prompt
from tegula.models.stored import StoredTensor

# Textual inversions: words with embeddings of their own.


@dataclass(frozen=True)
class Inversion:
    """A word that stands for vectors of its own in prompts.

    words: what it is called; the first is what users are shown.
    vectors: [vectors, width], float32.
    """

    words: tuple[str, ...]
    vectors: Tensor


def read_inversions(
    references: Sequence[str],
    width: int,
    bundled: Sequence[tuple[Path, str, StoredTensor]] = (),
) -> tuple[Inversion, ...]:
    """Read textual inversion files, each called by its file's name and by the one inside.

    Args:
        references: paths of files of the web UI's or the diffusers format.
        width: of the vectors that the text encoder takes.
        bundled: words that come in the files of LoRAs, as (file, word, vectors).

    Raises:
        MissingWeightsError: a file is not there.
        BrokenWeightsError: a file is damaged, not a textual inversion, or of another family.
        OptionError: two of them have the same name.
    """
    paths = [existing_file(reference) for reference in references]
    read = [(path, _read_inversion(path, width)) for path in paths]
    read += [(path, _inversion(path, (word,), own.read(), width)) for path, word, own in bundled]
    found: dict[str, Path] = {}
    for path, inversion in read:
        for word in inversion.words:
            other = found.setdefault(word.lower(), path)
            if other is not path:
                raise OptionError(
                    f"Two embeddings are called {word}, {other} and {path}; rename one of the "
                    f"files or give one of them only."
                )
    return tuple(inversion for _, inversion in read)


def _read_inversion(path: Path, width: int) -> Inversion:
    content = read_content(path)
    # The web UI wraps the vectors and calls them by the name of the file. What a mapping of it
    # calls them is a placeholder of the training.
    wrapped = content.get("string_to_param")
    tensors = {
        name: part
        for name, part in (wrapped if isinstance(wrapped, Mapping) else content).items()
        if isinstance(part, Tensor)
    }
    if not isinstance(wrapped, Mapping) and tensors:
        shapes = {name: tuple(part.shape) for name, part in tensors.items()}
        refuse_other(path, identify(shapes), "an embedding", (EMBEDDING,))
    if len(tensors) != 1:
        raise BrokenWeightsError(
            f"{path} is not a textual inversion for {SD15}; give one with the vectors of one word."
        )
    name, part = next(iter(tensors.items()))
    own = () if isinstance(wrapped, Mapping) or name == "emb_params" else (name,)
    return _inversion(path, tuple(dict.fromkeys((*own, path.stem))), part, width)


def _inversion(path: Path, words: tuple[str, ...], part: Tensor, width: int) -> Inversion:
    """Return the vectors of a file as those of words, if they fit the text encoder."""
    vectors = part.detach().float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
        other = family_of_width(vectors.shape[-1]) if vectors.ndim else ""
        what = f"an embedding for {other}" if other else "no embedding of this model"
        raise BrokenWeightsError(
            f"{path} is {what}, with numbers of shape {tuple(part.shape)}; give one for {SD15}, "
            f"whose vectors are {width} wide."
        )
    if not torch.isfinite(vectors).all():
        raise BrokenWeightsError(f"{path} holds numbers that are not finite; get it again.")
    return Inversion(words, vectors)


# The encoder.

_BACKTRACK = 20
"""Tokens after the last comma of a full chunk that may go to the next chunk with their words."""
_MOST_REPEATS = 3
"""The longest prompt is repeated so often at most, to be as long as repeated shorter ones."""
_LARGE_WORD = 8
"""ComfyUI cuts words of so many tokens at the end of a chunk, and moves shorter ones."""
_EMBEDDING_MARK = "embedding:"
_WORD_END = "</w>"
"""Ends the last token of a word in CLIP's vocabulary."""


@dataclass(frozen=True)
class _Token:
    id: int
    weight: float


_Chunk = list[_Token]


@dataclass(frozen=True)
class _Word:
    """A word of the vocabulary's own: the tokens it is spelled with, and those of its vectors."""

    spelling: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class SdTextEncoder:
    """Encodes prompts with CLIP.

    A prompt longer than the encoder's context is cut into chunks, each framed by the
    start and end tokens, and the encodings are joined along the token axis. A short prompt
    without weights gives what the ``encode_prompt`` of the diffusers pipelines gives.

    In AUTOMATIC1111's style weights multiply the encodings of their tokens, after which the mean
    of the chunk is restored; in ComfyUI's they move the encodings away from those of the empty
    prompt.
    """

    tokenizer: Any
    model: Any
    inversions: tuple[Inversion, ...] = ()

    @classmethod
    def taught(
        cls, tokenizer: Any, model: Any, inversions: Sequence[Inversion] = ()
    ) -> SdTextEncoder:
        """Return an encoder that knows these words; the model is changed for it."""
        table = model.get_input_embeddings()
        if inversions:
            rows = [table.weight, *(inversion.vectors.to(table.weight) for inversion in inversions)]
            table.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
            table.num_embeddings = len(table.weight)
        return cls(tokenizer, model, tuple(inversions))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], style: PromptStyle = USUAL_STYLE) -> Tensor:
        """Return [len(prompts), tokens, width]; shorter prompts are repeated.

        To attention a prompt several times is the prompt once, so that every row is what it would
        be alone, as in the web UI and in ComfyUI. Prompts of many different lengths are filled up
        with empty chunks instead.

        Raises:
            OptionError: the model has fewer layers than ``style`` skips.
        """
        chunked = [self._chunks(prompt, style) for prompt in prompts]
        counts = [len(chunks) for chunks in chunked]
        longest, common = max(counts), math.lcm(*counts)
        repeats = common <= _MOST_REPEATS * longest
        rows = []
        for chunks in chunked:
            filled = chunks if repeats else chunks + [[]] * (longest - len(chunks))
            row = torch.cat([self._encode_chunk(chunk, style) for chunk in filled], dim=1)
            rows.append(row.repeat(1, common // len(chunks), 1) if repeats else row)
        return torch.cat(rows)

    def ignored_words(self, prompt: str) -> tuple[str, ...]:  # noqa: ARG002
        """Return no word: CLIP spells out what it does not know."""
        return ()

    def unused_words(self, prompts: Sequence[str], style: PromptStyle) -> tuple[str, ...]:
        """Return the words of textual inversions that stand in none of the prompts."""
        if not self.inversions:
            return ()
        chunks = [chunk for prompt in prompts for chunk in self._chunks(prompt, style)]
        used = {token.id for chunk in chunks for token in chunk}
        mark = _EMBEDDING_MARK if style.weighting == "comfyui" else ""
        return tuple(
            mark + inversion.words[0]
            for inversion, ids in zip(self.inversions, self._ids, strict=True)
            if not used.intersection(ids)
        )

    # Chunks.

    @property
    def _context(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @cached_property
    def _ids(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each inversion's vectors, which are the last rows of the table."""
        counts = [len(inversion.vectors) for inversion in self.inversions]
        first = len(self.model.get_input_embeddings().weight) - sum(counts)
        ids = []
        for count in counts:
            ids.append(tuple(range(first, first + count)))
            first += count
        return tuple(ids)

    @cached_property
    def _comma(self) -> int | None:
        comma: int | None = self.tokenizer.get_vocab().get(f",{_WORD_END}")
        return comma

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _chunks(self, prompt: str, style: PromptStyle) -> list[_Chunk]:
        """Cut a prompt into chunks, without what frames them and fills them up."""
        parts = parse_prompt(prompt, style.weighting)
        if style.weighting == "comfyui":
            return self._cut_as_comfyui(parts)
        return self._cut_as_a1111(parts)

    def _cut_as_a1111(self, parts: Sequence[WeightedText]) -> list[_Chunk]:
        """Cut at BREAK, at a comma near the end of a chunk, or else where the chunk is full.

        An inversion is never cut if it fits into one chunk. Words that go to the next chunk take
        their inversions along, which the web UI leaves behind.
        """
        length = self._context - 2
        chunks: list[_Chunk] = []
        chunk: _Chunk = []
        last_comma: int | None = None
        for part in parts:
            if part.after_break:
                chunks.append(chunk)
                chunk, last_comma = [], None
            for group in self._split_words(part):
                if group[0].id == self._comma:
                    last_comma = len(chunk)
                elif (
                    len(chunk) == length
                    and last_comma is not None
                    and length - last_comma <= _BACKTRACK
                ):
                    chunks.append(chunk[: last_comma + 1])
                    chunk, last_comma = chunk[last_comma + 1 :], None
                if len(chunk) + len(group) > length:
                    chunks.append(chunk)
                    chunk, last_comma = [], None
                chunk = chunk + group
        return [*chunks, chunk] if chunk or not chunks else chunks

    def _split_words(self, part: WeightedText) -> Iterator[_Chunk]:
        """Yield the tokens of a text one by one, and those of an inversion together."""
        length = self._context - 2
        ids = self._tokenize(self._set_apart(part.text))
        at = 0
        while at < len(ids):
            word = self._word_at(ids, at)
            found = (ids[at],) if word is None else word.ids
            tokens = [_Token(number, part.weight) for number in found]
            for start in range(0, len(tokens), length):
                yield tokens[start : start + length]
            at += 1 if word is None else len(word.spelling)

    @cached_property
    def _words(self) -> Mapping[int, Sequence[_Word]]:
        """The inversions' words by the token that they begin with, the longest first."""
        words = [
            _Word(tuple(self._tokenize(name)), ids)
            for inversion, ids in zip(self.inversions, self._ids, strict=True)
            for name in inversion.words
        ]
        by_start: dict[int, list[_Word]] = {}
        for word in sorted(words, key=lambda word: len(word.spelling), reverse=True):
            if word.spelling:
                by_start.setdefault(word.spelling[0], []).append(word)
        return by_start

    def _word_at(self, ids: Sequence[int], at: int) -> _Word | None:
        """Return the inversion whose word begins with a token of a text, if any.

        Words are compared by their tokens, in which neither case nor spaces count.
        """
        candidates = self._words.get(ids[at])
        if candidates is None:
            return None
        if at and not self.tokenizer.convert_ids_to_tokens(ids[at - 1]).endswith(_WORD_END):
            return None  # in the middle of another word
        return next(
            (w for w in candidates if tuple(ids[at : at + len(w.spelling)]) == w.spelling), None
        )

    def _set_apart(self, text: str) -> str:
        """Put spaces around words like <mood>, whose marks would join those beside them."""
        return text if self._marked is None else self._marked.sub(r" \g<0> ", text)

    @cached_property
    def _marked(self) -> re.Pattern[str] | None:
        names = [name for inversion in self.inversions for name in inversion.words]
        marked = [name for name in names if not (name[:1].isalnum() and name[-1:].isalnum())]
        longest_first = sorted(filter(None, marked), key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first))
        return re.compile(alternatives, re.IGNORECASE) if alternatives else None

    def _cut_as_comfyui(self, parts: Sequence[WeightedText]) -> list[_Chunk]:
        """Cut between words; large ones, of inversions too, where the chunk is full."""
        length = self._context - 2
        chunks: list[_Chunk] = [[]]
        for part in parts:
            for word in part.text.replace("\n", " ").split(" "):
                tokens = [_Token(number, part.weight) for number in self._comfyui_ids(word)]
                is_large = len(tokens) >= _LARGE_WORD
                while len(chunks[-1]) + len(tokens) > length:
                    fitting = length - len(chunks[-1]) if is_large else 0
                    chunks[-1] += tokens[:fitting]
                    tokens = tokens[fitting:]
                    chunks.append([])
                chunks[-1] += tokens
        return chunks

    def _comfyui_ids(self, word: str) -> list[int]:
        """Return the tokens of a word; one with ComfyUI's mark is the name of an inversion."""
        if not word.startswith(_EMBEDDING_MARK):
            return self._tokenize(word)
        name = word.removeprefix(_EMBEDDING_MARK)
        bare = name.strip(",")
        for candidate, rest in ((name, ""), (bare, name[len(bare) :])):
            ids = self._by_name.get(without_suffix(candidate.lower()))
            if ids is not None:
                return [*ids, *self._tokenize(rest)]
        return self._tokenize(name[len(bare) :])  # ComfyUI leaves out what it does not find

    @cached_property
    def _by_name(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name.lower(): ids
            for inversion, ids in zip(self.inversions, self._ids, strict=True)
            for name in inversion.words
        }

    # Encodings.

    def _encode_chunk(self, chunk: _Chunk, style: PromptStyle) -> Tensor:
        encoded = self._run(chunk, style)
        weights = [1.0, *(token.weight for token in chunk)]
        weights += [1.0] * (self._context - len(weights))
        if all(weight == 1 for weight in weights):
            return encoded
        exact = encoded.float()
        factors = torch.tensor(weights, device=encoded.device)[None, :, None]
        if style.weighting == "comfyui":
            plain = self._run([], style).float()
            moved = (exact - plain) * factors + plain
            return torch.where(factors == 1, exact, moved).to(encoded.dtype)
        scaled = exact * factors
        return (scaled * (exact.mean() / scaled.mean())).to(encoded.dtype)

    def _run(self, chunk: _Chunk, style: PromptStyle) -> Tensor:
        """Return the encodings of a framed chunk, [1, context, width], by the layer asked for."""
        tokenizer, skip = self.tokenizer, style.clip_skip
        ids = [tokenizer.bos_token_id, *(token.id for token in chunk), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (self._context - len(ids))
        given = torch.tensor([ids], device=self.model.device)
        if skip == 1:
            last: Tensor = self.model(given)[0]
            return last
        layers = int(self.model.config.num_hidden_layers)
        if skip > layers:
            raise OptionError(
                f"The text encoder has {layers} layers; clip_skip {skip} is too much."
            )
        # The layers' own outputs are without the last normalisation, which all of them get.
        hidden: Tensor = self.model(given, output_hidden_states=True).hidden_states[-skip]
        normalised: Tensor = getattr(self.model, "text_model", self.model).final_layer_norm(hidden)
        return normalised

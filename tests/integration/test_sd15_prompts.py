"""Prompts and embeddings of Stable Diffusion 1.5, by CLIP's own vocabulary.

Expected chunks are written as the rules of AUTOMATIC1111's web UI and of ComfyUI give them.
"""

import copy

import pytest
import torch
from safetensors.torch import save_file
from sd15_support import expected_result, load_sd15, result
from transformers import CLIPTextConfig, CLIPTextModel

from tegula import UpscaleOptions, Upscaler
from tegula.errors import BrokenWeightsError, OptionError
from tegula.models.prompt import PromptStyle
from tegula.models.sd15.parts import STANDARD_CONFIG, tokenizer_from_folder
from tegula.models.sd15.text import Inversion, SdTextEncoder, read_inversions
from tests.tiny.networks import tiny_bundle

COMFYUI = PromptStyle("comfyui")
CAT, DOG, COMMA, RED = 2368, 1929, 267, 736
WIDTH, WORDS = 8, 49408


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_from_folder(STANDARD_CONFIG / "tokenizer")


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = CLIPTextConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            bos_token_id=WORDS - 2,
            eos_token_id=WORDS - 1,
            pad_token_id=WORDS - 1,
        )
        model = CLIPTextModel(config).eval().requires_grad_(requires_grad=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


@pytest.fixture
def encoder(tokenizer, model):
    def make(**counts):
        """Return an encoder with inversions of these names and counts of vectors."""
        inversions = [Inversion((n,), vectors(count, n)) for n, count in counts.items()]
        return SdTextEncoder.taught(tokenizer, copy.deepcopy(model), inversions)

    return make


def vectors(count, name=""):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(len(name)))


def inversion(count, first=0):
    """Tokens of an inversion's vectors; ``first`` vectors were learned before."""
    return list(range(WORDS + first, WORDS + first + count))


def of_chunks(encoder, *chunks):
    """What CLIP makes of chunks of tokens, framed and filled up."""
    ids = [[WORDS - 2, *chunk, *[WORDS - 1] * (76 - len(chunk))] for chunk in chunks]
    return torch.cat([encoder.model(torch.tensor([row]))[0] for row in ids], dim=1)


def check(encoder, prompt, *chunks, style=None):
    encoded = encoder.encode([prompt]) if style is None else encoder.encode([prompt], style)
    expected = of_chunks(encoder, *chunks)
    assert encoded.shape == expected.shape
    assert torch.equal(encoded, expected)


# Embeddings.


@pytest.mark.parametrize("word", ["EasyNegative", "easynegative", "EASYNEGATIVE", "easyNegative,"])
def test_the_word_of_an_embedding_counts_in_any_case(encoder, word):
    rest = [COMMA] if word.endswith(",") else []
    check(encoder(EasyNegative=8), f"cat {word} dog", [CAT, *inversion(8), *rest, DOG])


def test_a_word_of_several_tokens_is_found_whole(tokenizer, model):
    known = [Inversion(("bad-hands-5",), vectors(2)), Inversion(("bad-hands",), vectors(1))]
    taught = SdTextEncoder.taught(tokenizer, copy.deepcopy(model), known)
    check(taught, "Bad-Hands-5 bad-hands", [*inversion(2), *inversion(1, first=2)])


@pytest.mark.parametrize("prompt", ["myEasyNegative", "easynegative"])
@pytest.mark.parametrize("word", ["EasyNegativ", "negative"])
def test_a_word_inside_another_is_not_an_embedding(encoder, tokenizer, prompt, word):
    spelled = tokenizer(prompt, add_special_tokens=False).input_ids
    check(encoder(**{word: 2}), prompt, spelled)


@pytest.mark.parametrize("prompt", ["cat <Mood>, dog", "cat <mood>,dog"])
def test_marks_around_a_word_do_not_join_what_stands_beside_it(tokenizer, model, prompt):
    taught = SdTextEncoder.taught(
        tokenizer, copy.deepcopy(model), [Inversion(("<mood>",), vectors(2))]
    )
    check(taught, prompt, [CAT, *inversion(2), COMMA, DOG])


def test_a_word_of_clips_own_vocabulary_may_be_an_embedding(encoder):
    check(encoder(cat=2), "a cat", [320, *inversion(2)])


def test_a_large_embedding_goes_to_the_next_chunk_whole(encoder):
    taught = encoder(big=75)
    check(taught, "cat dog big cat", [CAT, DOG], inversion(75), [CAT])


def test_an_embedding_larger_than_a_chunk_is_cut(encoder):
    check(encoder(big=80), "cat big", [CAT], inversion(75), inversion(5, first=75))


def test_an_embedding_after_the_last_comma_goes_along_to_the_next_chunk(encoder):
    moved = [*inversion(2), *[DOG] * 13]
    prompt = "cat " * 60 + ", mood " + "dog " * 13
    check(encoder(mood=2), prompt, [*[CAT] * 60, COMMA], moved)


def test_the_weight_of_an_embedding_is_that_of_its_vectors(encoder):
    taught = encoder(mood=2)
    plain, weighted = taught.encode(["cat mood"])[0], taught.encode(["cat (mood:2)"])[0]
    ratio = (weighted / plain).mean(1)
    assert torch.allclose(ratio[2:4] / ratio[1], torch.tensor(2.0), atol=1e-4)


def test_what_an_embedding_is_called_is_known_of_its_file_and_of_what_is_in_it(tmp_path):
    save_file({"<mood>": torch.ones(1, WIDTH)}, tmp_path / "calm.safetensors")
    (read,) = read_inversions([str(tmp_path / "calm.safetensors")], WIDTH)
    assert read.words == ("<mood>", "calm")


@pytest.mark.parametrize("wrap", [dict, torch.nn.ParameterDict])
@pytest.mark.parametrize("key", ["*", "mood"])
def test_the_web_uis_files_are_called_by_their_names(tmp_path, wrap, key):
    ones = torch.nn.Parameter(torch.ones(2, WIDTH))
    content = {"string_to_token": {key: torch.tensor(265)}, "string_to_param": wrap({key: ones})}
    torch.save({**content, "name": "other", "step": torch.ones(()).numpy()[()]}, tmp_path / "a.pt")
    (read,) = read_inversions([str(tmp_path / "a.pt")], WIDTH)
    assert read.words == ("a",)
    assert torch.equal(read.vectors, torch.ones(2, WIDTH))


def test_a_single_vector_may_lack_its_dimension(tmp_path):
    torch.save({"<mood>": torch.ones(WIDTH)}, tmp_path / "learned_embeds.bin")
    (read,) = read_inversions([str(tmp_path / "learned_embeds.bin")], WIDTH)
    assert read.vectors.shape == (1, WIDTH)


ODD = {
    "sdxl": ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "embedding for SDXL"),
    "sd2": ({"x": torch.ones(3, 1024)}, "embedding for Stable Diffusion 2"),
    "sd2-wrapped": (
        {"string_to_param": {"*": torch.ones(3, 1024)}},
        "embedding for Stable Diffusion 2",
    ),
    "wide": ({"x": torch.ones(3, 99)}, "no embedding of this model.*8 wide"),
    "lora": ({"lora_te_text_model_x.lora_down.weight": torch.ones(2, 2)}, "a LoRA; give an embed"),
    "nan": ({"x": torch.full((2, WIDTH), torch.nan)}, "not finite"),
    "inf": ({"string_to_param": {"*": torch.full((2, WIDTH), torch.inf)}}, "not finite"),
    "two": ({"string_to_param": {"a": torch.ones(1, 8), "b": torch.ones(1, 8)}}, "one word"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_embedding_for_this_model_is_refused_by_what_it_is(tmp_path, name):
    content, what = ODD[name]
    torch.save(content, tmp_path / f"{name}.pt")
    with pytest.raises(BrokenWeightsError, match=rf"{name}\.pt .*{what}"):
        read_inversions([str(tmp_path / f"{name}.pt")], WIDTH)


def test_two_embeddings_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / "calm.pt", tmp_path / "Calm.safetensors"]
    torch.save({"emb_params": torch.ones(1, WIDTH)}, paths[0])
    save_file({"emb_params": torch.ones(1, WIDTH)}, paths[1])
    with pytest.raises(OptionError, match="Two embeddings are called calm"):
        read_inversions([str(path) for path in reversed(paths)], WIDTH)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "calm.safetensors"
    save_file({"emb_params": torch.ones(1, 16)}, path)
    return str(path)


def test_embeddings_count_in_the_fingerprint_in_any_precision(files, calm, tmp_path):
    save_file({"emb_params": torch.full((1, 16), 2.0)}, tmp_path / "calm.safetensors")
    loads = (
        load_sd15(str(files.folder), embeddings=[path], dtype=dtype).facts.fingerprint
        for path, dtype in (
            (calm, torch.float32),
            (calm, torch.bfloat16),
            (str(tmp_path / "calm.safetensors"), torch.float32),
        )
    )
    exact, half, other = loads
    assert exact == half != other
    assert tiny_bundle(3).facts.fingerprint not in (exact, other)


@pytest.fixture(scope="module")
def taught(files, calm):
    return Upscaler(load_sd15(str(files.folder), embeddings=[calm]))


def test_an_embedding_changes_only_prompts_with_its_word(taught):
    assert torch.equal(result(taught.bundle), expected_result())


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"prompt": "a cat"}, True),
        ({"prompt": "a CALM cat"}, False),
        ({"negative_prompt": "calm", "guidance_scale": 5.0}, False),
        ({"negative_prompt": "calm", "guidance_scale": 1.0}, True),
        ({"regions": ("0,0,1,1:calm",)}, False),
        ({"prompt": "calm", "prompt_weighting": "comfyui"}, True),
        ({"prompt": "embedding:calm", "prompt_weighting": "comfyui"}, False),
    ],
)
def test_an_embedding_whose_word_stands_in_no_prompt_is_warned_of(taught, options, warned):
    settings = {"steps": 2, "prescaler": "lanczos", "scale": 1, "negative_prompt": "", **options}
    warnings = taught.upscale(torch.rand(3, 16, 16), UpscaleOptions(**settings)).warnings
    assert any("calm is loaded and has no effect" in warning for warning in warnings) is warned


# Chunks as the web UI cuts them.


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("cat BREAK dog", [[CAT], [DOG]]),
        ("cat, BREAK\ndog", [[CAT, COMMA], [DOG]]),
        ("cat BREAK BREAK dog", [[CAT], [], [DOG]]),
        ("BREAK cat", [[], [CAT]]),
        ("cat BREAK", [[CAT]]),
        ("BREAK", [[]]),
    ],
)
def test_break_fills_the_chunk(encoder, prompt, chunks):
    check(encoder(), prompt, *chunks)


@pytest.mark.parametrize("prompt", ["cat break dog", "catBREAK dog", "BREAKS"])
def test_only_the_word_in_capitals_breaks(encoder, tokenizer, prompt):
    check(encoder(), prompt, tokenizer(prompt, add_special_tokens=False).input_ids)


def test_break_parts_what_is_in_brackets(encoder):
    taught = encoder()
    whole, parts = taught.encode(["(cat BREAK dog:1.3)"]), taught.encode(["(cat:1.3)", "(dog:1.3)"])
    assert torch.equal(whole[0], parts.flatten(0, 1))


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (60, 20, 61),  # 14 of the words behind the comma fit, and go along with the others
        (55, 25, 56),  # the comma is the 20th token from the end
        (54, 25, 75),  # ... the 21st: the chunk is filled
        (74, 5, 75),
        (75, 5, 75),  # the comma begins the second chunk
    ],
)
def test_words_behind_a_comma_near_the_end_go_to_the_next_chunk(encoder, before, after, kept):
    tokens = [CAT] * before + [COMMA] + [DOG] * after
    prompt = "cat " * before + ", " + "dog " * after
    check(encoder(), prompt, tokens[:kept], tokens[kept:])


def test_the_last_comma_counts_and_only_within_its_chunk(encoder):
    tokens = [*[CAT, COMMA] * 35, *[DOG] * 90]
    prompt = "cat, " * 35 + "dog " * 90
    check(encoder(), prompt, tokens[:70], tokens[70:145], tokens[145:])


def test_a_full_chunk_that_ends_with_the_prompt_is_left_as_it_is(encoder):
    check(encoder(), "cat " * 60 + ", " + "dog " * 14, [*[CAT] * 60, COMMA, *[DOG] * 14])


def test_weights_go_along_to_the_next_chunk(encoder):
    taught = encoder()
    prompt = "cat " * 60 + ", (" + "dog " * 20 + ":1.3)"
    alone = taught.encode(["(" + "dog " * 20 + ":1.3)"])
    assert torch.equal(taught.encode([prompt])[:, 77:], alone)


# Clip skip.


@pytest.mark.parametrize("skip", [2, 3])
def test_clip_skip_takes_an_earlier_layer_through_the_last_normalisation(encoder, skip):
    taught = encoder()
    shorter = encoder()
    shorter.model.encoder.layers = shorter.model.encoder.layers[: 4 - skip]
    encoded = taught.encode(["a (red:1.2) cat"], PromptStyle(clip_skip=skip))
    assert torch.equal(encoded, shorter.encode(["a (red:1.2) cat"]))
    assert not torch.equal(encoded, taught.encode(["a (red:1.2) cat"]))


def test_clip_skip_beyond_the_first_layer_is_refused(encoder):
    with pytest.raises(OptionError, match="has 3 layers"):
        encoder().encode(["cat"], PromptStyle(clip_skip=4))


def test_clip_skip_and_weighting_reach_the_picture(files):
    upscaler = Upscaler(tiny_bundle(3))
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    usual = {"prompt": "a (red:1.8) cat", "seed": 1, "steps": 4, "creativity": 1, "scale": 1}
    results = {
        tuple(extra.items()): upscaler.upscale(
            picture, UpscaleOptions(prescaler="lanczos", **usual, **extra)
        )
        for extra in ({}, {"clip_skip": 2}, {"prompt_weighting": "comfyui"})
    }
    assert len({each.image.tobytes() for each in results.values()}) == 3
    assert results[("clip_skip", 2),].settings["clip_skip"] == 2


# ComfyUI's weights and chunks.


def test_comfyui_weighs_towards_the_empty_prompt(encoder):
    taught = encoder()
    plain, empty = of_chunks(taught, [320, RED, CAT]), of_chunks(taught, [])
    expected = plain.clone()
    expected[:, 2] = (plain[:, 2] - empty[:, 2]) * 1.5 + empty[:, 2]
    encoded = taught.encode(["a (red:1.5) cat"], COMFYUI)
    assert torch.allclose(encoded, expected, atol=1e-6)
    assert torch.equal(encoded[:, [0, 1, *range(3, 77)]], plain[:, [0, 1, *range(3, 77)]])
    assert not torch.allclose(encoded, taught.encode(["a (red:1.5) cat"]), atol=1e-3)


def test_square_brackets_and_break_are_words_to_comfyui(encoder, tokenizer):
    spelled = tokenizer("[cat] BREAK dog", add_special_tokens=False).input_ids
    check(encoder(), "[cat] BREAK dog", spelled, style=COMFYUI)


def test_comfyui_moves_a_word_that_does_not_fit_and_knows_no_commas(encoder, tokenizer):
    spelled = tokenizer("xylographic", add_special_tokens=False).input_ids
    assert 1 < len(spelled) < 8
    tokens = [*[CAT] * 60, COMMA, *[DOG] * 13]
    prompt = "cat " * 60 + ", " + "dog " * 13
    check(encoder(), f"{prompt} xylographic", tokens, spelled, style=COMFYUI)


def test_comfyui_cuts_a_large_word(encoder, tokenizer):
    word = "x1y2z3q4"
    spelled = tokenizer(word, add_special_tokens=False).input_ids
    assert len(spelled) >= 8
    chunks = [*[CAT] * 74, spelled[0]], spelled[1:]
    check(encoder(), "cat " * 74 + word, *chunks, style=COMFYUI)


@pytest.mark.parametrize(
    ("prompt", "chunk"),
    [
        ("embedding:mood cat", [*inversion(2), CAT]),
        ("cat embedding:Mood.pt, dog", [CAT, *inversion(2), COMMA, DOG]),
        ("cat embedding:gone dog", [CAT, DOG]),
        ("cat embedding:gone, dog", [CAT, COMMA, DOG]),
        ("(embedding:mood:1.0) cat", [*inversion(2), CAT]),
    ],
)
def test_comfyui_calls_embeddings_by_a_mark(encoder, prompt, chunk):
    check(encoder(mood=2), prompt, chunk, style=COMFYUI)


def test_without_the_mark_an_embedding_is_words_to_comfyui(encoder, tokenizer):
    spelled = tokenizer("mood", add_special_tokens=False).input_ids
    check(encoder(mood=2), "mood", spelled, style=COMFYUI)

import itertools
import json
import re

import pytest
from growth import SUPERLINEAR, growth
from hypothesis import given
from hypothesis import strategies as st

from tegula.images.prompts import LONGEST, prompt_in
from tegula.models.prompt import parse_prompt


def pieces(prompt):
    return [(part.text, round(part.weight, 4)) for part in parse_prompt(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red cat", [("a red cat", 1)]),
        ("a (red:1.2) cat", [("a ", 1), ("red", 1.2), (" cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 0.9091), (" cat", 1)]),
        ("((red))", [("red", 1.21)]),
        ("([(red:1.3)]:0.7)", [("red", 0.8273)]),
        ("(a (red:2) cat:0.5)", [("a ", 0.5), ("red", 1), (" cat", 0.5)]),
        ("(red: .5)", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:1.0)", [("red", 1)]),
        ("(red:0) cat", [("red", 0), (" cat", 1)]),
        ("a cat AND a dog", [("a cat AND a dog", 1)]),
        ("a [cat:dog:.5] [x|y]", [("a ", 1), ("cat:dog:.5", 0.9091), (" ", 1), ("x|y", 0.9091)]),
        ("(\U0001f408:1.2)\u200d", [("\U0001f408", 1.2), ("\u200d", 1)]),
        ("a <lora:style:0.7>(red:1.2)", [("a ", 1), ("red", 1.2)]),
        ("(a <hypernet:x:1> red:1.2)", [("a  red", 1.2)]),
        ("a < b, <b>, x:y", [("a < b, <b>, x:y", 1)]),
    ],
)
def test_brackets_weigh_what_they_hold(prompt, expected):
    assert pieces(prompt) == expected


@pytest.mark.parametrize(
    ("piece", "end"),
    [
        (" BREAK", ""),
        ("(a", ""),
        ("(a", "x:1.2)"),
        ("1", ""),
        (" ", ""),
        ("]", ""),
        ("(a:1.2) ", ""),
    ],
)
@pytest.mark.parametrize("weighting", ["a1111", "comfyui"])
def test_the_time_for_a_prompt_grows_with_its_length_and_not_with_its_square(piece, end, weighting):
    def prompt(times):
        return "(:" + piece * times + end * times

    assert growth(lambda text: parse_prompt(text, weighting), prompt, 2000) < SUPERLINEAR


def test_weights_are_multiplied_from_the_inside_outwards():
    (part,) = parse_prompt("[(((red)))]")
    assert part.weight == 1.1 * 1.1 * 1.1 * (1 / 1.1)
    assert part.weight != 1.1 * (1.1 * (1.1 * (1 / 1.1)))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a (red:1.2) cat", [("a ", 1), ("red", 1.2), (" cat", 1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:1.3) cat:0.5)", [("a ", 0.5), ("red", 1.3), (" cat", 0.5)]),
        ("(a (red) cat:0.5)", [("a ", 0.5), ("red", 0.55), (" cat", 0.5)]),
        ("[red] BREAK [cat:1.3]", [("[red] BREAK [cat:1.3]", 1)]),
        (r"\(red\) a\b \[c\]", [(r"(red) a\b \[c\]", 1)]),
        (r"(cat \(red\):1.5)", [("cat (red)", 1.5)]),
        ("a (red cat", [("a (red cat", 1)]),
        ("a red) (cat)", [("a red) (cat)", 1)]),
        ("(a (b)", [("a (b", 1.1)]),
        ("(red:loud)", [("red:loud", 1.1)]),
        ("(:1.3)", [(":1.3", 1.1)]),
        ("(red:nan)", [("red:nan", 1.1)]),
        ("()", []),
    ],
)
def test_comfyui_reads_brackets_otherwise(prompt, expected):
    parts = parse_prompt(prompt, "comfyui")
    assert [(part.text, round(part.weight, 4)) for part in parts] == expected
    assert not any(part.after_break for part in parts)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [("a ", False), (" b", True)]),
        ("a BREAK", [("a ", False), ("", True)]),
        ("a BREAK BREAK b", [("a ", False), (" ", True), (" b", True)]),
        ("BREAKa break (b)", [("BREAKa break ", False), ("b", False)]),
        ("a\nBREAK\n(b) c", [("a\n", False), ("\n", True), ("b", False), (" c", False)]),
    ],
)
def test_break_begins_a_new_chunk(prompt, expected):
    assert [(part.text, part.after_break) for part in parse_prompt(prompt)] == expected


def test_escaped_brackets_are_text():
    assert pieces(r"photo \(1999\) \[sic\]") == [("photo (1999) [sic]", 1)]


def test_an_escaped_bracket_inside_a_weight_is_text():
    assert pieces(r"(cat \(red\):1.5)") == [("cat (red)", 1.5)]


def test_a_lone_backslash_is_left_out():
    assert pieces(r"a\b \\") == [("ab \\", 1)]


def test_a_bracket_never_closed_counts_to_the_end():
    assert pieces("a (red cat") == [("a ", 1), ("red cat", 1.1)]


def test_a_bracket_never_opened_is_text():
    assert pieces("a red) cat] 3:4") == [("a red) cat] 3:4", 1)]


def test_a_weight_outside_brackets_is_text():
    assert pieces("ratio 16:9)") == [("ratio 16:9)", 1)]


def test_a_weight_does_not_close_a_square_bracket():
    assert pieces("[red:1.2) cat]") == [("red:1.2) cat", 0.9091)]


@given(st.text())
def test_escaped_text_comes_back_as_it_was(text):
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", text)
    assert "".join(part.text for part in parse_prompt(escaped)) == text
    assert all(part.weight == 1 for part in parse_prompt(escaped))


@given(st.text(alphabet="ab ()[]:\\1.2-"))
def test_any_prompt_can_be_read_and_neighbours_differ_in_weight(prompt):
    parts = parse_prompt(prompt)
    assert all(left.weight != right.weight for left, right in itertools.pairwise(parts))


A1111 = """a cat, (fur:1.2), <lora:detail:0.8> green eyes
on a wall
Negative prompt: blurry, text
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"""
COMFYUI = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "positive": ["12", 0], "negative": ["7", 0], "model": ["4", 0]},
    },
    "12": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["6", 0], "negative": ["7", 0], "strength": 1.0},
    },
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0], "clip": ["4", 1]}},
    "9": {"class_type": "PrimitiveString", "inputs": {"value": "a stone bridge"}},
}
CIRCLE = {
    "1": {"inputs": {"seed": 1, "positive": ["2", 0]}},
    "2": {"inputs": {"conditioning": ["3", 0]}},
    "3": {"inputs": {"conditioning": ["2", 0]}},
}


@pytest.mark.parametrize(
    ("chunks", "settings", "prompt"),
    [
        ({"parameters": A1111}, None, "a cat, (fur:1.2), green eyes on a wall"),
        ({"parameters": "a cat\nSteps: 20, Sampler: Euler a"}, None, "a cat"),
        ({"parameters": "f(x) of a plot in some other program"}, None, ""),
        ({"prompt": json.dumps(COMFYUI)}, None, "a stone bridge"),
        ({"prompt": json.dumps(COMFYUI), "parameters": A1111}, {"prompt": "ours"}, "ours"),
        ({"parameters": A1111}, {"prompt": ""}, "a cat, (fur:1.2), green eyes on a wall"),
        ({"prompt": json.dumps(CIRCLE)}, None, ""),
        ({"prompt": "[" * 100_000}, None, ""),
        ({"prompt": '{"3": {"inputs": {"positive": 5}}, "4": [], "5": {"inputs": 1}}'}, None, ""),
        ({"prompt": "[1]"}, {"prompt": 5}, ""),
        ({"parameters": "x" * 9000 + "\nSteps: 1, "}, None, "x" * LONGEST),
        ({}, None, ""),
    ],
)
def test_the_prompt_of_a_picture_is_found_where_programs_write_it(chunks, settings, prompt):
    assert prompt_in(chunks, None, None, settings) == prompt


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_the_prompt_of_a_jpeg_is_in_its_user_comment_and_of_a_webp_in_its_model(encoding):
    comment = b"UNICODE\0" + A1111.encode(encoding)
    assert prompt_in({}, comment, None, None).startswith("a cat")
    assert prompt_in({}, b"ASCII\0\0\0" + A1111.encode(), None, None).startswith("a cat")
    assert prompt_in({}, b"ASCII\0\0\0shot in Rome", "Nikon", None) == ""
    graph = "prompt:" + json.dumps(COMFYUI)
    assert prompt_in({}, None, graph, None) == "a stone bridge"

"""The prompt that a picture was made with, as the programs that make pictures write it down.

* AUTOMATIC1111's web UI and those after it: one text, the prompt first, in the PNG chunk
  ``parameters`` or, in JPEG and WebP files, in the user comment of EXIF.
* ComfyUI: its graph as JSON, in the PNG chunk ``prompt`` or, in WebP files, in EXIF's model of
  the camera.
* tegula: the settings of a result.

A file may come from anywhere, so nothing of it is trusted: not its size, its form, nor links in a
circle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 4000
"""Characters of a prompt that are taken; people write some hundred."""

_LARGEST = 2**20
_LINKS = 64
"""Nodes of a graph that are followed from a sampler to its words, at most."""

_AFTER_PROMPT = re.compile(r"^(?:Negative prompt:|Steps: *\d+,)", re.MULTILINE)
_TAG = re.compile(r"<[^<>:]+:[^<>]*>")
"""A LoRA or the like, which belongs to the model that made the picture."""

_TEXTS = ("text", "text_g", "string", "value", "prompt")
_LINKED = (*_TEXTS, "positive", "conditioning", "conditioning_1", "conditioning_to")
"""Inputs by which words come to a sampler, in nodes of ComfyUI's own and well-known others."""


def prompt_in(
    chunks: Mapping[str, Any], comment: object, model: object, settings: Mapping[str, Any] | None
) -> str:
    """Return the prompt that a picture was made with, without tags of LoRAs; empty if unknown.

    Args:
        chunks: text of a PNG file by keyword.
        comment: the user comment of EXIF.
        model: of the camera, by EXIF.
        settings: of a result of tegula.
    """
    ours = (settings or {}).get("prompt")
    found = [ours if isinstance(ours, str) else ""]
    found += [
        _AFTER_PROMPT.split(text, maxsplit=1)[0]
        for text in (chunks.get("parameters"), _comment(comment))
        if isinstance(text, str) and _AFTER_PROMPT.search(text)
    ]
    graph = chunks.get("prompt")
    if graph is None and isinstance(model, str):
        graph = model.partition("prompt:")[2]
    found.append(_of_graph(graph))
    plain = (" ".join(_TAG.sub("", text[: 2 * LONGEST]).split()) for text in found)
    return next((text[:LONGEST].strip(" ,") for text in plain if text.strip(" ,")), "")


def _comment(value: object) -> str:
    """Return the text of a user comment, which begins with eight bytes for its encoding."""
    if not isinstance(value, bytes) or len(value) > _LARGEST:
        return value if isinstance(value, str) else ""
    text = value[8:]
    if value.startswith(b"UNICODE"):
        # Which end comes first nobody says; what is mostly Latin has its zeros there.
        return text.decode("utf-16-be" if text[:1] == b"\0" else "utf-16-le", "replace")
    return text.decode("utf-8", "replace") if value.startswith(b"ASCII") else ""


def _of_graph(text: object) -> str:
    """Return the words that a graph of ComfyUI leads to a sampler."""
    if not isinstance(text, str) or len(text) > _LARGEST:
        return ""
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    nodes = {name: _inputs(node) for name, node in graph.items()} if type(graph) is dict else {}
    samplers = [inputs for inputs in nodes.values() if "positive" in inputs]
    # A sampler has noise to take away; what else has a positive side hands it on.
    samplers.sort(key=lambda inputs: not {"seed", "noise_seed", "sigmas"} & inputs.keys())
    for inputs in samplers:
        words = next(_words(nodes, inputs["positive"]), "")
        if words:
            return words
    return ""


def _inputs(node: object) -> Mapping[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _words(nodes: Mapping[str, Mapping[str, Any]], link: object) -> Iterator[str]:
    """Yield the texts that a link leads to, the nearest first."""
    waiting = [link]
    seen: set[str] = set()
    while waiting and len(seen) < _LINKS:
        name = waiting.pop(0)
        name = str(name[0]) if isinstance(name, list) and name else ""
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        inputs = nodes[name]
        yield from (
            inputs[key] for key in _TEXTS if isinstance(inputs.get(key), str) and inputs[key]
        )
        waiting += [inputs[key] for key in _LINKED if isinstance(inputs.get(key), list)]

"""Where the time of a run goes: its stages, and the nets against all around them."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from bench.speed.clock import settle
from tegula.models.bundle import Bundle
from tegula.models.prescalers import Prescaler
from tegula.pipeline import autoencoder, refine
from tegula.pipeline.sampler import CanvasSampler

NETS = "nets"
_STAGES: tuple[tuple[Any, str, str], ...] = (
    (autoencoder, "encode", "encode"),
    (autoencoder, "encode_together", "encode"),
    (refine, "encode_prompts", "denoise"),
    (refine, "embed_windows", "denoise"),
    (CanvasSampler, "sample", "denoise"),
    (autoencoder, "decode", "decode"),
    (autoencoder, "decode_together", "decode"),
)


class Stopwatch:
    """Adds up seconds by name while ``watching``; waits for the device around each.

    The waiting keeps host and device from working at the same time, so the share outside
    the nets is never flattered.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._running: set[str] = set()

    @contextmanager
    def watching(self, bundle: Bundle, prescaler: Prescaler | None = None) -> Iterator[None]:
        """Time the stages of refine and the nets of a bundle and a prescaler."""
        nets = [(owner, name, NETS) for owner, name in _net_calls(bundle, prescaler)]
        with ExitStack() as patches:
            for owner, name, kind in (*_STAGES, *nets):
                timed = self._timed(getattr(owner, name), kind)
                patches.enter_context(mock.patch.object(owner, name, timed))
            yield

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Add the seconds inside to a name; not again where it is running already."""
        if kind in self._running:
            yield
            return
        self._running.add(kind)
        settle(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            settle(self._device)
            self.seconds[kind] += time.perf_counter() - start
            self._running.remove(kind)

    def _timed(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(kind):
                return call(*args, **kwargs)

        return timed


def _net_calls(bundle: Bundle, prescaler: Prescaler | None) -> Iterator[tuple[type, str]]:
    for part in (bundle.denoiser, bundle.autoencoder, bundle.text):
        for name in dir(type(part)):
            called = callable(getattr(type(part), name))
            if called and (name == "__call__" or not name.startswith("_")) and name != "to_dtype":
                yield type(part), name
    if prescaler is not None and prescaler.network is not None:
        yield type(prescaler.network), "forward"

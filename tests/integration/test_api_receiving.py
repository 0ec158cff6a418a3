"""Bodies of requests: bounded in size and time, parsed beside the event loop."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
from api_support import Server, open_server
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from tegula.server.api.receiving import BoundedBody, BytesInFlight, ReceivedBody, parse_json


def test_a_body_over_the_limit_is_refused_by_what_it_is_not_by_what_it_claims(tmp_path):
    server = open_server(tmp_path, max_body_bytes=1000)
    announced = server.client.post("/v1/predictions", content=b"x" * 1001)
    assert announced.status_code == 413

    def pieces():
        for _ in range(100):
            yield b"x" * 100

    headers = {"content-type": "application/json"}
    chunked = server.client.post("/v1/predictions", content=pieces(), headers=headers)
    assert chunked.status_code == 413


class TurnedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock turns at once to when something is due, and else stands still."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if self._scheduled and not self._ready:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()  # type: ignore[misc]


def _received(messages: list[tuple[float, bytes]], **bounds: int) -> bytes:
    """What a bounded body receives of pieces that come after so many seconds each."""
    pieces, loop = iter(messages), TurnedLoop()

    async def receive() -> dict[str, object]:
        seconds, piece = next(pieces, (60, b""))
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": piece, "more_body": True}

    async def read() -> bytes:
        received = ReceivedBody(BytesInFlight(10**9))
        given = {"limit": 10**6, "least_rate": 1000, **bounds}
        body = BoundedBody(receive, received=received, **given)
        return b"".join([(await body())["body"] for _ in messages])

    with closing(loop), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tegula.server.api.receiving.time", SimpleNamespace(monotonic=loop.time))
        return loop.run_until_complete(read())


@pytest.mark.parametrize(
    "messages",
    [[(60, b"")], [(0, b"."), (60, b".")], [(6, b".")] * 9],
    ids=["silent", "silent later", "dripping"],
)
def test_a_sender_that_is_slow_is_given_up(messages):
    with pytest.raises(HTTPException) as refused:
        _received(messages)
    assert refused.value.status_code == 408
    assert "1000 bytes a second" in refused.value.detail


def test_a_sender_at_the_least_rate_has_all_the_time_it_needs():
    pieces = [(6, b"x" * 6000)] * 9
    assert len(_received(pieces)) == 54_000


def test_large_bodies_beyond_what_all_may_have_together_are_told_to_come_again(tmp_path):
    server = open_server(tmp_path, max_bodies_bytes=1_000_000)
    large = f"data:image/png;base64,iVBORw0KGgoA{'A' * 1_200_000}"
    refused = server.post("/v1/predictions", {"version": "latest", "input": {"image": large}})
    assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["detail"].endswith("send this again in a moment.")
    uploaded = server.client.post("/v1/files", files={"content": b"0" * 900_000})
    assert uploaded.status_code == 201
    fits = {"image": large[:900_000]}
    for _ in range(3):  # what is answered counts no more
        created = server.post("/v1/predictions", {"version": "tegula/upscale", "input": fits})
        assert created.status_code == 201, created.text
    server.store.close()


def test_a_create_that_waits_holds_no_body(tmp_path):
    server = open_server(tmp_path, max_bodies_bytes=1_000_000)
    large = {"image": f"data:image/png;base64,iVBORw0KGgoA{'A' * 900_000}"}
    body = {"version": "tegula/upscale", "input": large}
    with server.client, ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.post, "/v1/predictions", body, headers={"prefer": "wait"})
        while not server.store.predictions.waiting().count:
            time.sleep(0.01)
        # The body goes a moment after the prediction is there.
        while (second := server.post("/v1/predictions", body)).status_code == 503:
            assert not held.done()
            time.sleep(0.01)
        assert second.status_code == 201
        server.work()
        server.work()
        assert held.result().json()["status"] == "succeeded"
    server.store.close()


_CHARACTERS = st.sampled_from(["a", "/", "\\", '"', "\n", "\u00e9", "\u20ac", "\U0001f600", "+"])


@given(st.lists(_CHARACTERS, max_size=60).map("".join), st.booleans(), st.integers(1, 9))
def test_long_texts_are_parsed_in_pieces_as_json_parses_them_whole(text, escaped, size):
    value = {"input": {"a": [text, text + "x", 1.5], text: None}, "b": "\\"}
    body = json.dumps(value, ensure_ascii=escaped).replace("/", "\\/" if escaped else "/")
    with pytest.MonkeyPatch.context() as patch:
        for name, number in {"_SMALL": 0, "_LONG": 3, "_PIECE": size}.items():
            patch.setattr(f"tegula.server.api.receiving.{name}", number)
        patch.setattr("tegula.server.api.receiving.MOST_FRAME", 10**6)
        assert parse_json(body.encode()) == value


@pytest.mark.parametrize(
    "wrong",
    [
        b"\\ud800", b"\\u0000", b"\xff", b"\n", b"\\x",
    ],
    ids=["half a character", "NUL", "no UTF-8", "a raw line break", "no escape"],
)  # fmt: skip
def test_a_long_text_that_cannot_be_kept_is_refused_as_a_short_one(server: Server, wrong: bytes):
    def answer(length: int) -> tuple[int, str]:
        text = b'{"version": "latest", "input": {"image": "' + b"A" * length + wrong + b'"}}'
        headers = {"content-type": "application/json"}
        refused = server.client.post("/v1/predictions", content=text, headers=headers)
        return refused.status_code, refused.json()["detail"]

    assert answer(3_000_000) == answer(3)
    assert answer(3)[0] in (400, 422)


@pytest.mark.parametrize(
    "body",
    [b"[" * 1_000_000, b"[" + b"0," * 500_000 + b"0]", b'["' + b'","' * 400_000 + b'"]',
     b'["' + b'\\"' * 2_500_000 + b'"]'],
    ids=["levels", "numbers", "texts", "escapes"],
)  # fmt: skip
def test_a_body_that_is_large_by_anything_but_long_texts_is_refused(server: Server, body: bytes):
    headers = {"content-type": "application/json"}
    answer = server.client.post("/v1/predictions", content=body, headers=headers)
    assert answer.status_code == 413

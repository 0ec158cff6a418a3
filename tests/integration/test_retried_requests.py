"""Creates that are sent again because the client gave up waiting."""

from __future__ import annotations

import asyncio
import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from api_support import DATA_URI
from live_server import Live, eventually, live_server

from tegula.server.api.create import REMEMBERED_S, RetriedRequests

WAIT = {"prefer": "wait=60"}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server"), inline_output_bytes=0) as server:
        yield server


def body_of(**inputs) -> dict[str, object]:
    return {"version": "tegula/upscale", "input": {"image": DATA_URI, "prompt": "gated", **inputs}}


def ask(live: Live, **inputs) -> httpx.Response:
    """Ask, and let run what has begun."""
    headers = {"authorization": f"Bearer {live.token}", **WAIT}
    url = f"{live.url}/v1/predictions"
    live.gate.set()
    return httpx.post(url, json=body_of(**inputs), headers=headers, timeout=300)


def give_up(live: Live, **inputs) -> str:
    """Ask, and leave while it waits for the answer; return the prediction that was made."""

    def made() -> set[str]:
        account = live.store.accounts.ensure("ana").id
        return {one.id for one in live.store.predictions.page(account).items}

    live.gate.clear()
    before = made()
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
    headers = {"authorization": f"Bearer {live.token}", "content-type": "application/json", **WAIT}
    connection.request("POST", "/v1/predictions", json.dumps(body_of(**inputs)), headers)
    eventually(lambda: made() != before)
    connection.close()
    (new,) = made() - before
    return new


def test_a_client_that_gave_up_and_asks_again_gets_the_same_prediction(live: Live):
    made = give_up(live, seed=1)
    again = ask(live, seed=1)
    assert again.json()["id"] == made
    assert again.json()["status"] == "succeeded"
    assert again.headers["idempotent-replayed"] == "true"


def test_giving_up_counts_once_and_for_the_same_request_only(live: Live):
    made = give_up(live, seed=2)
    others = [ask(live, seed=3), ask(live, seed=2)]
    others.append(ask(live, seed=2))
    assert [one.json()["id"] == made for one in others] == [False, True, False]


def test_what_was_cancelled_is_made_anew(live: Live):
    made = give_up(live, seed=4)
    live.store.predictions.cancel(made)
    assert ask(live, seed=4).json()["id"] != made


def test_equal_requests_of_clients_that_wait_make_two_predictions(live: Live):
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: ask(live, seed=5), range(2)))
    assert len({answer.json()["id"] for answer in answers}) == 2


def test_a_request_that_nobody_waited_for_is_forgotten_in_time():
    now = 0.0
    retried = RetriedRequests(lambda: now)

    async def left() -> bool:
        return True

    async def held_and_left() -> str | None:
        await retried.release("key", retried.hold("key", "id", left))
        nonlocal now
        now = REMEMBERED_S + 1
        return await retried.take_abandoned("key")

    assert asyncio.run(held_and_left()) is None


def test_of_two_retries_at_the_same_moment_one_gets_the_abandoned_prediction():
    retried = RetriedRequests()

    async def left() -> bool:
        await asyncio.sleep(0.01)
        return True

    async def retry_twice() -> list[str | None]:
        retried.hold("key", "id", left)
        return list(await asyncio.gather(*(retried.take_abandoned("key") for _ in range(2))))

    assert sorted(map(str, asyncio.run(retry_twice()))) == ["None", "id"]

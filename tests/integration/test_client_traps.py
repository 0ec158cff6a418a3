"""What breaks clients of Replicate's API when a server gets it wrong, and which test holds it.

The tests themselves lie beside what they are about; those that fit nowhere else are here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_support import DATA_URI, PNG, Server, open_server
from document_support import checked
from starlette.testclient import TestClient

TRAPS = {
    1: "test_api_predictions::test_a_bare_latest_finds_the_model_that_the_inputs_fit",
    2: "test_api_predictions::test_a_wait_that_runs_out_never_says_processing",
    3: "test_client_traps::test_aborted_is_said_only_to_those_who_asked_for_it",
    4: "test_api_files::test_over_plain_http_small_outputs_are_data_uris_and_large_ones_links",
    5: "test_api_files::test_a_stream_lies_where_clients_expect_files_and_needs_no_token",
    6: "test_api_files::test_an_output_is_read_without_token_or_redirect",
    7: "test_client_traps::test_no_public_url_moves_streams_away_from_files",
    8: "test_client_traps::test_a_stream_has_only_events_that_every_client_knows",
    9: "test_client_traps::test_what_clients_take_for_a_text_is_never_null",
    10: "test_api_models::test_every_model_has_what_clients_insist_on",
    11: "test_api_files::test_an_upload_is_described_with_all_that_clients_need",
    12: "test_api_predictions::test_a_create_answers_201_with_everything_that_clients_read",
    13: "test_client_traps::test_creates_work_with_any_prefix_and_without_a_redirect",
    14: "test_client_traps::test_query_reads_its_body_whatever_type_it_claims",
    15: "test_api_gate::test_a_wait_is_held_a_little_shorter_than_clients_wait",
    16: "test_retried_requests::test_a_client_that_gave_up_and_asks_again_gets_the_same_prediction",
    17: "test_rate_limits::test_refused_requests_do_not_put_off_the_next_one_and_cost_nothing",
    18: "test_client_traps::test_every_date_has_at_most_six_digits_of_a_second_and_a_z",
    19: "test_api_predictions::test_lists_are_paged_by_absolute_links_that_keep_their_filters",
    20: "test_client_traps::test_the_type_of_an_upload_is_that_of_its_bytes",
    21: "test_api_files::test_uploads_of_another_form_are_refused",
    22: "test_api_predictions::test_keys_of_older_clients_are_taken",
}
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


def test_each_of_the_22_traps_has_its_test():
    assert list(TRAPS) == list(range(1, 23))
    assert len(set(TRAPS.values())) == 22
    for place in TRAPS.values():
        file, _, name = place.partition("::")
        text = next(Path(__file__).parents[1].rglob(f"{file}.py")).read_text(encoding="utf-8")
        assert f"def {name}(" in text, place


@pytest.mark.parametrize(("strict", "said"), [(False, "canceled"), (True, "aborted")])
def test_aborted_is_said_only_to_those_who_asked_for_it(tmp_path, strict: bool, said: str):
    server = open_server(tmp_path, strict_statuses=strict)
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    made = server.post("/v1/predictions", body, headers={"cancel-after": "5s"}).json()
    object.__setattr__(server.store.queue, "clock", lambda: server.store.clock().replace(year=2100))
    server.store.queue.expire()
    assert server.get(f"/v1/predictions/{made['id']}").json()["status"] == said


def test_no_public_url_moves_streams_away_from_files(tmp_path):
    for number, url in enumerate(("https://tile.example", "http://127.0.0.1:8000/")):
        server = open_server(tmp_path / str(number), public_url=url)
        stream = server.create()["urls"]["stream"]
        assert stream.startswith(f"{url.rstrip('/')}/v1/files/")


def test_a_stream_has_only_events_that_every_client_knows(server: Server):
    made = server.create()
    claimed = server.store.queue.claim("tests")
    assert claimed is not None
    server.store.queue.lose(claimed.id, claimed.attempt, "it was killed")
    server.work()
    text = server.get(made["urls"]["stream"] + "?logs=1").text
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    for block in blocks:
        lines = block.split("\n")
        assert lines[0].partition(": ")[2] in ("output", "logs", "error", "done")
        assert re.fullmatch(r"id: \d+", lines[1]), "events without an id are dropped"
        assert all(line.startswith("data: ") for line in lines[2:])


def test_what_clients_take_for_a_text_is_never_null(server: Server):
    succeeded, failed, waiting = (server.create()["id"] for _ in range(3))
    server.work()
    claimed = server.store.queue.claim("tests")
    assert claimed is not None
    server.store.queue.fail(claimed.id, claimed.attempt, "It broke.")
    for made in (succeeded, failed, waiting):
        reported = server.get(f"/v1/predictions/{made}").json()
        texts = [
            reported["version"],
            reported["model"],
            reported["logs"],
            *reported["urls"].values(),
        ]
        assert all(isinstance(text, str) for text in texts)
        assert reported["error"] == ("It broke." if made == failed else None)
        assert isinstance(reported["metrics"], dict)


@pytest.mark.parametrize("prefix", ["/v1", "/v1/v1", ""])
def test_creates_work_with_any_prefix_and_without_a_redirect(server: Server, prefix: str):
    body = {"input": {"image": DATA_URI}}
    for path, rest in (
        ("/predictions", {"version": "tegula/upscale"}),
        ("/models/tegula/upscale/predictions", {}),
    ):
        answer = server.post(prefix + path, {**body, **rest}, follow_redirects=False)
        assert answer.status_code == 201


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/octet-stream", ""])
@pytest.mark.parametrize("text", ["clarity", '"clarity"'])
def test_query_reads_its_body_whatever_type_it_claims(server: Server, kind: str, text: str):
    headers = {"content-type": kind} if kind else {}
    answer = server.client.request("QUERY", "/v1/models", content=text, headers=headers)
    assert answer.json()["results"][0]["name"] == "clarity-upscaler"


def test_a_server_that_broke_says_not_to_try_again(tmp_path, monkeypatch):
    server = open_server(tmp_path)
    monkeypatch.setattr(type(server.store.predictions), "page", None)
    client = checked(TestClient(server.client.app, raise_server_exceptions=False))
    answer = client.get("/v1/predictions", headers=server.client.headers)
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["content-type"] == "application/problem+json"


def dates(value: Any) -> Iterator[str]:
    """Every value that a client reads as a date."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name.endswith("_at") or name == "deadline":
                yield item
            else:
                yield from dates(item)
    elif isinstance(value, list):
        for item in value:
            yield from dates(item)


def test_every_date_has_at_most_six_digits_of_a_second_and_a_z(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    server.post("/v1/predictions", body, headers={"cancel-after": "1h"})
    server.work()
    server.client.post("/v1/files", files={"content": ("a.png", PNG)})
    seen = []
    for path in (
        "/v1/predictions",
        "/v1/files",
        "/v1/models",
        "/v1/models/tegula/upscale/versions",
    ):
        seen += list(dates(server.get(path).json()))
    assert len(seen) > 8
    assert [date for date in seen if not DATE.fullmatch(date)] == []


@pytest.mark.parametrize("name", ["upload", "buffer_1763812345678", "blob_1", "photo.jpg"])
@pytest.mark.parametrize("kind", ["application/octet-stream", "image/jpeg", "text/html"])
def test_the_type_of_an_upload_is_that_of_its_bytes(server: Server, name: str, kind: str):
    reported = server.client.post("/v1/files", files={"content": (name, PNG, kind)}).json()
    assert reported["content_type"] == "image/png"
    shown = server.get(f"/v1/files/{reported['id']}", headers={"accept": "image/*"})
    assert shown.headers["content-type"] == "image/png"

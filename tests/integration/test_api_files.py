"""Uploads, outputs and streams over HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from typing import Any
from urllib.parse import quote

import pytest
from api_support import DATA_URI, PNG, Server, open_server
from sqlalchemy import event

from tegula.server.api.streams import stream
from tegula.server.queue import Report
from tegula.server.store import Store

NOBODY = {"authorization": ""}


def upload(server: Server, data: bytes = PNG, name: str = "in.png", **fields):
    parts = {"content": (name, data, "application/octet-stream"), **fields}
    return server.client.post("/v1/files", files=parts)


def test_an_upload_is_described_with_all_that_clients_need(server: Server):
    answer = upload(server)
    assert answer.status_code == 201
    file = answer.json()
    assert file["content_type"] == "image/png", "the bytes tell, not the header"
    assert {"id", "name", "size", "etag", "checksums", "metadata", "created_at"} <= set(file)
    assert server.get(f"/v1/files/{file['id']}").json() == file
    assert server.get("/v1/files").json()["results"] == [file]


@pytest.mark.parametrize(
    "part", [(None, '{"a": "b"}'), ("blob", b'{"a": "b"}', "application/json")]
)
def test_metadata_comes_back_whether_sent_as_field_or_file(server: Server, part):
    assert upload(server, metadata=part).json()["metadata"] == {"a": "b"}


@pytest.mark.parametrize("text", ["[1]", "{", "NaN", '{"a": NaN}', "[" * 3000])
def test_metadata_that_is_no_object_is_refused(server: Server, text: str):
    assert upload(server, metadata=(None, text)).status_code == 422
    assert server.get("/v1/files").json()["results"] == []


def test_the_field_filename_goes_before_that_of_the_part(server: Server):
    named = upload(server, name="blob_123", filename=(None, "holiday.png")).json()
    assert named["name"] == "holiday.png"


def test_an_upload_may_be_deleted_once(server: Server):
    file = upload(server).json()
    assert server.client.delete(f"/v1/files/{file['id']}").status_code == 204
    gone = server.client.delete(f"/v1/files/{file['id']}")
    assert gone.status_code == 404
    assert gone.json()["detail"] == "File not found"


def test_uploads_over_the_limit_are_refused(tmp_path):
    small = open_server(tmp_path, max_upload_bytes=1000)
    refused = upload(small, PNG + b"\0" * 1000)
    assert refused.status_code == 413
    assert "must be less than" in refused.json()["detail"]
    assert small.get("/v1/files").json()["results"] == []


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "text/plain"])
def test_uploads_of_another_form_are_refused(server: Server, kind: str):
    answer = server.client.post("/v1/files", content=b"{}", headers={"content-type": kind})
    assert answer.status_code in (400, 415, 422)


def test_an_upload_without_its_part_is_refused(server: Server):
    answer = server.client.post("/v1/files", files={"other": ("a", b"b")})
    assert answer.status_code == 422


@pytest.mark.parametrize("prefix", ["/v1/files", "/v1/v1/files", "/files"])
@pytest.mark.parametrize("host", ["https://tile.example", "http://127.0.0.1:8000"])
def test_an_upload_is_recognised_under_every_address(tmp_path, prefix: str, host: str):
    server = open_server(tmp_path, url_aliases=("http://127.0.0.1:8000",))
    file = upload(server).json()
    url = f"{host}{prefix}/{file['id']}"
    made = server.post("/v1/predictions", {"version": "tegula/upscale", "input": {"image": url}})
    assert made.status_code == 201
    assert made.json()["input"]["image"] == url


def test_the_upload_of_another_account_is_no_input(server: Server):
    file = upload(server).json()
    other = server.store.accounts.ensure("bo")
    _, token = server.store.accounts.create_token(other.id, "bo")
    body = {"version": "tegula/upscale", "input": {"image": file["urls"]["get"]}}
    headers = {"authorization": f"Bearer {token}"}
    assert server.client.post("/v1/predictions", json=body, headers=headers).status_code == 422
    assert server.get(f"/v1/files/{file['id']}", headers=headers).status_code == 404


def test_a_signed_download_needs_no_token_and_no_more_than_its_signature(server: Server):
    file = upload(server).json()
    expiry = 4_000_000_000
    signature = server.store.links.signer.download("ana", file["id"], expiry)
    path = f"/v1/files/{file['id']}/download?owner=ana&expiry={expiry}&signature="
    good = server.get(path + quote(signature, safe=""), headers=NOBODY)
    assert good.content == PNG
    assert server.get(path + "AAAA", headers=NOBODY).status_code == 404
    past = path.replace(str(expiry), "1") + quote(
        server.store.links.signer.download("ana", file["id"], 1), safe=""
    )
    assert server.get(past, headers=NOBODY).status_code == 404


def test_an_output_is_read_without_token_or_redirect(server: Server):
    made = server.create()
    server.work()
    link = server.get(f"/v1/predictions/{made['id']}").json()["output"]
    assert link.startswith("https://tile.example/")
    assert link.endswith("/out-0.png")
    answer = server.get(link, headers=NOBODY, follow_redirects=False)
    assert answer.status_code == 200
    assert answer.content == PNG
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(PNG))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["content-disposition"].startswith("inline")
    assert "etag" in answer.headers
    part = server.get(link, headers={**NOBODY, "range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, PNG[:4])


def test_a_link_that_was_tampered_with_opens_nothing(server: Server):
    made = server.create()
    server.work()
    link = server.get(f"/v1/predictions/{made['id']}").json()["output"]
    token = link.split("/")[-2]
    for wrong in (token[:-1] + ("A" if token[-1] != "A" else "B"), token.split(".")[0], "x.y"):
        assert server.get(link.replace(token, wrong), headers=NOBODY).status_code == 404


def test_what_a_browser_would_run_is_served_as_a_dead_attachment(server: Server):
    made = server.create()
    server.work(data=b"<script>alert(1)</script>")
    link = server.get(f"/v1/predictions/{made['id']}").json()["output"]
    answer = server.get(link)
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_over_plain_http_small_outputs_are_data_uris_and_large_ones_links(tmp_path):
    url = "http://127.0.0.1:8000"
    server = open_server(tmp_path, public_url=url, inline_output_bytes=len(PNG))
    small = server.create()
    server.work()
    large = server.create()
    server.work(data=PNG + b"\0")
    assert server.get(f"/v1/predictions/{small['id']}").json()["output"] == DATA_URI
    link = server.get(f"/v1/predictions/{large['id']}").json()["output"]
    assert link.startswith(url + "/o/")
    listed = server.get("/v1/predictions").json()["results"]
    assert all(item["output"].startswith(url) for item in listed), "lists stay small"


def test_over_tls_outputs_are_links(server: Server):
    made = server.create()
    server.work()
    assert server.get(f"/v1/predictions/{made['id']}").json()["output"].startswith("https://")


def events_of(text: str) -> list[tuple[str, str, str]]:
    found = []
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name:
                fields[name] = f"{fields[name]}\n{value}" if name in fields else value
        if "event" in fields:
            found.append((fields["event"], fields["id"], fields["data"]))
    return found


def test_a_stream_lies_where_clients_expect_files_and_needs_no_token(server: Server):
    made = server.create()
    server.work()
    url = made["urls"]["stream"]
    assert url.startswith("https://tile.example/v1/files/")
    answer = server.get(url, headers=NOBODY)
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert "\r" not in answer.text
    kinds = [kind for kind, _, _ in events_of(answer.text)]
    assert kinds == ["output", "done"]
    assert json.loads(events_of(answer.text)[-1][2]) == {}


def test_a_stream_sends_logs_only_when_asked(server: Server):
    made = server.create()
    server.work()
    text = server.get(made["urls"]["stream"] + "?logs=1").text
    assert [kind for kind, _, _ in events_of(text)] == ["logs", "output", "done"]


def test_a_stream_goes_on_after_the_last_event_that_was_seen(server: Server):
    made = server.create()
    server.work()
    first = events_of(server.get(made["urls"]["stream"]).text)[0]
    again = server.get(made["urls"]["stream"], headers={"last-event-id": first[1]}).text
    assert [kind for kind, _, _ in events_of(again)] == ["done"]


@pytest.mark.parametrize("last", ["", "-1", "x", "9" * 30, "9" * 5000])
def test_a_stream_starts_anew_after_an_event_that_cannot_be(server: Server, last: str):
    made = server.create()
    server.work()
    text = server.get(made["urls"]["stream"], headers={"last-event-id": last}).text
    assert [kind for kind, _, _ in events_of(text)] == ["output", "done"]


def test_a_stream_follows_what_happens(server: Server):
    made = server.create()
    timer = server.work_soon(0.2)
    kinds = [kind for kind, _, _ in events_of(server.get(made["urls"]["stream"]).text)]
    timer.join()
    assert kinds == ["output", "done"]


@pytest.mark.parametrize(("end", "reason"), [("cancel", "canceled"), ("fail", "error")])
def test_a_stream_tells_how_it_ended(server: Server, end: str, reason: str):
    made = server.create()
    claimed = server.store.queue.claim("tests")
    assert claimed is not None

    def finish():
        if end == "cancel":
            server.store.predictions.cancel(made["id"])
        else:
            server.store.queue.fail(made["id"], claimed.attempt, "It broke.\nTwice.")

    threading.Timer(0.1, finish).start()
    happened = events_of(server.get(made["urls"]["stream"]).text)
    assert json.loads(happened[-1][2]) == {"reason": reason}
    if end == "fail":
        assert json.loads(happened[-2][2]) == {"detail": "It broke.\nTwice."}


def test_a_stream_of_a_wrong_token_is_not_there(server: Server):
    assert server.get("/v1/files/streams/nothing.x", headers=NOBODY).status_code == 404


def test_odd_data_uris_are_read(server: Server):
    body = base64.urlsafe_b64encode(PNG).decode().rstrip("=")
    for uri in (f"data:;base64,{body}", f"data:image/png;charset=utf-8;base64,{quote(body)}"):
        answer = server.post(
            "/v1/predictions", {"version": "tegula/upscale", "input": {"image": uri}}
        )
        assert answer.status_code == 201
        assert server.get(answer.json()["input"]["image"]).content == PNG


def test_a_silent_stream_is_kept_alive_by_comments(server: Server, monkeypatch):
    monkeypatch.setattr("tegula.server.api.streams.KEEP_ALIVE_S", 0.05)
    name, service = server.create()["id"], server.client.app.state.service

    async def follow() -> list[str]:
        """All that is streamed, of a prediction that is worked on after some silence."""
        parts: list[str] = []
        async for part in stream(service, name):
            parts.append(part if isinstance(part, str) else part.decode())
            if len(parts) == 4:
                await asyncio.to_thread(server.work)
        return parts

    parts = asyncio.run(follow())
    assert all(part.startswith(": ") for part in parts[:4])
    assert "event: done" in parts[-1]


def test_many_streams_on_which_nothing_happens_ask_the_database_together(server: Server):
    """Else each would ask once a second, and 300 streams would keep the server busy."""
    count, seconds = 40, 1.5
    names = [server.create(prompt=str(number))["id"] for number in range(count)]
    service = server.client.app.state.service
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append(statement)

    async def follow() -> None:
        async def drain(name: str) -> None:
            async for _ in stream(service, name):
                pass

        following = asyncio.gather(*map(drain, names))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(following, seconds)

    event.listen(server.store.database.engine, "before_cursor_execute", note)
    asyncio.run(follow())
    assert len(statements) <= 2 * count + 5


def test_a_stream_sees_what_another_process_does(server: Server):
    made = server.create()
    other = Store.open(server.store.settings)
    timer = threading.Timer(0.3, other.predictions.cancel, [made["id"]])
    timer.start()
    happened = events_of(server.get(made["urls"]["stream"]).text)
    timer.join()
    other.close()
    assert [kind for kind, _, _ in happened] == ["done"]


def test_the_output_of_a_run_that_was_lost_is_not_streamed(server: Server):
    made = server.create()
    first = server.store.queue.claim("tests")
    assert first is not None
    server.store.queue.start(first.id, first.attempt)
    server.store.queue.report(first.id, first.attempt, Report(outputs=["lost"]))
    server.store.queue.lose(first.id, first.attempt, "it was killed")
    server.work()
    happened = events_of(server.get(made["urls"]["stream"]).text)
    assert [kind for kind, _, _ in happened] == ["output", "done"]
    assert happened[0][2].endswith("out-0.png")


def test_lost_output_is_not_streamed_while_the_next_run_waits_either(server: Server):
    made = server.create()
    first = server.store.queue.claim("tests")
    assert first is not None
    server.store.queue.start(first.id, first.attempt)
    server.store.queue.report(first.id, first.attempt, Report(outputs=["lost"] * 1500))
    server.store.queue.lose(first.id, first.attempt, "it was killed")
    timer = server.work_soon(0.3)
    happened = events_of(server.get(made["urls"]["stream"]).text)
    timer.join()
    assert [kind for kind, _, _ in happened] == ["output", "done"]
    assert happened[0][2].endswith("out-0.png")


def test_a_stream_of_very_many_events_misses_none(server: Server):
    made = server.create()
    claimed = server.store.queue.claim("tests")
    assert claimed is not None
    report = Report(outputs=[str(number) for number in range(2500)])
    server.store.queue.report(claimed.id, claimed.attempt, report)
    server.store.queue.start(claimed.id, claimed.attempt)
    server.store.queue.succeed(claimed.id, claimed.attempt)
    happened = events_of(server.get(made["urls"]["stream"]).text)
    assert [data for kind, _, data in happened if kind == "output"] == list(map(str, range(2500)))

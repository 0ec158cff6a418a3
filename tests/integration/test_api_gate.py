"""Who may ask, how often and how much; the pages and what operators ask."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest
import uvicorn
from api_support import DATA_URI, PNG, Server, open_server
from cli_support import run
from document_support import checked
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tegula.server.api.app import GracefulServer, create_app
from tegula.server.api.create import parse_cancel_after, parse_prefer
from tegula.server.api.errors import ProblemError
from tegula.server.api.gate import normalise
from tegula.server.log import JsonLines, log_context
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.webhooks import Outcome

NOBODY = {"authorization": ""}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer nonsense", "Basic YTpi"])
def test_without_a_good_token_the_answer_is_replicates_401(server: Server, header: str):
    answer = server.get("/v1/account", headers={"authorization": header})
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "title": "Unauthenticated",
        "detail": "You did not pass a valid authentication token",
        "status": 401,
    }


@pytest.mark.parametrize("kind", ["Bearer", "Token", "bearer"])
def test_both_kinds_of_authorization_are_taken(server: Server, kind: str):
    headers = {"authorization": f"{kind} {server.token}"}
    assert server.get("/v1/account", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/download",
        "/v1/files/x",
        "/v1/files",
        "/v1/predictions",
        "/v1/predictions/x",
        "/v1/models",
        "/v1/usage",
        "/v1/search?query=clarity",
        "/v1/webhooks/default/secret",
        "/files",
        "/v1/v1/account",
        "/v1/nothing",
    ],
)
def test_nothing_that_belongs_to_somebody_opens_without_a_token(server: Server, path: str):
    assert server.get(path, headers=NOBODY).status_code == 401
    assert server.client.delete(path, headers=NOBODY).status_code == 401


def test_a_slash_too_many_is_no_redirect(server: Server):
    assert server.get("/v1/account/", follow_redirects=False).status_code == 404


def test_a_revoked_token_opens_nothing(server: Server):
    server.store.accounts.revoke("tests")
    assert server.get("/v1/account").status_code == 401


def test_a_body_is_not_looked_at_before_the_token(server: Server):
    answer = server.client.post("/v1/predictions", content="{", headers=NOBODY)
    assert answer.status_code == 401


def test_without_authentication_everybody_is_the_local_account(tmp_path):
    server = open_server(tmp_path, no_auth=True)
    answer = server.get("/v1/account", headers={"authorization": "Bearer anything"})
    assert answer.json()["username"] == "local"


@pytest.mark.parametrize("path", ["/v1/account", "/account", "/v1/v1/account", "/v1/v1/v1/account"])
def test_every_prefix_reaches_the_api(server: Server, path: str):
    assert server.get(path, follow_redirects=False).status_code == 200


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/v1", "/v1"),
        ("/", "/"),
        ("", ""),
        ("/docs", "/docs"),
        ("/v1/v1", "/v1/v1"),
        ("/files/streams/x", "/v1/files/streams/x"),
        ("/predictionsx", "/predictionsx"),
    ],
)
def test_a_path_gets_one_prefix_or_stays(path: str, plain: str):
    assert normalise(path) == plain


def test_creates_and_other_requests_have_limits_of_their_own(tmp_path):
    server = open_server(tmp_path, creates_per_minute=2, requests_per_minute=3)
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    codes = [server.post("/v1/predictions", body).status_code for _ in range(3)]
    assert codes == [201, 201, 429]
    answers = [server.get("/v1/account") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
    refused = answers[-1]
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["ratelimit-reset"] == refused.headers["retry-after"]
    expected = (
        f"Request was throttled. Your rate limit resets in ~{refused.headers['retry-after']}s."
    )
    assert refused.json()["detail"] == expected


def test_answers_of_the_api_are_never_cached(server: Server):
    made = server.create()
    answer = server.get(f"/v1/predictions/{made['id']}")
    assert answer.headers["cache-control"] == "no-store"


def test_pages_of_named_origins_may_call(tmp_path):
    server = open_server(tmp_path, cors_origins=("https://app.example",))
    preflight = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, prefer, cancel-after",
    }
    answer = server.client.options("/v1/predictions", headers={**preflight, **NOBODY})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    stranger = server.client.options(
        "/v1/predictions", headers={**preflight, "origin": "https://x.y"}
    )
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize(
    ("header", "seconds", "held"),
    [("wait", 60, 55), ("wait=60", 60, 55), ("wait=10", 10, 9), ("wait=1", 1, 0.8),
     ("wait=600", 60, 55), ("respond-async, wait=5", 5, 4)],
)  # fmt: skip
def test_a_wait_is_held_a_little_shorter_than_clients_wait(header, seconds, held):
    wait = parse_prefer(header)
    assert wait is not None
    assert (wait.seconds, wait.hold_s) == (seconds, held)


def test_other_preferences_are_passed_over():
    assert parse_prefer("respond-async") is None
    assert parse_prefer(None) is None


@pytest.mark.parametrize(
    ("header", "seconds"), [("30", 30), ("5s", 5), ("5m", 300), ("1h30m45s", 5445), (None, None)]
)
def test_durations_are_read(header, seconds):
    assert parse_cancel_after(header) == seconds


@pytest.mark.parametrize("parse", [parse_prefer, parse_cancel_after])
@pytest.mark.parametrize("start", ["", "wait="])
def test_a_number_of_any_length_is_refused_in_words(parse, start):
    if (parse is parse_prefer) == bool(start):
        with pytest.raises(ProblemError):
            parse(start + "9" * 5000)


def test_operators_see_life_readiness_and_counters(server: Server):
    server.create()
    assert server.get("/healthz", headers=NOBODY).json() == {"status": "ok"}
    assert server.get("/readyz", headers=NOBODY).json() == {"status": "ok", "waiting": 1}
    text = server.get("/metrics", headers=NOBODY).text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["tegula_http_requests_total", "POST", "201"] == 1
    assert samples["tegula_predictions_unfinished",] == 1
    assert samples["tegula_predictions_run_total",] == 0
    assert {name for name, *_ in samples} == {
        "tegula_http_requests_total",
        "tegula_http_request_seconds_total",
        "tegula_predictions_fetching",
        "tegula_predictions_unfinished",
        "tegula_predictions_unfinished_seconds",
        "tegula_predictions_run_total",
        "tegula_predict_seconds_total",
    }


def test_problems_can_be_hashed_as_other_exceptions_can():
    problems = {ProblemError(404, "No."), ProblemError(404, "No.")}
    assert len(problems) == 2


def test_the_own_document_names_every_operation_once(server: Server):
    document = server.get("/openapi.json").json()
    names = [
        operation["operationId"]
        for operations in document["paths"].values()
        for operation in operations.values()
    ]
    assert len(names) == len(set(names))
    assert "post" in document["paths"]["/v1/predictions"]


def test_a_log_line_is_json_with_the_prediction():
    record = logging.LogRecord("x", logging.INFO, "f", 1, "took %d", (3,), None)
    record.prediction = "abc"
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["prediction"], line["level"]) == ("took 3", "abc", "info")


def test_every_line_within_a_block_names_what_the_block_is_about():
    record = logging.LogRecord("x", logging.INFO, "f", 1, "deep inside", (), None)
    with log_context(prediction="abc", account="ana"), log_context(prediction="def"):
        line = json.loads(JsonLines().format(record))
    assert (line["prediction"], line["account"]) == ("def", "ana")
    assert "prediction" not in json.loads(JsonLines().format(record))


def test_the_lines_of_a_request_name_its_prediction(server: Server, caplog):
    caplog.handler.setFormatter(JsonLines())
    with caplog.at_level(logging.INFO, "tegula"):
        made = server.create()
        server.get(f"/v1/predictions/{made['id']}")
        server.work()
        server.get(made["urls"]["stream"])
    lines = [json.loads(line) for line in caplog.text.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["logger"] == "tegula.api"]
    assert len(requests) == 4
    assert {line["prediction"] for line in requests} == {made["id"]}


@pytest.mark.parametrize(("grace", "runs", "left"), [(30, 0.0, 30), (8, 1.5, 7), (1, 0.0, 5)])
def test_answers_on_their_way_have_what_the_runs_leave_of_the_grace(monkeypatch, grace, runs, left):
    class Stopping:
        async def stop(self):
            now.append(runs)

    async def shutdown(server, _sockets=None):
        seen.append(server.config.timeout_graceful_shutdown)

    seen, now = [], [0.0]
    monkeypatch.setattr("tegula.server.api.app.time", SimpleNamespace(monotonic=lambda: now[-1]))
    monkeypatch.setattr(uvicorn.Server, "shutdown", shutdown)
    config = uvicorn.Config(lambda: None, timeout_graceful_shutdown=grace)
    asyncio.run(GracefulServer(config, Stopping()).shutdown())
    assert seen == [left]


def test_the_log_has_the_clients_address_and_nothing_that_opens_a_link(server: Server, caplog):
    caplog.handler.setFormatter(JsonLines())
    with caplog.at_level(logging.INFO, "tegula"):
        made = server.create()
        server.work()
        output = server.get(f"/v1/predictions/{made['id']}").json()["output"]
        shared = server.post(f"/v1/predictions/{made['id']}/share").json()["url"]
        token = shared.rpartition("=")[2]
        upload = server.client.post("/v1/files", files={"content": ("a.png", PNG)}).json()
        signature = server.store.links.signer.download("ana", upload["id"], 2_000_000_000)
        download = {"owner": "ana", "expiry": 2_000_000_000, "signature": signature}
        stream = made["urls"]["stream"]
        paths = [output, stream, stream.replace("/v1/files/streams", "/streams"), shared]
        for path in (*paths, f"/v1/shared/{token}", f"/v1/shared/{token}/source"):
            assert server.get(path, headers=NOBODY).status_code == 200
        address = f"/v1/files/{upload['id']}/download"
        assert server.get(address, params=download, headers=NOBODY).status_code == 200
    secrets = (token, signature, server.token, *(path.split("/")[-1] for path in paths[1:3]))
    assert not [secret for secret in (*secrets, output.split("/")[4]) if secret in caplog.text]
    lines = [json.loads(line) for line in caplog.text.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["logger"] == "tegula.api" and "seconds" in line]
    assert {line["client"] for line in requests} == {"testclient"}
    assert "GET /o/.../out-0.png 200" in {line["message"] for line in requests}


def test_a_file_input_that_cannot_be_read_is_named(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": "data:image/png;base64,!!"}}
    (wrong,) = server.post("/v1/predictions", body).json()["invalid_fields"]
    assert wrong["field"] == "input.image"


def test_a_token_is_shown_once_listed_without_its_text_and_revoked(tmp_path):
    made = run("tokens", "create", "laptop", "--folder", tmp_path)
    token = made.stdout.strip()
    assert token.startswith("tgl_")
    listed = run("tokens", "list", "--folder", tmp_path).stdout
    assert "laptop" in listed
    assert token not in listed
    server = open_server(tmp_path)
    headers = {"authorization": f"Bearer {token}"}
    assert server.get("/v1/account", headers=headers).json()["username"] == "local"
    assert run("tokens", "revoke", "laptop", "--folder", tmp_path).exit_code == 0
    assert server.get("/v1/account", headers=headers).status_code == 401
    assert run("tokens", "revoke", "laptop", "--folder", tmp_path).exit_code != 0


def test_webhooks_are_listed_and_sent_again_by_command(tmp_path):
    server = open_server(tmp_path)
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    server.post("/v1/predictions", {**body, "webhook": "https://example.com/hook"})
    made = server.work()
    message = server.store.webhooks.messages(made.id)[-1]
    server.store.webhooks.finish_attempt(
        message.id, Outcome("failed", server.store.clock(), 503, None)
    )
    listed = run("webhooks", "list", "--state", "failed", "--folder", tmp_path).stdout
    assert listed.startswith(message.id)
    assert listed.endswith("https://example.com/hook  answered 503\n")
    assert run("webhooks", "replay", message.id, "--folder", tmp_path).exit_code == 0
    assert server.store.webhooks.messages(made.id)[-1].state == "pending"
    refused = run("webhooks", "replay", "msg_none", "--folder", tmp_path)
    assert (refused.exit_code, "no such webhook" in refused.stderr) == (9, True)
    server.store.close()


def test_a_new_key_ends_old_links_and_no_tokens(tmp_path):
    before = open_server(tmp_path)
    made = before.create()
    before.work()
    output = before.get(f"/v1/predictions/{made['id']}").json()["output"]
    before.store.close()
    assert run("tokens", "rotate-key", "--folder", tmp_path).exit_code == 0
    store = Store.open(before.store.settings)
    client = checked(TestClient(create_app(store), base_url="https://tile.example"))
    client.headers["authorization"] = f"Bearer {before.token}"
    now = client.get(f"/v1/predictions/{made['id']}").json()
    assert client.get(output).status_code == 404
    assert client.get(made["urls"]["stream"]).status_code == 404
    assert client.get(now["output"]).content == PNG
    assert "event: done" in client.get(now["urls"]["stream"]).text
    store.close()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--no-auth", "--host", "0.0.0.0"], "--force"),
        (["--host", "0.0.0.0"], "--public-url"),
        (["--tls-cert", "a.pem"], "--tls-key"),
    ],
)
def test_what_would_let_strangers_in_or_give_out_useless_links_is_refused(tmp_path, words, reason):
    refused = run("serve", *words, "--folder", tmp_path)
    assert refused.exit_code == 2
    assert reason in refused.stderr


@pytest.mark.parametrize(
    ("path", "reached"),
    [
        ("/tile/v1/account", 200),
        ("/tile/account", 200),
        ("/tile/v1/v1/account", 200),
        ("/v1/account", 200),
        ("/other/up/v1/account", 200),
        ("/tile/healthz", 200),
        ("/tile/", 200),
        ("/tiles/v1/account", 404),
        ("/tile/tile/v1/account", 404),
    ],
)
def test_a_gateway_may_leave_its_path_on_or_take_it_off(tmp_path, path, reached):
    mounts = {
        "public_url": "https://a.example/tile",
        "url_aliases": ("https://b.example/other/up",),
    }
    server = open_server(tmp_path, **mounts)
    assert server.get(path, follow_redirects=False).status_code == reached
    server.store.close()


def test_the_start_page_of_a_mounted_server_has_its_slash(tmp_path):
    server = open_server(tmp_path, public_url="https://tile.example/tile")
    answer = server.get("/tile", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/tile/")
    server.store.close()


def test_the_operator_is_told_once_of_a_prefix_that_links_lack(tmp_path, caplog):
    server = open_server(tmp_path, public_url="https://tile.example/tile")
    for prefix in ("/tile", "/tile/", "/up", "/other"):
        server.get("/healthz", headers={"x-forwarded-prefix": prefix})
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == [
        "A proxy sends X-Forwarded-Prefix: '/up'; links lead there once public_url ends with it."
    ]
    server.store.close()


@pytest.mark.parametrize("path", ["/p", "/docs/", "/pages/tile"])
def test_a_gateway_must_not_mount_the_server_at_a_page_of_its_own(tmp_path, path):
    with pytest.raises(ValueError, match="a page of the server itself"):
        ServerSettings(public_url=f"https://tile.example{path}")

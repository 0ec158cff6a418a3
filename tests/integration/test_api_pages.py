"""The pages as they are served, and the parts of the API that are there for them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from urllib.parse import urljoin

import pytest
from api_support import DATA_URI, PNG, Server, open_server, png

from tegula.folders import models_folder
from tegula.server.api.gate import session_name
from tegula.server.api.pages import SIGNED_IN_FOR

NOBODY = {"authorization": ""}
PAGES = ["/", "/history", "/catalog", "/docs", "/p/abc"]


@pytest.fixture
def open_to_all(tmp_path):
    opened = open_server(tmp_path, no_auth=True, public_url="http://127.0.0.1:8000")
    with opened.client:
        opened.client.base_url = "http://127.0.0.1:8000"
        yield opened
    opened.store.close()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_nothing_but_its_own_files(server: Server, page: str):
    answer = server.get(page, headers=NOBODY)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)|javascript:", answer.text)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_and_what_it_loads_come_from_this_server(server: Server, page: str):
    waiting, seen = [page], {"/openapi.json"}  # which no page loads; it is full of addresses
    while waiting:
        path = waiting.pop()
        seen.add(path)
        answer = server.get(path, headers=NOBODY)
        assert answer.status_code == 200, path
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://\w|innerHTML|eval\(", text), path
        assert not re.search(r'(?:src|href|action)="/', text), "a gateway may mount it at a path"
        loaded = re.findall(r'(?:src|href)="([^"#]+)"', text)
        loaded += re.findall(r'from "(\./[^"]+)"', text)
        loaded = [urljoin(path, address) for address in loaded]
        waiting += set(loaded) - seen
    assert "/pages/page.css" in seen


def test_the_page_of_a_prediction_holds_no_data(server: Server):
    page = server.get(server.create(prompt="secret words")["urls"]["web"], headers=NOBODY)
    assert page.status_code == 200
    assert "secret words" not in page.text


def test_a_file_of_the_pages_is_sent_again_only_when_it_changed(server: Server):
    first = server.get("/pages/api.js", headers=NOBODY)
    assert first.headers["content-type"].startswith("text/javascript")
    again = server.get("/pages/api.js", headers={**NOBODY, "if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "%2e%2e%2flayout.html", "api.js%00"])
def test_only_files_of_the_pages_are_given(server: Server, name: str):
    assert server.get(f"/pages/{name}", headers=NOBODY).status_code in (400, 404)


def test_the_documentation_tells_every_operation_of_the_document(server: Server):
    page = server.get("/docs", headers=NOBODY).text
    shown = re.sub(r"<[^>]+>", "", page)
    for path, operations in server.get("/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in shown


def test_the_source_of_a_prediction_is_given_wherever_it_came_from(server: Server):
    uploaded = server.client.post("/v1/files", files={"content": ("a.png", png(5, 5))}).json()
    by_upload = server.create(image=uploaded["urls"]["get"])
    by_data = server.create()
    fetched = server.create(image="https://example.com/a.png")
    account = server.store.accounts.ensure("ana").id
    kept = {"prediction_id": fetched["id"], "metadata": {"url": "https://example.com/a.png"}}
    server.store.files.keep(account, "a.png", png(7, 7), **kept)
    given = {by_upload["id"]: png(5, 5), by_data["id"]: PNG, fetched["id"]: png(7, 7)}
    for made, content in given.items():
        answer = server.get(f"/v1/predictions/{made}/source")
        assert answer.content == content
        assert answer.headers["content-type"] == "image/png"


def test_a_source_that_is_not_here_yet_or_is_somebody_elses_is_not_found(server: Server):
    made = server.create(image="https://example.com/a.png")
    assert server.get(f"/v1/predictions/{made['id']}/source").status_code == 404
    other = server.store.accounts.create_token(server.store.accounts.ensure("bo").id, "x")[1]
    own = server.create()
    path = f"/v1/predictions/{own['id']}/source"
    assert server.get(path, headers={"authorization": f"Bearer {other}"}).status_code == 404
    assert server.get(path, headers=NOBODY).status_code == 401


def test_a_shared_source_is_open_until_sharing_ends(server: Server):
    path = f"/v1/predictions/{server.create()['id']}/share"
    assert server.get(path).json() == {"url": None}
    url = server.post(path).json()["url"]
    assert server.get(path).json() == {"url": url}
    shared = f"/v1/shared/{url.partition('share=')[2]}/source"
    assert server.get(shared, headers=NOBODY).content == PNG
    server.client.delete(path)
    assert server.get(path).json() == {"url": None}
    assert server.get(shared, headers=NOBODY).status_code == 404


def test_what_the_own_page_asks_for_is_listed_as_from_the_web(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    server.create()
    for origin in ("https://tile.example", "https://elsewhere.example"):
        server.post("/v1/predictions", body, headers={"origin": origin})
    listed = [one["source"] for one in server.get("/v1/predictions").json()["results"]]
    assert sorted(listed) == ["api", "api", "web"]
    web = server.get("/v1/predictions?source=web").json()["results"]
    assert [one["source"] for one in web] == ["web"]
    assert server.get("/v1/predictions?source=mail").status_code == 422


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"host": "rebound.example"},
        {"host": "rebound.example", "origin": "http://rebound.example"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_without_tokens_pages_of_others_are_refused(open_to_all: Server, headers):
    refused = open_to_all.get("/v1/predictions", headers=headers)
    assert refused.status_code == 403
    assert refused.json()["title"] == "Forbidden"
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    assert open_to_all.post("/v1/predictions", body, headers=headers).status_code == 403
    assert open_to_all.get("/v1/predictions").json()["results"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:8000", "origin": "http://localhost:8000"},
        {"host": "192.168.1.7:8000"},
        {"host": "[::1]:8000"},
        {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
)
def test_without_tokens_programs_and_own_pages_are_served(open_to_all: Server, headers):
    assert open_to_all.get("/v1/predictions", headers=headers).status_code == 200


def test_without_tokens_named_origins_are_served(tmp_path):
    server = open_server(tmp_path, no_auth=True, cors_origins=("https://app.example",))
    headers = {"origin": "https://app.example"}
    assert server.get("/v1/account", headers=headers).status_code == 200


# Signing in once a browser.


def signed_in(server: Server) -> str:
    """Sign the client in; from then on it sends a cookie and no token."""
    answer = server.post("/v1/session", headers={"origin": "https://tile.example"})
    assert answer.status_code == 204
    del server.client.headers["authorization"]
    return str(answer.headers["set-cookie"])


def test_a_browser_is_signed_in_by_a_cookie_that_no_script_reads(server: Server):
    cookie = signed_in(server)
    assert {"HttpOnly", "SameSite=strict", "Secure"} <= set(cookie.split("; "))
    assert server.token not in cookie
    assert server.get("/v1/account").json()["username"] == "ana"
    foreign = {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}
    assert server.get("/v1/account", headers=foreign).status_code == 403
    assert server.client.delete(
        "/v1/session", headers={"origin": "https://tile.example"}
    ).is_success
    assert server.get("/v1/account").status_code == 401


@pytest.mark.parametrize(
    "origin", [None, "null", "https://elsewhere.example", "https://a.tile.example"]
)
def test_a_cookie_changes_nothing_for_pages_of_others(server: Server, origin: str | None):
    signed_in(server)
    headers = {} if origin is None else {"origin": origin}
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    assert server.post("/v1/predictions", body, headers=headers).status_code == 403
    assert server.client.delete("/v1/predictions/x", headers=headers).status_code == 403
    own = {"origin": "https://tile.example"}
    assert server.get("/v1/predictions").json()["results"] == []
    assert server.post("/v1/predictions", body, headers=own).status_code == 201


def test_a_session_ends_with_its_token_and_after_its_time(tmp_path):
    now = [datetime(2026, 11, 27, tzinfo=timezone.utc)]
    opened = open_server(tmp_path, clock=lambda: now[0])
    with opened.client:
        signed_in(opened)
        assert opened.get("/v1/account").status_code == 200
        now[0] += SIGNED_IN_FOR - timedelta(seconds=1)
        assert opened.get("/v1/account").status_code == 200
        now[0] += timedelta(seconds=2)
        assert opened.get("/v1/account").status_code == 401
        now[0] -= timedelta(days=2)
        opened.store.accounts.revoke("tests")
        assert opened.get("/v1/account").status_code == 401
        forged = opened.store.links.signer.token("output", "x-99999999999")
        name = session_name(opened.store.settings)
        assert opened.get("/v1/account", headers={"cookie": f"{name}={forged}"}).status_code == 401
    opened.store.close()


# What the form of the start page is made from.


def test_the_workbench_knows_the_limits_and_what_models_take_and_lack(server: Server):
    about = server.get("/v1/web/workbench").json()
    assert about["limits"]["pixels"] == server.store.settings.max_pixels
    assert about["has_tokens"]
    found = {model["name"]: model for model in about["models"]}
    own = found["tegula/upscale"]
    assert (own["obstacle"], own["remedy"], own["image"]) == ("", "", "image")
    assert own["masks"] == {"mask": False, "strength_map": False}
    assert own["choices"]["preset"] == ["balanced", "fast", "best", "exact"]
    assert own["inputs"]["properties"]["scale"]["maximum"] == 8
    clarity = found["philz1337x/clarity-upscaler"]
    assert clarity["masks"] == {"mask": True}
    assert clarity["remarks"]["sd_model"]["fidelity"] == "refused"
    lacking = found["jingyunliang/swinir"]
    assert lacking["obstacle"].startswith("Cannot run here")
    assert "into prescalers/ of the models folder (`tegula doctor`" in lacking["remedy"]
    assert str(models_folder()) not in lacking["remedy"]
    assert server.get("/v1/web/workbench", headers=NOBODY).status_code == 401


def test_the_examples_of_models_are_pictures_of_the_pages(server: Server):
    models = server.get("/v1/web/workbench").json()["models"]
    examples = [model["example"] for model in models if model["example"]]
    assert len(examples) >= 5
    for name in examples:
        answer = server.get(f"/pages/{name}", headers=NOBODY)
        assert answer.headers["content-type"] == "image/webp"
        assert len(answer.content) < 40_000

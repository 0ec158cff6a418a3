"""The edges of HTTP: values that no clock or number holds, HEAD, conditions, ranges, odd bodies."""

from __future__ import annotations

import json
import re
import shutil
import time
from datetime import datetime, timedelta, timezone

import pytest
from api_support import DATA_URI, PNG, Server, open_server
from fastapi.routing import APIRoute
from sqlalchemy.exc import OperationalError

from tegula.server.api.app import _ROUTERS
from tegula.server.api.library import _obstacle

NOBODY = {"authorization": ""}
CREATE = {"version": "tegula/upscale", "input": {"image": DATA_URI}}


@pytest.fixture
def output(server: Server) -> str:
    """The address of an output."""
    made = server.create()
    server.work()
    return str(server.get(f"/v1/predictions/{made['id']}").json()["output"])


# Values from outside.


@pytest.mark.parametrize("parameter", ["created_after", "created_before", "since"])
@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_time_beyond_the_ends_of_time_is_refused(server: Server, parameter: str, moment: str):
    path = "/v1/usage" if parameter == "since" else "/v1/predictions"
    answer = server.get(path, params={parameter: moment})
    assert answer.status_code == 422
    (wrong,) = answer.json()["invalid_fields"]
    assert wrong["field"] == f"query.{parameter}"
    assert wrong["description"] == "Must be within the years 1 to 9999 in UTC, too"


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59+12:00", "2026-01-01"]
)
def test_every_other_time_is_taken(server: Server, moment: str):
    server.create()
    newer = server.get("/v1/predictions", params={"created_after": moment}).json()["results"]
    older = server.get("/v1/predictions", params={"created_before": moment}).json()["results"]
    assert len(newer) + len(older) == 1
    assert server.get("/v1/usage", params={"since": moment}).status_code == 200


def test_a_time_with_an_offset_is_the_same_moment(server: Server):
    made = datetime.fromisoformat(server.create()["created_at"].replace("Z", "+00:00"))
    ahead = made.astimezone(timezone(timedelta(hours=1))).isoformat()
    assert server.get("/v1/predictions", params={"created_after": ahead}).json()["results"]
    assert not server.get("/v1/predictions", params={"created_before": ahead}).json()["results"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://["},
        {"origin": "http://a:99999999"},
        {"host": "["},
        {"host": ""},
        {"host": "a:999999"},
        {"idempotency-key": "é".encode()},
        {"x-forwarded-for": "9" * 5000},
        {"range": "bytes=" + "9" * 5000 + "-"},
        {"content-length": "9" * 5000},
    ],
)
@pytest.mark.parametrize("no_auth", [False, True])
def test_no_header_breaks_the_server(tmp_path, headers, no_auth):
    server = open_server(tmp_path, no_auth=no_auth)
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/predictions"),
        ("GET", "/v1/nothing"),
    ):
        body = CREATE if method == "POST" and "content-length" not in headers else None
        answer = server.client.request(method, path, json=body, headers=headers)
        assert answer.status_code < 500
    server.store.close()


@pytest.mark.parametrize(
    "text",
    [r'{"a": "\ud800"}', r'{"a": "\u0000"}', '{"a": 1e999}', '{"a":' * 70 + "1" + "}" * 70],
    ids=["half a character", "NUL", "infinity", "deep"],
)  # fmt: skip
def test_metadata_that_could_not_be_given_back_is_refused(server: Server, text: str):
    parts = {"content": ("a.png", PNG), "metadata": (None, text)}
    answer = server.client.post("/v1/files", files=parts)
    assert answer.status_code == 422
    assert answer.json()["invalid_fields"][0]["field"] == "metadata"
    assert server.get("/v1/files").json()["results"] == []


@pytest.mark.parametrize("expiry", ["9" * 5000, "9" * 4000, "-1", "1e5"])
def test_an_expiry_of_any_length_is_no_fault_of_the_server(server: Server, expiry: str):
    path = f"/v1/files/x/download?owner=a&signature=x&expiry={expiry}"
    assert server.get(path, headers=NOBODY).status_code in (404, 422)


# HEAD.


def test_head_is_answered_wherever_get_is(server: Server):
    made = server.create()
    server.work()
    file = server.client.post("/v1/files", files={"content": ("a.png", PNG)}).json()
    server.post(f"/v1/predictions/{made['id']}/share")
    shown = server.get(f"/v1/predictions/{made['id']}").json()
    share = server.get(f"/v1/predictions/{made['id']}/share").json()["url"].rpartition("=")[2]
    version = server.get("/v1/models/tegula/upscale").json()["latest_version"]["id"]
    output, stream = shown["output"].split("/")[-2:], made["urls"]["stream"].rpartition("/")[2]
    values = {
        "prediction_id": made["id"], "owner": "tegula", "name": "upscale", "version_id": version,
        "share_token": share, "file_id": file["id"], "slug": "super-resolution",
    }  # fmt: skip
    routes = [route for router in _ROUTERS for route in router.routes]
    paths = [
        route.path for route in routes if isinstance(route, APIRoute) and "GET" in route.methods
    ]
    assert len(paths) > 30
    for path in paths:
        for name, value in values.items():
            path = path.replace(f"{{{name}}}", value)
        path = path.replace("/streams/{token}", f"/streams/{stream}")
        path = path.replace("/o/{token}/upscale", f"/o/{output[0]}/{output[1]}")
        path = path.replace("/pages/upscale", "/pages/page.css")
        got, head = server.get(path), server.client.head(path)
        assert head.content == b""
        assert head.status_code == got.status_code, path
        varying = ("ratelimit-remaining", "ratelimit-reset")
        expected = {key: text for key, text in got.headers.items() if key not in varying}
        if path == "/metrics":  # it counts the request that read it
            expected["content-length"] = head.headers["content-length"]
        assert {key: text for key, text in head.headers.items() if key not in varying} == expected


def test_a_method_that_is_not_answered_is_told_all_that_are(server: Server):
    refused = server.client.delete("/v1/predictions")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "GET, HEAD, POST"
    assert refused.json()["title"] == "Method not allowed"


def test_head_of_a_stream_does_not_wait_for_its_end(server: Server):
    head = server.client.head(server.create()["urls"]["stream"])
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")


def test_head_asks_for_a_token_as_get_does_and_is_no_operation_of_the_document(server: Server):
    assert server.client.head("/v1/account", headers=NOBODY).status_code == 401
    assert server.client.head("/v1/nothing").status_code == 404
    operations = server.get("/openapi.json").json()["paths"].values()
    assert not [methods for methods in operations if "head" in methods]


# Conditions and ranges.


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*", '"a,b",{}'])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_that_the_client_has_is_not_sent_again(server: Server, output, form, method):
    first = server.get(output)
    tag = first.headers["etag"]
    assert not tag.startswith("W/")
    again = server.client.request(method, output, headers={"if-none-match": form.format(tag)})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    assert again.headers["cache-control"] == first.headers["cache-control"]
    assert "content-length" not in again.headers


@pytest.mark.parametrize("tags", ['"other"', "", "x", "x" * 5000])
def test_a_file_that_the_client_has_not_is_sent(server: Server, output: str, tags: str):
    assert server.get(output, headers={"if-none-match": tags}).content == PNG


def test_uploads_sources_and_downloads_are_not_sent_again_either(server: Server):
    file = server.client.post("/v1/files", files={"content": ("a.png", PNG)}).json()
    made = server.create()
    for path in (f"/v1/files/{file['id']}", f"/v1/predictions/{made['id']}/source"):
        headers = {"accept": "image/*"}
        tag = server.get(path, headers=headers).headers["etag"]
        again = server.get(path, headers={**headers, "if-none-match": tag})
        assert again.status_code == 304


@pytest.mark.parametrize(
    ("wanted", "content"),
    [
        ("bytes=0-3", PNG[:4]),
        ("bytes=4-", PNG[4:]),
        ("bytes=-5", PNG[-5:]),
        ("bytes=4-999999", PNG[4:]),
        ("bytes=-999999", PNG),
        ("Bytes = 0-0", PNG[:1]),
        ("bytes=2-3,99999-", PNG[2:4]),
        (",".join(["bytes=0-1", *["0-1"] * 200]), None),
        ("bytes=" + "9" * 5000 + "-", None),
        ("bytes=5-2", None),
        ("bytes=-", None),
        ("bytes=x", None),
        ("lines=0-3", None),
        ("x", None),
    ],
)
def test_a_range_is_answered_and_one_that_cannot_be_read_is_as_none(
    server, output, wanted, content
):
    answer = server.get(output, headers={"range": wanted})
    assert answer.content == (PNG if content is None else content)
    assert answer.status_code == (200 if content is None else 206)
    assert answer.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("wanted", ["bytes=99999-", "bytes=-0", "bytes=99999-,88888-99999"])
def test_ranges_outside_of_the_file_are_a_problem_in_words(
    server: Server, output: str, wanted: str
):
    answer = server.get(output, headers={"range": wanted})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(PNG)}"
    assert answer.json()["detail"] == f"The file has {len(PNG)} bytes; Range names none of them."


def test_a_range_counts_only_while_the_file_is_the_one_that_is_meant(server: Server, output: str):
    first = server.get(output).headers
    for condition in (first["etag"], first["last-modified"]):
        part = server.get(output, headers={"range": "bytes=0-3", "if-range": condition})
        assert (part.status_code, part.content) == (206, PNG[:4])
    for condition in ('"other"', f"W/{first['etag']}", "Thu, 01 Jan 1970 00:00:00 GMT"):
        for wanted in ("bytes=0-3", "bytes=99999-"):
            whole = server.get(output, headers={"range": wanted, "if-range": condition})
            assert (whole.status_code, whole.content) == (200, PNG)
    both = {"range": "bytes=0-3", "if-none-match": first["etag"]}
    assert server.get(output, headers=both).status_code == 304


def test_several_ranges_come_in_one_answer(server: Server, output: str):
    answer = server.get(output, headers={"range": "bytes=0-1,4-5"})
    assert answer.status_code == 206
    assert answer.headers["content-type"].startswith("multipart/byteranges")
    assert answer.content.count(b"Content-Range: bytes ") == 2


# Bodies.


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
@pytest.mark.parametrize("path", ["/v1/predictions", "/v1/models", "/v1/deployments"])
def test_a_body_that_does_not_come_as_json_is_told_so_in_one_sentence(server: Server, kind, path):
    answer = server.client.post(path, content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415
    assert answer.json()["detail"] == (
        f"The body must be JSON, sent with the header Content-Type: application/json; "
        f"this one came as {kind}."
    )


def test_a_body_without_a_type_is_taken_for_json_or_told_to_say_what_it_is(server: Server):
    created = server.client.post("/v1/predictions", content=json.dumps(CREATE))
    assert created.status_code == 201
    answer = server.client.post("/v1/predictions", content="version=tegula/upscale")
    assert answer.status_code == 400
    assert answer.json()["detail"] == (
        "The body is no JSON, and has no Content-Type; send JSON with the header "
        "Content-Type: application/json."
    )


def test_a_body_that_is_not_there_is_asked_for(server: Server):
    (wrong,) = server.client.post("/v1/predictions").json()["invalid_fields"]
    assert wrong == {
        "type": "required",
        "field": "",
        "description": "A JSON object is required as the body, with Content-Type: application/json",
    }


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "application/problem+json", "APPLICATION/JSON"]
)
def test_json_by_any_of_its_names_is_taken(server: Server, kind: str):
    headers = {"content-type": kind}
    body = json.dumps(CREATE)
    assert server.client.post("/v1/predictions", content=body, headers=headers).status_code == 201


OPTIONAL = {
    "description": None, "readme": None, "github_url": None, "paper_url": None,
    "license_url": None, "cover_image_url": None,
}  # fmt: skip
MODEL = {"owner": "ana", "name": "portraits", "visibility": "private", "hardware": "cpu"}
DEPLOYMENT = {"name": "d", "model": "tegula/upscale", "version": "latest", "hardware": "cpu"}
INSTANCES = {"min_instances": 0, "max_instances": 2}


def test_null_in_an_optional_field_of_a_create_is_as_if_left_out(server: Server):
    with_nulls = server.post("/v1/models", {**MODEL, **OPTIONAL})
    assert with_nulls.status_code == 201
    without = server.post("/v1/models", {**MODEL, "name": "others"}).json()
    assert with_nulls.json() == {
        **without, "name": "portraits", "url": without["url"].replace("others", "portraits"),
        "created_at": with_nulls.json()["created_at"],
    }  # fmt: skip
    base = {"base": "tegula/upscale", "defaults": None}
    assert server.post("/v1/models/ana/portraits/versions", base).status_code == 201
    made = server.post("/v1/deployments", {**DEPLOYMENT, **INSTANCES, "defaults": None})
    assert made.status_code == 200
    assert made.json()["current_release"]["defaults"] == {}


def test_null_in_an_update_changes_nothing_and_an_empty_text_clears(server: Server):
    url = "https://example.com/paper"
    server.post("/v1/models", {**MODEL, "description": "mine", "paper_url": url})
    nulls = {key: None for key in OPTIONAL if key != "cover_image_url"}
    kept = server.client.patch("/v1/models/ana/portraits", json={**nulls, "weights_url": None})
    assert (kept.json()["description"], kept.json()["paper_url"]) == ("mine", url)
    empty = {"description": "", "paper_url": ""}
    cleared = server.client.patch("/v1/models/ana/portraits", json=empty).json()
    assert (cleared["description"], cleared["paper_url"]) == ("", None)
    server.post("/v1/deployments", {**DEPLOYMENT, **INSTANCES, "defaults": {"scale": 4}})
    nulls = dict.fromkeys(("version", "hardware", "min_instances", "max_instances", "defaults"))
    release = server.client.patch("/v1/deployments/ana/d", json=nulls).json()["current_release"]
    assert release["configuration"] == {"hardware": "cpu", **INSTANCES}
    assert release["defaults"] == {"scale": 4}


@pytest.mark.parametrize("field", ["owner", "visibility", "hardware"])
def test_null_in_a_field_that_must_be_given_is_refused(server: Server, field: str):
    (wrong,) = server.post("/v1/models", {**MODEL, field: None}).json()["invalid_fields"]
    assert wrong["field"] == field


# Being ready.


def test_a_server_on_a_full_disk_is_not_ready(tmp_path):
    server = open_server(tmp_path, min_free_bytes=10**18)
    for method in ("GET", "HEAD"):
        answer = server.client.request(method, "/readyz", headers=NOBODY)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "30"
    detail = server.get("/readyz").json()["detail"]
    assert re.fullmatch(
        r"The disk has \d+ MiB left; min_free_bytes asks for 953674316406\.", detail
    )
    assert server.get("/healthz").status_code == 200
    server.store.close()


def test_a_server_that_cannot_write_to_its_folder_is_not_ready(server: Server, tmp_path):
    assert server.get("/readyz").status_code == 200
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    (tmp_path / "files").write_text("in the way, also of a superuser")
    answer = server.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"].startswith("The server cannot write to its folder: ")
    assert str(tmp_path) not in answer.text


def test_what_cannot_be_kept_is_to_be_sent_again_later(server: Server, tmp_path):
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    (tmp_path / "files").write_text("in the way")
    upload = server.client.post("/v1/files", files={"content": ("a.png", PNG)})
    for answer in (upload, server.post("/v1/predictions", CREATE)):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        detail = "The server cannot keep files at the moment; try again later."
        assert answer.json()["detail"] == detail
    assert server.get("/v1/predictions").json()["results"] == []


def test_a_server_without_its_database_is_not_ready(server: Server, monkeypatch):
    def fail(_predictions):
        raise OperationalError("SELECT 1", {}, OSError("the server closed the connection"))

    monkeypatch.setattr(type(server.store.predictions), "waiting", fail)
    answer = server.get("/readyz", headers=NOBODY)
    assert (answer.status_code, answer.json()["detail"]) == (503, "The database does not answer.")


# Signed downloads.


def test_an_upload_tells_the_link_that_opens_it_to_everybody(server: Server):
    file = server.client.post("/v1/files", files={"content": ("a.png", PNG)}).json()
    link = file["urls"]["download"]
    assert link.startswith(f"https://tile.example/v1/files/{file['id']}/download?owner=ana&expiry=")
    assert server.get(f"/v1/files/{file['id']}").json()["urls"]["download"] == link
    assert server.get("/v1/files").json()["results"][0]["urls"]["download"] == link
    got = server.get(link, headers=NOBODY)
    assert (got.status_code, got.content) == (200, PNG)
    assert server.get(link.replace("owner=ana", "owner=bo"), headers=NOBODY).status_code == 404
    later = re.sub(r"expiry=\d+", "expiry=9999999999", link)
    assert server.get(later, headers=NOBODY).status_code == 404
    made = server.create(image=link)
    assert server.get(f"/v1/predictions/{made['id']}/source").content == PNG


@pytest.mark.parametrize(("kept_s", "longest"), [(600, 600), (0, 86_400)])
def test_a_link_lasts_as_long_as_its_upload_and_a_day_where_that_is_kept(tmp_path, kept_s, longest):
    server = open_server(tmp_path, upload_seconds=kept_s)
    file = server.client.post("/v1/files", files={"content": ("a.png", PNG)}).json()
    expiry = int(file["urls"]["download"].partition("expiry=")[2].partition("&")[0])
    assert longest - 60 < expiry - time.time() <= longest
    server.store.close()


# Models whose weights are not here.


def test_lists_say_which_models_cannot_run_until_their_weights_come(
    server: Server, tmp_path, monkeypatch
):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path / "models"))
    _obstacle.cache_clear()
    lacking = "Cannot run here: its weights are not on this server."
    where = ["/v1/models", "/v1/models?query=swinir", "/v1/collections/super-resolution"]

    def described(path: str) -> dict[str, str]:
        answer = server.get(path).json()
        return {
            each["name"]: each["description"]
            for each in answer.get("results", answer.get("models"))
        }

    for path in where:
        assert described(path)["swinir"].endswith(lacking)
        assert "Cannot" not in described(path).get("upscale", "")
    (found,) = server.get("/v1/search?query=swinir").json()["models"]
    assert found["model"]["description"].endswith(lacking)
    assert found["metadata"]["generated_description"].endswith(lacking)
    assert server.get("/v1/models/jingyunliang/swinir").json()["description"].endswith(lacking)
    for page in ("/jingyunliang/swinir", "/v1/models/jingyunliang/swinir/readme"):
        assert server.get(page).text.startswith(f"{lacking}\n\n# jingyunliang/swinir")
    server.post("/v1/models", {**MODEL, "description": "Mine."})
    own = {
        "base": "jingyunliang/swinir",
        "defaults": {"task_type": "Real-World Image Super-Resolution-Medium"},
    }
    server.post("/v1/models/ana/portraits/versions", own)
    assert described("/v1/models")["portraits"] == f"Mine. {lacking}"
    folder = tmp_path / "models" / "prescalers"
    folder.mkdir(parents=True)
    (folder / "003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x2_GAN.pth").touch()
    _obstacle.cache_clear()
    assert described("/v1/models")["portraits"] == "Mine."
    assert described("/v1/models")["swinir"].endswith(lacking)  # by default it is the large one

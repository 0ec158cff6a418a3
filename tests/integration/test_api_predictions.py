"""Predictions over HTTP, as the official clients need them."""

from __future__ import annotations

import base64
import re

import pytest
from api_support import BATOU, DATA_URI, PNG, Server, open_server

GUIDE = {
    "hdr": 0.2,
    "image": DATA_URI,
    "steps": 20,
    "prompt": "a woman wearing a colorful suit",
    "scheduler": "DDIM",
    "creativity": 0.6,
    "guess_mode": False,
    "resolution": 2560,
    "resemblance": 0.4,
    "guidance_scale": 5,
}


def test_a_bare_latest_finds_the_model_that_the_inputs_fit(server: Server):
    answer = server.post("/v1/predictions", {"version": "latest", "input": GUIDE})
    assert answer.status_code == 201
    assert answer.json()["model"] == BATOU
    server.work()
    done = server.get(f"/v1/predictions/{answer.json()['id']}").json()
    assert isinstance(done["output"], list), "the guide's program reads output[0]"


def test_a_bare_latest_that_fits_several_models_is_refused_with_their_names(server: Server):
    answer = server.post("/v1/predictions", {"version": "latest", "input": {"image": DATA_URI}})
    assert answer.status_code == 422
    assert answer.json()["title"] == "Invalid version or not permitted"
    assert "tegula/upscale" in answer.json()["detail"]


@pytest.mark.parametrize("form", ["{model}", "{model}:{id}", "{model}:latest", "{id}", "{id8}"])
def test_every_form_of_a_reference_is_taken(server: Server, form: str):
    version = server.get("/v1/models/tegula/upscale").json()["latest_version"]["id"]
    reference = form.format(model="tegula/upscale", id=version, id8=version[:8])
    assert server.create(reference)["version"] == version


def test_a_wrong_version_is_refused_in_replicates_words(server: Server):
    body = {"version": "f" * 64, "input": {}}
    answer = server.post("/v1/predictions", body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "title": "Invalid version or not permitted",
        "detail": "The specified version does not exist (or perhaps you don't have permission "
        "to use it?)",
        "status": 422,
    }


def test_a_create_answers_201_with_everything_that_clients_read(server: Server):
    made = server.create()
    assert made["status"] == "starting"
    assert made["error"] is None
    assert made["output"] is None
    assert made["logs"] == ""
    assert made["metrics"] == {}
    assert made["data_removed"] is False
    assert made["source"] == "api"
    assert re.fullmatch(r"[0-9a-z]{26}", made["id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", made["created_at"])
    assert all(isinstance(url, str) for url in made["urls"].values())
    assert {"deployment", "deadline", "webhook"}.isdisjoint(made)


def test_a_finished_prediction_has_output_metrics_and_lines_that_parse(server: Server):
    made = server.create()
    server.work()
    done = server.get(f"/v1/predictions/{made['id']}").json()
    assert done["status"] == "succeeded"
    assert done["error"] is None
    assert set(done["metrics"]) == {"predict_time", "total_time"}
    last = done["logs"].splitlines()[-1]
    assert re.match(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)", last)


def test_a_wait_returns_the_output_when_there_is_one(server: Server):
    timer = server.work_soon()
    body = {"input": {"image": DATA_URI}}
    headers = {"prefer": "wait=10"}
    answer = server.post("/v1/models/tegula/upscale/predictions", body, headers=headers)
    timer.join()
    assert answer.status_code == 201
    assert answer.headers["preference-applied"] == "wait=10"
    assert answer.json()["status"] == "succeeded"
    assert answer.json()["output"].endswith(".png")


def test_only_an_address_elsewhere_keeps_a_prediction_from_a_device(server: Server):
    upload = server.client.post("/v1/files", files={"content": ("a.png", PNG)}).json()
    here = {server.create()["id"], server.create(image=upload["urls"]["get"])["id"]}
    elsewhere = server.create(image="https://Pictures.example/a.png")
    assert elsewhere["status"] == "starting"
    queue = server.store.queue
    assert {queue.claim("tests").id for _ in here} == here
    assert queue.claim("tests") is None
    fetch = queue.claim_fetch("tests")
    assert (fetch.id, fetch.fetch_host) == (elsewhere["id"], "pictures.example")
    assert server.get(f"/v1/predictions/{fetch.id}").json()["status"] == "starting"


def test_a_wait_that_runs_out_never_says_processing(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    claimed = []

    def start():
        import time

        while not claimed:
            if found := server.store.queue.claim("tests"):
                claimed.append(server.store.queue.start(found.id, found.attempt))
            time.sleep(0.02)

    import threading

    thread = threading.Thread(target=start)
    thread.start()
    answer = server.post("/v1/predictions", body, headers={"prefer": "wait=1"})
    thread.join()
    assert answer.status_code == 202
    assert answer.json()["status"] == "starting"
    now = server.get(f"/v1/predictions/{answer.json()['id']}").json()
    assert now["status"] == "processing"


@pytest.mark.parametrize("value", ["wait=0", "wait=x", "wait=-1", "wait=1.5"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(server: Server, value: str):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    answer = server.post("/v1/predictions", body, headers={"prefer": value})
    assert answer.status_code == 422
    assert server.get("/v1/predictions").json()["results"] == []


def test_inputs_out_of_bounds_are_named_all_at_once(server: Server):
    inputs = {"image": DATA_URI, "scale": 200, "format": "bmp"}
    body = {"version": "tegula/upscale", "input": inputs}
    answer = server.post("/v1/predictions", body)
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["title"] == "Input validation failed"
    assert problem["invalid_fields"][0] == {
        "type": "number_lte",
        "field": "input.scale",
        "description": "Must be less than or equal to 8",
    }
    assert problem["invalid_fields"][1]["type"] == "enum"
    assert problem["detail"].startswith("- input.scale: Must be less than or equal to 8\n- input.f")


def test_a_missing_input_is_named_as_replicate_does(server: Server):
    answer = server.post("/v1/predictions", {"version": "tegula/upscale", "input": {}})
    assert answer.json()["detail"] == "- input: image is required\n"
    assert answer.json()["invalid_fields"] == [
        {"type": "required", "field": "input", "description": "image is required"}
    ]


def test_wrong_keys_of_the_body_are_named_as_replicate_does(server: Server):
    answer = server.post("/v1/predictions", {"model": "a/b", "input": {}})
    assert answer.status_code == 422
    detail = answer.json()["detail"].splitlines()
    assert sorted(detail) == [
        "- Additional property model is not allowed",
        "- version is required",
    ]


def test_keys_of_older_clients_are_taken(server: Server):
    body = {
        "version": "tegula/upscale",
        "input": {"image": DATA_URI},
        "stream": True,
        "webhook_completed": "https://hooks.example/a",
        "webhook_event_filter": ["completed"],
    }
    answer = server.post("/v1/predictions", body)
    assert answer.status_code == 201
    assert answer.json()["webhook"] == "https://hooks.example/a"
    assert answer.json()["webhook_events_filter"] == ["completed"]


def test_unknown_inputs_are_passed_over(server: Server):
    assert server.create(disable_safety_checker=True)["status"] == "starting"


@pytest.mark.parametrize(
    "image",
    [
        "ftp://pictures.example/a.png",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "http://user:secret@pictures.example/a.png",
        "data:image/png;base64",
        "data:image/png;base64,!!!!",
        "https://tile.example/v1/files/nothing",
        {"$file": "anything"},
        ["x"],
    ],
)
def test_inputs_that_could_not_be_read_are_refused_at_once(server: Server, image):
    answer = server.post(
        "/v1/predictions", {"version": "tegula/upscale", "input": {"image": image}}
    )
    assert answer.status_code == 422
    assert server.get("/v1/predictions").json()["results"] == []


_NO_PICTURES = {
    b"%PDF-1.7\n": "The file is a PDF document, which is not supported; save it as PNG, JPEG or "
    "TIFF.",
    b"\n<!DOCTYPE html><p>": "The file is a web page, which is not supported; give the address or "
    "the file of the picture itself.",
    b'{"a": 1}': "The file is not a PNG, JPEG, WebP, AVIF, HEIC, TIFF, BMP or GIF image.",
    b"": "The file is not a PNG, JPEG, WebP, AVIF, HEIC, TIFF, BMP or GIF image.",
}


@pytest.mark.parametrize("upload", [False, True], ids=["data URI", "upload"])
@pytest.mark.parametrize("data", _NO_PICTURES)
def test_what_cannot_be_a_picture_is_refused_with_the_name_of_its_input(
    server: Server, data, upload
):
    bad = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    if upload:
        parts = {"content": ("a.png", data, "image/png")}
        bad = server.client.post("/v1/files", files=parts).json()["urls"]["get"]
    given = {"image": DATA_URI, "mask": bad}
    answer = server.post("/v1/predictions", {"version": "tegula/upscale", "input": given})
    assert answer.status_code == 422
    (wrong,) = answer.json()["invalid_fields"]
    assert (wrong["field"], wrong["description"]) == ("input.mask", _NO_PICTURES[data])
    assert server.get("/v1/predictions").json()["results"] == []


def test_a_webhook_to_a_metadata_service_is_refused(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    answer = server.post("/v1/predictions", {**body, "webhook": "http://169.254.169.254/"})
    assert answer.status_code == 422


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "null", '{"version": NaN}', "[" * 5000])
def test_a_body_that_is_no_object_is_refused(server: Server, text: str):
    headers = {"content-type": "application/json"}
    answer = server.client.post("/v1/predictions", content=text, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "bad", ['{"x": NaN}', '{"x": 1e999}', '{"x": "\\ud800"}', '{"x": "\\u0000"}']
)
def test_values_that_cannot_be_kept_are_refused(server: Server, bad: str):
    text = f'{{"version": "tegula/upscale", "input": {bad}}}'
    headers = {"content-type": "application/json"}
    answer = server.client.post("/v1/predictions", content=text, headers=headers)
    assert answer.status_code in (400, 422)


def test_cancelling_is_seen_at_once_and_may_be_repeated(server: Server):
    made = server.create()
    headers = {"content-type": "application/json"}
    for _ in range(2):
        answer = server.client.post(f"/v1/predictions/{made['id']}/cancel", headers=headers)
        assert answer.status_code == 200
        assert answer.json()["status"] == "canceled"


def test_cancelling_what_is_done_changes_nothing(server: Server):
    made = server.create()
    server.work()
    assert server.post(f"/v1/predictions/{made['id']}/cancel").json()["status"] == "succeeded"


def test_a_deadline_before_the_start_reads_as_canceled(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    made = server.post("/v1/predictions", body, headers={"cancel-after": "5s"}).json()
    assert "deadline" in made
    object.__setattr__(server.store.queue, "clock", lambda: server.store.clock().replace(year=2100))
    server.store.queue.expire()
    ended = server.get(f"/v1/predictions/{made['id']}").json()
    assert ended["status"] == "canceled"
    assert "deadline" in ended["error"]


@pytest.mark.parametrize("value", ["4", "soon", "1d", "0s", "-5s"])
def test_a_deadline_that_is_too_short_or_unreadable_is_refused(server: Server, value: str):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    answer = server.post("/v1/predictions", body, headers={"cancel-after": value})
    assert answer.status_code == 422


def test_a_repeated_idempotency_key_makes_one_prediction(server: Server):
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    headers = {"idempotency-key": "a"}
    first = server.post("/v1/predictions", body, headers=headers)
    again = server.post("/v1/predictions", body, headers=headers)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = {"version": "tegula/upscale", "input": {"image": DATA_URI, "scale": 3}}
    refused = server.post("/v1/predictions", other, headers=headers)
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"


def test_lists_are_paged_by_absolute_links_that_keep_their_filters(server: Server):
    made = [server.create()["id"] for _ in range(103)]
    first = server.get("/v1/predictions?created_after=2020-01-01T00:00:00Z").json()
    assert len(first["results"]) == 100
    assert first["previous"] is None
    assert first["next"].startswith("https://tile.example/v1/predictions?created_after=2020-01-01")
    second = server.get(first["next"]).json()
    seen = [item["id"] for item in first["results"] + second["results"]]
    assert seen == made[::-1]
    assert second["next"] is None
    assert server.get(second["previous"]).json()["results"] == first["results"]
    assert server.get("/v1/predictions?cursor=nonsense").status_code == 422


def test_another_account_sees_nothing(server: Server):
    made = server.create()
    other = server.store.accounts.ensure("bo")
    _, token = server.store.accounts.create_token(other.id, "bo")
    headers = {"authorization": f"Bearer {token}"}
    path = f"/v1/predictions/{made['id']}"
    assert server.get(path, headers=headers).status_code == 404
    assert server.client.post(f"{path}/cancel", headers=headers).status_code == 404
    assert server.client.delete(path, headers=headers).status_code == 404
    assert server.get("/v1/predictions", headers=headers).json()["results"] == []


def test_removing_takes_the_data_and_leaves_the_row(server: Server):
    made = server.create()
    done = server.work()
    link = server.get(f"/v1/predictions/{made['id']}").json()["output"]
    assert server.get(link).content == PNG
    assert server.client.delete(f"/v1/predictions/{done.id}").status_code == 204
    left = server.get(f"/v1/predictions/{done.id}").json()
    assert (left["data_removed"], left["input"], left["output"]) == (True, {}, None)
    assert left["logs"] is None
    assert server.get(link).status_code == 404


def test_sharing_opens_a_prediction_until_it_is_taken_back(server: Server):
    made = server.create()
    server.work()
    url = server.post(f"/v1/predictions/{made['id']}/share").json()["url"]
    assert url.startswith(made["urls"]["web"])
    nobody = {"authorization": ""}
    path = f"/v1/shared/{url.partition('share=')[2]}"
    assert server.get(path, headers=nobody).json()["id"] == made["id"]
    examples = server.get("/v1/models/tegula/upscale/examples").json()
    assert [item["id"] for item in examples["results"]] == [made["id"]]
    assert server.client.delete(f"/v1/predictions/{made['id']}/share").status_code == 204
    assert server.get(path, headers=nobody).status_code == 404


def test_too_much_waiting_work_is_refused_with_a_time(tmp_path):
    full = open_server(tmp_path, max_waiting=1)
    full.create()
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    refused = full.post("/v1/predictions", body)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1

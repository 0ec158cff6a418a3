"""Models, versions, deployments and the account over HTTP."""

from __future__ import annotations

import re
import threading
from datetime import timedelta

import pytest
from api_support import BATOU, DATA_URI, Server, open_server
from document_support import checked
from starlette.testclient import TestClient
from store_support import NOON, counted_statements

from tegula.catalog import Catalog
from tegula.server.accounts import UserModels
from tegula.server.api.app import create_app
from tegula.server.fetch import Answer
from tegula.server.tables import Deployment, UserModel, UserVersion
from tegula.server.webhooks import outcome
from tegula.server.work import CatalogResolver

OWN = {"owner": "ana", "name": "portraits", "visibility": "private", "hardware": "cpu"}


def own_version(server: Server, **defaults):
    body = {"base": "tegula/upscale", "defaults": defaults}
    return server.post("/v1/models/ana/portraits/versions", body)


def test_every_model_has_what_clients_insist_on(server: Server):
    models = server.get("/v1/models").json()["results"]
    assert BATOU in {f"{model['owner']}/{model['name']}" for model in models}
    for model in models:
        assert isinstance(model["run_count"], int)
        assert model["url"].startswith("https://tile.example/")
        version = model["latest_version"]
        assert re.fullmatch(r"[0-9a-f]{64}", version["id"])
        assert re.fullmatch(r"\d+\.\d+\.\d+", version["cog_version"])
        assert {"Input", "Output"} <= set(version["openapi_schema"]["components"]["schemas"])


@pytest.mark.parametrize("text", ["controlnet", '"controlnet"', "  CONTROLNET tile "])
def test_the_query_method_searches_with_and_without_quotes(server: Server, text: str):
    answer = server.client.request("QUERY", "/v1/models", content=text)
    assert answer.status_code == 200
    names = [model["name"] for model in answer.json()["results"]]
    assert names[0] == "high-resolution-controlnet-tile"
    assert "gfpgan" not in names


def test_search_by_get_stands_in_where_query_is_blocked(server: Server):
    by_get = server.get("/v1/models?query=controlnet").json()["results"]
    by_query = server.client.request("QUERY", "/v1/models", content="controlnet").json()["results"]
    assert by_get == by_query


def test_search_needs_words_and_a_token(server: Server):
    found = server.get("/v1/search?query=clarity").json()
    assert found["models"][0]["model"]["name"] == "clarity-upscaler"
    missing = server.get("/v1/search")
    assert missing.status_code == 400
    assert missing.json()["detail"] == 'Query parameter "query" is required'
    assert server.get("/v1/search?query=clarity", headers={"authorization": ""}).status_code == 401


def test_search_is_bounded_in_words_and_in_rows(server: Server, monkeypatch):
    for path in ("/v1/search", "/v1/models"):
        assert server.get(path, params={"query": "x" * 1001}).status_code == 422
    limits = []
    read = UserModels.all

    def counted(self, account_id=None, limit=None):
        limits.append(limit)
        return read(self, account_id, limit)

    monkeypatch.setattr(UserModels, "all", counted)
    for path in ("/v1/search?query=portraits", "/v1/search?query=super", "/v1/models?query=super"):
        assert server.get(path).status_code == 200
    assert limits
    assert all(limit and limit <= 1000 for limit in limits)


@pytest.mark.parametrize("by", ["name", "id", "own name", "own id", "latest"])
def test_a_create_reads_as_little_however_many_models_there_are(server: Server, by: str):
    account = server.store.accounts.ensure("ana").id
    server.post("/v1/models", OWN)
    own = own_version(server).json()["id"]
    version = {
        "name": "tegula/upscale",
        "id": server.get("/v1/models/tegula/upscale").json()["latest_version"]["id"],
        "own name": "ana/portraits",
        "own id": own,
        "latest": "latest",
    }[by]
    # With inputs of one model alone, for which "latest" can stand.
    inputs = {"preset": "fast", "scale": 2} if by == "latest" else {}

    def create() -> int:
        with counted_statements(server.store) as statements:
            server.create(version, **inputs)
        return len(statements)

    create()  # notes the use of the token, and the running times
    few = create()
    for number in range(40):
        model = UserModel("ana", f"model-{number}", account, "private", "cpu", NOON)
        server.store.models.create(model)
        server.store.models.add_version(
            UserVersion(f"{number:064x}", model.full_name, "tegula/upscale", "1", {}, NOON)
        )
    assert create() == few <= 8


def test_what_a_user_pinned_outlives_a_release(server: Server):
    """The ids of the catalogue's versions change with the release and with other weights."""
    server.post("/v1/models", OWN)
    own = own_version(server, scale=3).json()["id"]
    older = server.get(f"/v1/models/{BATOU}/versions").json()["results"][1]["id"]
    server.post("/v1/deployments", {**DEPLOYMENT, "model": BATOU, "version": older})
    of_own = {**DEPLOYMENT, "name": "own", "model": "ana/portraits", "version": own}
    server.post("/v1/deployments", of_own)
    waiting = server.store.predictions.get(server.create("ana/portraits")["id"])
    direct = server.store.predictions.get(server.create(f"{BATOU}:{older}")["id"])

    released = Catalog("other weights")
    first = next(model for model in released.models if model.reference == BATOU).versions[1]
    assert first.id != older
    with checked(TestClient(create_app(server.store, catalog=released))) as client:
        client.headers["authorization"] = f"Bearer {server.token}"
        shown = client.get("/v1/deployments/ana/fast").json()["current_release"]
        assert shown["version"] == first.id
        assert client.get(f"/v1/models/ana/portraits/versions/{own}").status_code == 200
        for path, version in (
            ("/v1/deployments/ana/fast/predictions", first.id),
            ("/v1/deployments/ana/own/predictions", own),
            ("/v1/models/ana/portraits/predictions", own),
        ):
            answer = client.post(path, json={"input": {"image": DATA_URI}})
            assert (answer.status_code, answer.json()["version"]) == (201, version)
        changed = client.patch("/v1/deployments/ana/fast", json={"max_instances": 2})
        assert changed.json()["current_release"]["version"] == first.id
        assert client.get(f"/v1/predictions/{direct.id}/source").status_code == 200
    # What was accepted before the release still runs after it.
    resolver = CatalogResolver(released, server.store.models)
    assert resolver(direct).version == first.id
    assert resolver(waiting).version == released.find("tegula/upscale:1").id


def test_versions_are_found_by_id_prefix_and_latest(server: Server):
    versions = server.get(f"/v1/models/{BATOU}/versions").json()["results"]
    assert len(versions) == 2
    latest = server.get(f"/v1/models/{BATOU}/versions/latest").json()
    assert latest == versions[0]
    older = versions[1]["id"]
    for wanted in (older, older[:8]):
        assert server.get(f"/v1/models/{BATOU}/versions/{wanted}").json()["id"] == older
    assert server.get(f"/v1/models/{BATOU}/versions/{older[:7]}").status_code == 404


def test_a_readme_tells_the_inputs(server: Server):
    readme = server.get(f"/v1/models/{BATOU}/readme")
    assert readme.headers["content-type"].startswith("text/plain")
    assert "| `creativity` | 0.5 |" in readme.text


def test_what_is_not_there_is_404_in_replicates_words(server: Server):
    paths = ("/v1/models/a/b", f"/v1/models/{BATOU}/versions/{'f' * 64}", "/v1/predictions/x")
    for path in (*paths, "/v1/deployments/a/b", "/v1/collections/x", "/v1/trainings/x", "/v1/nope"):
        answer = server.get(path)
        assert answer.status_code == 404
        assert answer.json()["status"] == 404
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_model_of_ones_own_is_a_preset_over_ours(server: Server):
    assert server.post("/v1/models", OWN).status_code == 201
    version = own_version(server, preset="creative", scale=4)
    assert version.status_code == 201
    inputs = version.json()["openapi_schema"]["components"]["schemas"]["Input"]
    assert inputs["properties"]["scale"]["default"] == 4
    made = server.create("ana/portraits")
    assert (made["model"], made["version"]) == ("ana/portraits", version.json()["id"])
    assert (made["input"]["preset"], made["input"]["scale"]) == ("creative", 4)
    given = server.create("ana/portraits", scale=3)
    assert given["input"]["scale"] == 3, "what the request gives goes before"


def test_a_private_model_is_hidden_from_others(server: Server):
    server.post("/v1/models", OWN)
    other = server.store.accounts.ensure("bo")
    _, token = server.store.accounts.create_token(other.id, "bo")
    headers = {"authorization": f"Bearer {token}"}
    assert server.get("/v1/models/ana/portraits", headers=headers).status_code == 404
    listed = server.get("/v1/models", headers=headers).json()["results"]
    assert "portraits" not in {model["name"] for model in listed}
    changed = server.client.patch(
        "/v1/models/ana/portraits", json={"description": "x"}, headers=headers
    )
    assert changed.status_code == 404


def test_a_model_is_changed_and_deleted_by_its_owner_alone(server: Server):
    server.post("/v1/models", OWN)
    body = {"description": "Faces", "readme": "# Faces"}
    changed = server.client.patch("/v1/models/ana/portraits", json=body)
    assert changed.json()["description"] == "Faces"
    assert server.get("/v1/models/ana/portraits/readme").text == "# Faces"
    version = own_version(server, scale=3).json()["id"]
    assert server.client.delete("/v1/models/ana/portraits").status_code == 409
    path = f"/v1/models/ana/portraits/versions/{version}"
    assert server.client.delete(path).status_code == 202
    assert server.client.delete("/v1/models/ana/portraits").status_code == 204
    assert server.client.delete("/v1/models/tegula/upscale").status_code == 403


@pytest.mark.parametrize(
    "wrong",
    [{"owner": "bo"}, {"hardware": "gpu-h100"}, {"visibility": "secret"}, {"name": "Not a slug"}],
)
def test_models_that_cannot_be_made_are_refused(server: Server, wrong):
    assert server.post("/v1/models", {**OWN, **wrong}).status_code == 422


def test_defaults_that_no_request_could_have_are_refused(server: Server):
    server.post("/v1/models", OWN)
    for defaults in ({"scale": 99}, {"colour": "red"}):
        answer = own_version(server, **defaults)
        assert answer.status_code == 422
        assert answer.json()["invalid_fields"][0]["field"].startswith("defaults")


DEPLOYMENT = {
    "name": "fast",
    "model": "tegula/upscale",
    "version": "latest",
    "hardware": "cpu",
    "min_instances": 0,
    "max_instances": 1,
}


def test_a_deployment_pins_a_version_and_inputs(server: Server):
    made = server.post("/v1/deployments", {**DEPLOYMENT, "defaults": {"preset": "fast"}})
    assert made.status_code == 200
    release = made.json()["current_release"]
    assert release["number"] == 1
    assert re.fullmatch(r"[0-9a-f]{64}", release["version"])
    body = {"input": {"image": DATA_URI}}
    prediction = server.post("/v1/deployments/ana/fast/predictions", body)
    assert prediction.status_code == 201
    assert prediction.json()["deployment"] == "ana/fast"
    assert prediction.json()["input"]["preset"] == "fast"


def test_a_change_of_a_deployment_is_a_new_release(server: Server):
    server.post("/v1/deployments", DEPLOYMENT)
    changed = server.client.patch("/v1/deployments/ana/fast", json={"max_instances": 3})
    release = changed.json()["current_release"]
    assert (release["number"], release["configuration"]["max_instances"]) == (2, 3)
    assert server.get("/v1/deployments").json()["results"] == [changed.json()]
    assert server.client.delete("/v1/deployments/ana/fast").status_code == 204
    assert server.get("/v1/deployments/ana/fast").status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_instances": 6},
        {"max_instances": "1"},
        {"min_instances": 3, "max_instances": 2},
        {"version": "f" * 64},
        {"hardware": "gpu-t4"},
    ],
)
def test_deployments_that_cannot_be_are_refused(server: Server, wrong):
    assert server.post("/v1/deployments", {**DEPLOYMENT, **wrong}).status_code == 422


def test_a_page_goes_on_where_the_last_one_ended_though_items_are_gone(server: Server):
    account = server.store.accounts.ensure("ana").id
    for number in range(30):
        at = NOON + timedelta(seconds=number)
        name = f"one-{number:02d}"
        pinned = ("tegula/upscale", "1", "cpu", 0, 1, at)
        server.store.deployments.create(Deployment("ana", name, account, 1, *pinned))
        server.store.models.create(UserModel("ana", name, account, "private", "cpu", at))
    gone = range(2, 16)  # on both sides of the end of the first page, in both lists
    for path, delete in (
        ("/v1/deployments", server.store.deployments.delete),
        ("/v1/models", server.store.models.delete),
        ("/v1/models?sort_by=model_created_at&sort_direction=asc", None),
        ("/v1/models?query=one", None),
    ):
        first = server.get(path).json()
        if delete:
            for number in gone:
                delete("ana", f"one-{number:02d}")
        second = server.get(first["next"]).json() if first["next"] else {"results": []}
        names = [item["name"] for item in (*first["results"], *second["results"])]
        assert len(names) == len(set(names))
        assert {f"one-{number:02d}" for number in range(30) if number not in gone} <= set(names)


def test_hardware_is_a_bare_list(server: Server):
    assert server.get("/v1/hardware").json() == [{"sku": "cpu", "name": "CPU"}]


def test_the_account_is_that_of_the_token(server: Server):
    assert server.get("/v1/account").json() == {
        "type": "user",
        "username": "ana",
        "name": "Ana",
        "github_url": None,
        "avatar_url": None,
    }


def test_collections_and_trainings_have_their_shapes(server: Server):
    listed = server.get("/v1/collections").json()
    assert [one["slug"] for one in listed["results"]] == ["super-resolution"]
    assert server.get("/v1/collections/super-resolution").json()["models"]
    assert server.get("/v1/trainings").json() == {"next": None, "previous": None, "results": []}
    refused = server.post(
        "/v1/models/tegula/upscale/versions/latest/trainings",
        {"destination": "ana/new", "input": {}},
    )
    assert refused.status_code == 422
    assert "does not support training" in refused.json()["detail"]


def test_the_webhook_secret_has_the_form_that_both_clients_split(server: Server):
    key = server.get("/v1/webhooks/default/secret").json()["key"]
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{32,}={0,2}", key)
    assert server.get("/v1/webhooks/default/secret").json()["key"] == key
    assert server.post("/v1/webhooks/default/secret/rotate").json()["key"] != key


def test_a_create_does_not_wait_for_a_slow_name_server(tmp_path, monkeypatch):
    def resolve(_host, _port):
        answered.wait(20)
        return ["10.0.0.7"]

    answered = threading.Event()
    monkeypatch.setattr("tegula.server.api.service._NAME_LOOKUP_S", 0.05)
    server = open_server(tmp_path, fetch_private=False)
    server.client.app.state.service.resolve = resolve
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
    made = server.post("/v1/predictions", {**body, "webhook": "https://a.example/hook"})
    answered.set()
    assert made.status_code == 201
    server.store.close()


def test_deliveries_are_listed_and_replayed(server: Server):
    hook = {"webhook": "https://example.com/hook", "webhook_events_filter": ["completed"]}
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}, **hook}
    made = server.post("/v1/predictions", body).json()
    assert server.get("/v1/webhooks/deliveries").json()["results"] == []
    server.work()
    (listed,) = server.get(f"/v1/webhooks/deliveries?prediction={made['id']}").json()["results"]
    assert listed["next_attempt_at"] is not None
    given = {"event": "completed", "url": hook["webhook"], "state": "pending", "attempts": 0}
    assert given.items() <= listed.items()
    (message,) = server.store.webhooks.due(1, timedelta(seconds=9))
    gone = outcome(message, Answer(410), server.store.clock(), 0)
    server.store.webhooks.finish_attempt(message.id, gone)
    (failed,) = server.get("/v1/webhooks/deliveries?state=failed").json()["results"]
    assert (failed["status"], failed["next_attempt_at"]) == (410, None)
    again = server.post(f"/v1/webhooks/deliveries/{failed['id']}/replay").json()
    assert (again["id"], again["state"], again["attempts"]) == (failed["id"], "pending", 0)
    assert server.post("/v1/webhooks/deliveries/msg_none/replay").status_code == 404


@pytest.mark.parametrize(
    ("webhook", "word"),
    [
        ("http://10.1.2.3/hook", "10.1.2.3 is not on the public internet"),
        ("http://10.1.2.3:9000/hook", "10.1.2.3 is not on the public internet"),
        ("http://intern.example/hook", "intern.example is not on the public internet"),
        ("http://public.example:9000/", "port 80 or 443"),
    ],
)
def test_a_webhook_inside_is_refused_with_the_create(tmp_path, webhook, word):
    server = open_server(tmp_path, fetch_private=False, fetch_ports=(80, 443))
    known = {"intern.example": ["10.0.0.7"], "public.example": ["93.184.216.34"]}
    server.client.app.state.service.resolve = lambda host, _port: known[host]
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI}, "webhook": webhook}
    refused = server.post("/v1/predictions", body)
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("- webhook: ")
    assert word in refused.json()["detail"]
    assert "10.0.0.7" not in refused.text
    assert server.store.predictions.page(None).items == ()
    allowed = server.post("/v1/predictions", {**body, "webhook": "https://public.example/"})
    assert allowed.status_code == 201
    server.store.close()


def test_usage_is_seconds_by_model_and_token(server: Server):
    server.create()
    server.work()
    (line,) = server.get("/v1/usage").json()["results"]
    assert (line["model"], line["token"], line["predictions"]) == ("tegula/upscale", "tests", 1)
    assert line["predict_seconds"] >= 0


def test_a_disabled_deployment_takes_nothing(server: Server):
    server.post("/v1/deployments", {**DEPLOYMENT, "max_instances": 0})
    body = {"input": {"image": DATA_URI}}
    refused = server.post("/v1/deployments/ana/fast/predictions", body)
    assert refused.status_code == 422
    assert server.get("/v1/predictions").json()["results"] == []


def test_the_address_of_a_model_shows_its_description(server: Server):
    url = server.get("/v1/models/tegula/upscale").json()["url"]
    assert server.get(url, headers={"authorization": ""}).text.startswith("# tegula/upscale")
    server.post("/v1/models", OWN)
    hidden = "https://tile.example/ana/portraits"
    assert server.get(hidden, headers={"authorization": ""}).status_code == 404

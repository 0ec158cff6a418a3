"""The server's OpenAPI document: what it holds, and that live answers are as it says.

Every other test of the HTTP API checks its answers against the document, too: see
``document_support``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_support import Server, open_server
from document_support import Document

from tegula.server.api.bodies import (
    DeploymentBody,
    ModelBody,
    PredictionBody,
    VersionedPredictionBody,
)

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

EXAMPLES = 4
"""Requests for each operation and mode; the whole must stay well below a minute."""


def known(server: Server) -> dict[str, str]:
    """Make one thing of each kind, and return what the paths of the document call them."""
    prediction = server.create()["id"]
    while server.work().id != prediction:
        pass  # what was made from the document before runs first
    shared = server.post(f"/v1/predictions/{prediction}/share").json()["url"]
    upload = server.client.post("/v1/files", files={"content": ("a.txt", b"words")}).json()
    output = server.get(f"/v1/predictions/{prediction}").json()["output"][0]
    stream = server.get(f"/v1/predictions/{prediction}").json()["urls"]["stream"]
    return {
        "prediction_id": prediction,
        "share_token": shared.partition("share=")[2],
        "file_id": upload["id"],
        "owner": "tegula",
        "name": "upscale",
        "version_id": "latest",
        "slug": "super-resolution",
        "token": (stream if "/streams/" in stream else output).rpartition("/")[2],
    }


def checks() -> list[Any]:
    """Return what schemathesis is to look at in every answer."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi

    return [
        not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_headers_conformance,
        openapi.response_schema_conformance,
        openapi.negative_data_rejection,
        openapi.missing_required_header,
        openapi.unsupported_method,
        openapi.allow_header_conformance,
    ]


def can_be_wrong(operation: Any) -> bool:
    """Tell whether a request can be other than documented, which no text in a path is.

    Hypothesis would look for such a request for half a second, of every second operation.
    """
    words = {"type", "title", "description"}
    parameters = operation.definition.raw.get("parameters", ())
    return bool(operation.body) or any(
        each["in"] != "path" or each["schema"]["type"] != "string" or each["schema"].keys() - words
        for each in parameters
    )


def responses(
    operation: Any, mode: str, names: dict[str, str], headers: dict[str, str]
) -> tuple[int, list[str]]:
    """Send requests made from an operation; return how many, and what is not as documented."""
    statuses: list[int] = []
    wrong: list[str] = []
    cases = operation.as_strategy(generation_mode=schemathesis.generation.GenerationMode[mode])

    @hypothesis.given(case=cases)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def send(case: Any) -> None:
        for name in set(case.path_parameters or {}) & names.keys():
            case.path_parameters[name] = names[name]
        case.headers.pop("Prefer", None)  # nothing runs here that would be worth waiting for
        answer = case.call(headers=headers)
        statuses.append(answer.status_code)
        try:
            case.validate_response(answer, checks=checks(), headers=headers)
        except schemathesis.errors.FailureGroup as error:
            wrong.append(f"{case.method} {answer.request.url}: {error.exceptions}")

    send()
    return len(statuses), wrong


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_live_answers_are_as_the_document_says(tmp_path: Path, mode: str):
    server = open_server(tmp_path, creates_per_minute=0, requests_per_minute=0)
    with server.client:
        document = server.get("/openapi.json").json()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation.pop("security", None)  # else requests without a token would be wanted
        schema = schemathesis.openapi.from_dict(document)
        schema.app = server.client.app
        rejection = schema.config.checks.negative_data_rejection
        rejection.expected_statuses = [*rejection.expected_statuses, "413"]
        headers = {"Authorization": f"Bearer {server.token}"}
        sent, wrong = 0, []
        for found in schema.get_all_operations():
            operation = found.ok()
            if mode == "NEGATIVE" and not can_be_wrong(operation):
                continue
            names = known(server) if mode == "POSITIVE" else {}
            count, faults = responses(operation, mode, names, headers)
            sent, wrong = sent + count, wrong + faults
    assert not wrong, "\n".join(wrong)
    assert sent > 50  # one for most of the operations, at least


def test_the_document_is_valid_and_reads_as_what_it_is(server: Server):
    document = server.get("/openapi.json").json()
    schemathesis.openapi.from_dict(document).validate()
    assert document["openapi"] == "3.2.0"
    assert document["servers"] == [{"url": "https://tile.example"}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert "query" in document["paths"]["/v1/models"]
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations_of(document):
        assert set(operation["tags"]) <= tags
        assert ("security" in operation) == ("401" in operation["responses"])


def test_the_server_of_the_document_has_the_path_that_it_is_mounted_at(tmp_path: Path):
    server = open_server(tmp_path, public_url="https://tile.example/pictures")
    document = server.get("/openapi.json").json()
    assert document["servers"] == [{"url": "https://tile.example/pictures"}]


def test_every_operation_says_what_it_answers(server: Server):
    document = Document(server.get("/openapi.json").json())
    for operation in operations_of(document.document):
        answers = {key: document.resolved(one) for key, one in operation["responses"].items()}
        for status, answer in answers.items():
            kinds = list(answer.get("content", {}))
            if int(status) >= 400:
                assert kinds == ["application/problem+json"]
            elif status not in ("204", "302", "304") and operation["operationId"] not in EMPTY:
                schemas = [
                    kind.get("schema", kind.get("itemSchema"))
                    for kind in answer["content"].values()
                ]
                assert all(schemas), operation["operationId"]
            else:
                assert not kinds
        refused = operation["operationId"] in REFUSED
        assert refused == all(int(status) >= 400 for status in answers)


EMPTY = ("models.versions.delete",)
REFUSED = ("trainings.create", "trainings.get", "trainings.cancel")

STABLE = """
account.get collections.get collections.list deployments.create deployments.delete deployments.get
deployments.list deployments.predictions.create deployments.update files.create files.delete
files.download files.get files.list hardware.list models.create models.delete
models.examples.list models.get models.list models.predictions.create models.readme.get
models.search models.update models.versions.create models.versions.delete models.versions.get
models.versions.list operations.live operations.metrics operations.ready outputs.get
predictions.cancel predictions.create predictions.delete predictions.get predictions.list
predictions.share.create predictions.share.delete predictions.share.get predictions.source.get
predictions.stream search shared.get shared.source.get trainings.cancel trainings.create
trainings.get trainings.list usage.get webhooks.default.secret.get webhooks.default.secret.rotate
webhooks.deliveries.list webhooks.deliveries.replay
"""
"""Programs are generated from these names, so they stay; where Replicate has them they are its."""


def test_the_names_of_operations_stay(server: Server):
    found = operations_of(server.get("/openapi.json").json())
    assert sorted(operation["operationId"] for operation in found) == STABLE.split()


def test_every_example_is_valid(server: Server):
    document = Document(server.get("/openapi.json").json())
    tried = 0
    for name, schema in document.document["components"]["schemas"].items():
        for example in schema.get("examples", ()):
            document.validate(name, schema, example)
            tried += 1
    assert tried > 7


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/predictions", VersionedPredictionBody),
        ("/v1/models/tegula/upscale/predictions", PredictionBody),
        ("/v1/models", ModelBody),
        ("/v1/deployments", DeploymentBody),
    ],
)
def test_the_example_of_a_body_is_accepted_as_it_is(server: Server, path: str, body: Any):
    answer = server.post(path, body.model_json_schema()["examples"][0])
    assert answer.status_code in (200, 201), answer.text


def operations_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every operation of a document."""
    return [one for operations in document["paths"].values() for one in operations.values()]

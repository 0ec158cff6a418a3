"""Requests made from the server's own OpenAPI document, valid and not: none breaks it."""

from __future__ import annotations

import pytest
from api_support import open_server

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_made_from_the_document_breaks_the_server(tmp_path, mode):
    server = open_server(tmp_path, creates_per_minute=0, requests_per_minute=0)
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.client.app)
    headers = {"Authorization": f"Bearer {server.token}"}
    sent = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if "streams" in operation.path:
            continue  # a stream ends when its prediction does
        cases = operation.as_strategy(generation_mode=schemathesis.generation.GenerationMode[mode])

        @hypothesis.given(case=cases)
        @hypothesis.settings(
            max_examples=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def send(case):
            answer = case.call(headers=headers)
            sent.append(answer.status_code)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                kind = answer.headers["content-type"][0]
                assert kind.startswith("application/problem+json")

        try:
            send()
        except hypothesis.errors.Unsatisfiable:
            continue  # an operation that cannot be asked wrongly
    assert len(sent) > 200

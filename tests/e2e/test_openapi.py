"""The OpenAPI document against a live server: no 5xx, and every reply is one that the document allows."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import validate
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.live import LiveServer

EXCLUDED = r"^/v1/config/reload$|^/metrics$"  # the first restarts every worker at each call, the second is not JSON


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    limits = (
        "--max_num_images_per_prompt",
        "2",
        "--max_num_inference_steps",
        "2",
        "--default_num_inference_steps",
        "2",
        "--max_resolution",
        "256x256",
    )
    folder = tmp_path_factory.mktemp("openapi")
    with LiveServer(*limits, "--store_dir", str(folder / "kept"), spool=folder) as live:
        yield live


def test_every_reply_conforms_to_the_document(live: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json").exclude(path_regex=EXCLUDED)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) > 15

    for operation in operations:

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=12, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(
                checks=[not_a_server_error, response_schema_conformance, status_code_conformance], timeout=60
            )

        check()


def test_document_is_valid(live: LiveServer) -> None:
    validate(httpx.get(f"{live.url}/openapi.json").json())

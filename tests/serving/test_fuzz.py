"""What the description of the interface allows, and what it does not, asked by schemathesis: no 500, all documented."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from attnpred.serving.service import Plan, Service
from attnpred.serving.web.app import make_app
from attnpred.serving.web.guard import Rules
from tests.serving.server import SMALL, Running, serving

pytestmark = pytest.mark.slow

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
"""Of each path, method and kind."""
DESCRIPTION: Any = make_app(Service(Plan("demo")), Rules(None)).app
CASES = [
    (path, method.upper(), mode)
    for path, methods in DESCRIPTION.openapi()["paths"].items()
    for method in methods
    for mode in GenerationMode
    if method == "post" or mode is GenerationMode.POSITIVE  # nothing about the others can be wrong
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    plan = Plan("demo", settings=SMALL, folder=tmp_path_factory.mktemp("serve"), tokens=4, seconds=20, documents=5)
    with serving(plan) as found:
        yield found
        found.wait_until_idle()


@pytest.fixture(scope="module")
def interface(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("path", "method", "mode"), CASES, ids=[f"{method} {path} {mode.value}" for path, method, mode in CASES]
)
def test_every_answer_is_documented(interface: Any, path: str, method: str, mode: GenerationMode) -> None:
    one = interface[path][method]

    @given(case=one.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            # Small answers of the model that is there: the point is what comes back, and not how long it takes.
            small = [name for name in ("max_tokens", "max_completion_tokens", "max_output_tokens") if name in case.body]
            case.body |= {name: 2 for name in small if type(case.body[name]) is int and case.body[name] > 2}
            if type(case.body.get("model")) is str:
                case.body["model"] = "demo"
        answer = case.call(timeout=60)
        assert answer.status_code < 500, answer.text
        case.validate_response(answer, checks=CHECKS)

    ask()


def test_the_description_is_complete() -> None:
    found = DESCRIPTION.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/documents", "/v1/documents/{document}", "/health"} <= set(found)
    for path in found.values():
        for operation in path.values():
            assert {"200", "403"} <= set(operation["responses"]) and "422" not in operation["responses"]

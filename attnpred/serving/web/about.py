"""What the server says of itself: models, health, metrics; and what a text becomes: tokens, a rendered template."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from attnpred.serving.service import Service
from attnpred.serving.web.documented import PLAIN, REFUSALS
from attnpred.serving.web.serving import prompt_of, service_of
from attnpred.serving.web.shapes import piece
from attnpred.serving.web.wire import TemplateRequest, TokenizeRequest

router = APIRouter()


def _model(service: Service) -> dict[str, Any]:
    own = {
        "policy": service.plan.policy,
        "budget": service.plan.settings.budget,
        "has_chat_template": not service.prompts.turns.is_plain,
        "has_tools": service.prompts.has_tools,
    }
    return {
        "id": service.plan.name,
        "object": "model",
        "created": service.created,
        "owned_by": "attnpred",
        "context_length": service.context,
        "max_model_len": service.context,
        "attnpred": own,
    }


@router.get("/v1/models", responses=PLAIN)
async def models(request: Request) -> JSONResponse:
    """The one model that is served."""
    service, _ = service_of(request)
    return JSONResponse({"object": "list", "data": [_model(service)]})


@router.get("/v1/models/{model:path}", responses=PLAIN)
async def model(request: Request, model: str) -> JSONResponse:
    """The same by its name."""
    service, _ = service_of(request, model)
    return JSONResponse(_model(service))


@router.get("/health", responses={200: PLAIN[200], 403: REFUSALS[403], 413: REFUSALS[413], 503: REFUSALS[503]})
async def health(request: Request) -> JSONResponse:
    """Whether requests are taken: 503 while the model is loaded."""
    service: Service = request.app.state.service
    if not service.is_ready:
        return JSONResponse({"status": "loading model"}, 503, headers={"retry-after": "5"})
    return JSONResponse({"status": "ok"})


@router.get(
    "/metrics",
    responses=REFUSALS
    | {200: {"description": "Prometheus.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=PlainTextResponse,
)
async def metrics(request: Request) -> Response:
    """Counters, as Prometheus reads them."""
    service_of(request)
    return PlainTextResponse(await run_in_threadpool(request.app.state.meter.text), media_type="text/plain")


@router.post("/tokenize", responses=PLAIN)
async def tokenize(request: Request, asked: TokenizeRequest) -> JSONResponse:
    """The tokens of a text."""
    service, _ = service_of(request)
    ids, _ = await run_in_threadpool(lambda: service.prompts.tokens(asked.content, special=asked.add_special))
    if not asked.with_pieces:
        return JSONResponse({"tokens": ids})
    return JSONResponse({"tokens": [{"id": one, "piece": piece(service.tokenizer, one)} for one in ids]})


@router.post("/apply-template", responses=PLAIN)
async def apply_template(request: Request, asked: TemplateRequest) -> JSONResponse:
    """The text of a prompt, as a chat would read it."""
    service, owner = service_of(request)
    prompt = await prompt_of(service, owner, asked)
    return JSONResponse({"prompt": prompt.text})

"""/v1/documents: texts that are handed in, read once in the background, and asked about by their ids."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from attnpred.serving.documents import LONGEST, Document
from attnpred.serving.extracting import READERS, text_of
from attnpred.serving.service import Service
from attnpred.serving.web.documented import PLAIN, refusal
from attnpred.serving.web.serving import service_of

router = APIRouter(prefix="/v1/documents")

BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in READERS},
    }
}


def _shown(service: Service, owner: str, one: Document) -> dict[str, Any]:
    progress = service.progress(owner, one)
    return {
        "id": one.id,
        "object": "document",
        "name": one.name,
        "created_at": one.created,
        "tokens": one.tokens,
        "letters": len(one.text),
        "status": progress.status,
        "read_tokens": progress.done,
        "to_read_tokens": progress.total,
        "error": progress.error or None,
    }


@router.post("", responses=PLAIN | {507: refusal("There is no room on the disk.")}, openapi_extra=BODY)
async def add(request: Request, name: Annotated[str, Query(max_length=200)] = "document") -> JSONResponse:
    """Hand in a text, Markdown or a PDF as the body, its kind as Content-Type; it is read in the background."""
    service, owner = service_of(request)
    data, kind = await request.body(), request.headers.get("content-type", "text/plain")
    text = await run_in_threadpool(text_of, data, kind, LONGEST)
    made = await run_in_threadpool(service.add_document, owner, name, text)
    return JSONResponse(await run_in_threadpool(_shown, service, owner, made))


@router.get("", responses=PLAIN)
async def all_of_them(request: Request) -> JSONResponse:
    """All documents of this key, the newest first."""
    service, owner = service_of(request)
    found = await run_in_threadpool(service.documents.list, owner)
    shown = await run_in_threadpool(lambda: [_shown(service, owner, one) for one in found])
    return JSONResponse({"object": "list", "data": shown})


@router.get("/{document}", responses=PLAIN)
async def one(request: Request, document: str) -> JSONResponse:
    """One document: how far it is read."""
    service, owner = service_of(request)
    found = await run_in_threadpool(service.documents.get, owner, document)
    return JSONResponse(await run_in_threadpool(_shown, service, owner, found))


@router.get("/{document}/text", responses=PLAIN)
async def text(request: Request, document: str) -> JSONResponse:
    """Its text, whose letters the places of `reads` count."""
    service, owner = service_of(request)
    found = await run_in_threadpool(service.documents.get, owner, document)
    return JSONResponse({"id": found.id, "name": found.name, "text": found.text})


@router.delete("/{document}", responses=PLAIN)
async def delete(request: Request, document: str) -> JSONResponse:
    """Forget it."""
    service, owner = service_of(request)
    found = await run_in_threadpool(service.delete_document, owner, document)
    return JSONResponse({"id": found.id, "object": "document", "deleted": True})

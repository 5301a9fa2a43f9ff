"""The page: HTML, style and scripts from the package as they are, with no build step and nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "files"
FILES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "document.js": "text/javascript",
    "talk.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


@router.get("/")
async def index() -> Response:
    """The page."""
    return FileResponse(FOLDER / "page.html", media_type="text/html")


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """A part of it."""
    kind = FILES.get(name)
    if kind is None:
        return Response(status_code=404)
    return FileResponse(FOLDER / name, media_type=kind)

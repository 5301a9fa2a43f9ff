"""What every endpoint asks first: the service, whether it is ready, and whose request it is."""

from fastapi import Request

from attnpred.serving.documents import MissingError
from attnpred.serving.job import Job
from attnpred.serving.prompts import Prompt
from attnpred.serving.service import Service


class NoModelError(MissingError):
    """A model of that name is not served."""

    field = "model"


def service_of(request: Request, model: str | None = None) -> tuple[Service, str]:
    """Return the service and the owner of the request. Raises `StoppingError`, and `NoModelError` for another model."""
    service: Service = request.app.state.service
    service.require_ready()
    if model is not None and model != service.plan.name:
        raise NoModelError(f"got model {model[:60]!r}, expected {service.plan.name!r}: it is the one that is served")
    return service, request.state.owner


def note(request: Request, service: Service, prompt: Prompt, job: Job) -> None:
    """Let the line of the log say how much was asked; what was asked only if the server was started so."""
    words = {"prompt": prompt.text} if service.plan.logs_prompts else {}
    request.state.log = {"prompt_tokens": len(prompt.ids), "answers": len(job.tellers)} | words

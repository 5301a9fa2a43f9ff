"""What endpoints ask first: the service, whether it is ready, whose request it is; and the prompt of a chat."""

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from attnpred.errors import ConfigError
from attnpred.serving.documents import MissingError
from attnpred.serving.job import FieldError, Job
from attnpred.serving.prompts import Prompt
from attnpred.serving.service import Service
from attnpred.serving.web.wire import TemplateRequest


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


async def prompt_of(service: Service, owner: str, asked: TemplateRequest) -> Prompt:
    """Return the prompt of a chat. Raises `FieldError`, and `MissingError` for a document."""
    tools = [tool.model_dump(exclude_none=True) for tool in asked.callable_tools]
    if tools and not service.prompts.has_tools:
        raise FieldError("tools", "got tools, expected none: the model's chat template has no calls that can be parsed")
    messages = [message.plain() for message in asked.messages]
    texts = await run_in_threadpool(service.texts, owner, asked.documents)
    try:
        return await run_in_threadpool(service.prompts.chat, messages, texts, tools)
    except ConfigError as error:
        raise FieldError("messages", error) from None


def note(request: Request, service: Service, prompt: Prompt, job: Job) -> None:
    """Let the line of the log say how much was asked; what was asked only if the server was started so."""
    words = {"prompt": prompt.text} if service.plan.logs_prompts else {}
    request.state.log = {"prompt_tokens": len(prompt.ids), "answers": len(job.tellers)} | words

"""Run the matrix of bad inputs in this process: each case must end with exit code 2 and one line, before the long work."""

import io
from collections.abc import Callable, Iterable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from unittest.mock import patch

from huggingface_hub import constants

from attnpred import hf
from attnpred.cli.main import main
from attnpred.kernels import prepare
from attnpred.predictor import seer_training, training
from benchmarks.options import Options
from tests.cli.matrix import Case
from tests.reliability.outcome import Outcome


class Reached(BaseException):
    """A case came as far as the long work."""


def _reached(*given: object, **named: object) -> object:
    raise Reached


def _then_reached(check: Callable[..., object]) -> Callable[..., object]:
    def checked(*given: object) -> object:
        check(*given)
        raise Reached

    return checked


def run_all(found: Iterable[Case]) -> list[Outcome]:
    """Run cases; return an outcome for each command."""
    outcomes: dict[str, Outcome] = {}
    demo = hf.load_model("demo")
    with ExitStack() as stack:
        stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(patch.object(training, "train_predictor", _reached))
        stack.enter_context(patch.object(seer_training, "train_seer", _reached))
        stack.enter_context(patch.object(prepare, "prepare", lambda device: None))
        stack.enter_context(patch.object(Options, "checked", _then_reached(Options.checked)))
        for case in found:
            outcome = outcomes.setdefault(case.arguments[0], Outcome(case.arguments[0]))
            outcome.injected += 1
            with patch.object(hf, "load_model", (lambda *given, **named: demo) if case.needs_model else _reached):
                wrong = run(case)
            if wrong is None:
                outcome.refused += 1
            else:
                outcome.add_wrong(f"{case.name}: {wrong}")
    return list(outcomes.values())


def run(case: Case) -> str | None:
    """Return what is wrong with how a case ends, or None."""
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            code = main(case.arguments)
    except Reached:
        return "was accepted"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    text = said.getvalue()
    ours = [line for line in text.splitlines() if line.startswith("attnpred: ")]
    if code != 2 or len(ours) != 1 or not text.endswith(ours[0] + "\n"):
        return f"exit code {code}, {text[-200:]!r}"
    if "Traceback" in text or "\n  " in text:
        return f"more than one line: {text[:200]!r}"
    return None if "expected" in ours[0] or "--help" in ours[0] else f"no advice: {ours[0][:200]}"

"""`attnpred lm-eval`: lm-evaluation-harness's own command line, which then knows the model `attnpred`."""

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with a policy: --model attnpred --model_args pretrained=MODEL,policy=quest,budget=1024."""
    import sys

    from attnpred.evaluation import harness  # without the extra `eval` this says so

    given, sys.argv = sys.argv, ["lm-eval", *context.args]
    try:
        code = harness.main()
    finally:
        sys.argv = given
    if code:
        raise typer.Exit(code)

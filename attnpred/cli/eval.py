"""`attnpred eval`: tasks x policies x budgets on a model, one JSON line per row; goes on where it was stopped.

Exit codes: 0 all rows are there; 1 some cells could not be measured, each was told on stderr, or rows could not be written
to their file, and are on stdout; 2 a mistake, before anything long began.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from attnpred.cli.options import DtypeOption, WeightsOption, cache_options
from attnpred.cli.words import floats, words
from attnpred.config import CacheConfig

POLICIES = "streaming,last_step,ema,h2o,mean_key_last,mean_key,quest,predicted:late_share=0,predicted,oracle"
BUDGETS = "0.25,0.125,0.0769,0.0625,0.03125"
UNMEASURED = 1
OF_A_CELL = {"budget": 1.0, "dense_when_fits": True, "measure_recovery": False}
"""Settings that differ from cell to cell (`attnpred.evaluation.grid`)."""


@cache_options(fixed=OF_A_CELL)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    config: CacheConfig,
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the rows; rows that are there are not measured again.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="quick or full: tasks, lengths, budgets and policies.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="NAME or NAME=FILE, comma between (see `attnpred info`); left out: recovery.")
    ] = None,
    policies: Annotated[
        str | None, typer.Option(help=f"Comma or space between them; settings as in 'ema:rate=0.1'. [{POLICIES}]")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help=f"Shares of the context, or tokens. [{BUDGETS}]")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a document with its question. [4096]")] = None,
    texts: Annotated[
        str | None, typer.Option(help="Text files; for recovery also facts, book, code, table, which are its default.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Documents of a cell (of each text of recovery). [8; of a file all]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of a cell.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Decode steps of tasks that continue a text. [128]")] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts of a file into the model's chat template.")] = True,
    full: Annotated[bool, typer.Option(help="Measure the full cache beside everything, to compare with.")] = True,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="Also measure attention recovery, on the first document of a cell.")
    ] = False,
    devices: Annotated[str | None, typer.Option(help="One process each: cuda:0,cuda:1. [the GPU or CPU]")] = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the documents.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure quality and cost of policies on tasks; progress goes to stderr."""
    from attnpred.errors import ConfigError
    from attnpred.evaluation.plan import Plan, as_budgets, parse_tasks
    from attnpred.evaluation.rows import RowsFile
    from attnpred.evaluation.suites import SUITES
    from attnpred.evaluation.variants import parse_variant

    if suite is not None and suite not in SUITES:
        raise ConfigError(f"got --suite {suite!r}, expected one of {', '.join(SUITES)}")
    chosen = SUITES[suite] if suite is not None else None
    policies = policies or (chosen.policies if chosen else POLICIES)
    if not words(policies) or (texts is not None and not words(texts)):
        raise ConfigError(f"got --policies {policies!r} and --texts {texts!r}, expected at least one of each")
    sizes = floats("--lengths", (chosen.lengths if chosen else "4096") if lengths is None else lengths)
    if any(size < 1 or not float(size).is_integer() for size in sizes):
        raise ConfigError(f"got --lengths {lengths!r}, expected whole numbers of tokens")
    shares = floats("--budgets", (chosen.budgets if chosen else BUDGETS) if budgets is None else budgets)
    plan = Plan(
        model=model,
        tasks=parse_tasks((chosen.tasks if chosen else "recovery") if tasks is None else tasks),
        variants=tuple(parse_variant(word) for word in words(policies)),
        budgets=as_budgets(shares),
        lengths=tuple(int(size) for size in sizes),
        config=config,
        dtype=dtype,
        weights=weights,
        seed=seed,
        documents=documents or (chosen.documents if chosen else None),
        steps=steps or (chosen.steps if chosen else 128),
        limit=limit,
        texts=tuple(words(texts or "")),
        chat=chat,
        full=full,
        recovery=recovery,
    )
    if dry_run:
        for cell in plan.cells():
            print(f"{cell.task.word} at {cell.length}: {cell.variant.label} with budget {cell.budget:g}")
        print(f"{len(plan.cells())} cells")
        return
    if out is None:
        raise ConfigError("got no --out, expected a file for the rows")
    _run(plan, RowsFile(out), words(devices or ""), as_json)


def _run(plan: Any, file: Any, devices: list[str], as_json: bool) -> None:
    import json
    import sys

    from attnpred.evaluation.grid import check
    from attnpred.evaluation.notices import each_once
    from attnpred.hf.load import load_config

    total, failed = len(plan.cells()), 0
    try:
        with each_once():
            check(plan, load_config(plan.model, dtype=plan.dtype)[0])
            with file.claimed():
                failed = _measure(plan, file, devices)
    finally:
        sys.stdout.write(lines := file.waiting())
        if lines:
            count = lines.count("\n")
            print(
                f"attnpred: {file.path} cannot be written ({file.problem}): {count} rows are on stdout instead",
                file=sys.stderr,
            )
    count = len(file.rows)
    print(json.dumps({"rows": count, "out": str(file.path)}) if as_json else f"{file.path}: {count} rows")
    if failed:
        print(f"attnpred: {failed} of {total} cells could not be measured; see above", file=sys.stderr)
    if failed or lines:
        raise typer.Exit(UNMEASURED)


def _measure(plan: Any, file: Any, devices: list[str]) -> int:
    """Measure what is left over; return how many cells could not be measured."""
    import sys

    from tqdm import tqdm

    from attnpred.evaluation.grid import Grid, left_over, run_cells
    from attnpred.evaluation.workers import run_on_devices
    from attnpred.hf import load_model

    failed, problem = 0, None
    # The first device makes all documents once, and does the work if it is the only one.
    grid = Grid(plan, *load_model(plan.model, device=devices[0] if devices else None, dtype=plan.dtype))
    grid.check_policies()
    cells, total = left_over(grid.plan, file.rows), len(plan.cells())
    with tqdm(total=total, initial=total - len(cells), unit="cell", file=sys.stderr) as bar:

        def done(cell: Any, why: str | None) -> None:
            nonlocal failed, problem
            bar.set_description_str(f"{cell.task.word} {cell.length} {cell.variant.label}", refresh=False)
            bar.update()
            if file.problem is not None and file.problem != problem:
                bar.write(
                    f"{file.path} cannot be written ({file.problem}): rows are kept in memory, and tried again after every cell",
                    file=sys.stderr,
                )
            problem = file.problem
            if why is not None:
                failed += 1
                bar.write(
                    f"left out: {cell.task.word} at {cell.length}, {cell.variant.label} {cell.budget:g}: {why}",
                    file=sys.stderr,
                )

        if len(devices) > 1:
            run_on_devices(grid.plan, file, cells, devices, done)
        else:
            run_cells(grid, file, cells, done)
    return failed

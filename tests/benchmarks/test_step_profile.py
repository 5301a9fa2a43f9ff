"""The profile of a step adds up, and a function that was renamed is an error that says where to correct it."""

import json
import time

import pytest

from attnpred import decode, kernels
from benchmarks import step_profile
from benchmarks.models import random_model
from benchmarks.step_profile import PARTS, Clocks, Part, clocks_on, place_of


@pytest.mark.slow
def test_every_part_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    step_profile.main(["--shape", "tiny", "--dtype", "float32", "--context", "512", "--budget", "192", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["label"]: row for row in found["rows"]}
    assert {part.label for part in PARTS} < set(rows)
    assert all(row["us"] > 0 for row in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.001)
    assert rows["linear layers"]["calls"] == 2 * 7
    assert rows["sparse attention"]["calls"] == 2 and rows["sparse attention"]["floor_us"] == 0


def test_own_times_add_up() -> None:
    clocks = Clocks()
    inner = clocks.around(lambda: time.sleep(0.02), "inner")
    outer = clocks.around(lambda: (inner(), inner(), time.sleep(0.01)), "outer")
    began = time.perf_counter()
    spent, calls = clocks.of_step(outer)
    whole = (time.perf_counter() - began) * 1e6
    assert calls == {"inner": 2, "outer": 1}
    assert spent["inner"] >= 40_000 and spent["outer"] >= 10_000
    assert sum(spent.values()) <= whole  # an inner second is counted once
    outer()
    assert clocks.calls == calls  # off between steps


@pytest.mark.parametrize(("module", "name"), [("attnpred.decode", "Gone.step"), ("attnpred.gone", "step")])
def test_a_missing_name_says_what_to_do(module: str, name: str) -> None:
    with pytest.raises(
        LookupError, match=f"got no {name} in {module}, expected the function called 'x': correct its line"
    ):
        place_of(Part(module, name, "x"))


def test_every_function_is_put_back() -> None:
    before = decode.LayerDecoder.step, kernels.weigh
    model = random_model(shape="tiny")
    with pytest.raises(RuntimeError), step_profile.switchable(model), clocks_on(model):
        assert decode.LayerDecoder.step is not before[0] and "forward" in vars(model)
        raise RuntimeError
    assert (decode.LayerDecoder.step, kernels.weigh) == before
    assert all("forward" not in vars(module) for module in model.modules())

"""`fewstep search-grid`: the same search is not done twice, and what it writes serves plans and samples."""

from __future__ import annotations

import json

import pytest

from fewstep import artefact, solvers
from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.evaluate import grid_descent, grid_search
from fewstep.evaluate.grid_search import search_grid
from fewstep.solvers import descent, grid_files, search

SMALL = {"points": 8, "samples": 6, "steps": (2, 3)}


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("cost", grid_search.COSTS)
def test_every_cost_gives_grids_that_plans_take(teacher_folder, tmp_path, cost):
    out = tmp_path / "grid.json"
    grid = search_grid(teacher_folder, out, cost=cost, data="digits", progress=quiet, **SMALL)
    schedule = artefact.load(teacher_folder).denoiser.schedule
    for steps in SMALL["steps"]:
        plan = solvers.plan("ddim", schedule, steps, grid={"name": "searched", "path": str(out)}, prediction="edm")
        assert plan.times == grid.grids[steps] and plan.times[0] == 80.0 and plan.times[-1] == 0.0
        assert set(plan.times) <= set(grid.nodes)


def test_the_batch_does_not_change_what_is_found(teacher_folder, tmp_path):
    one, two = (
        search_grid(teacher_folder, tmp_path / f"{batch}.json", batch=batch, progress=quiet, **SMALL)
        for batch in (6, 2)
    )
    for a, b in zip(one.costs, two.costs):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)  # float32 trajectories of norm 600


def test_a_search_that_is_there_is_not_repeated(teacher_folder, tmp_path, monkeypatch):
    out = tmp_path / "grid.json"
    first = search_grid(teacher_folder, out, progress=quiet, **SMALL)
    content = out.read_bytes()

    def never(*_, **__):
        raise AssertionError("the teacher was asked again")

    with monkeypatch.context() as patched:
        patched.setattr(search, "trajectory_costs", never)
        search_grid(teacher_folder, out, progress=quiet, **SMALL)
        assert out.read_bytes() == content
        more = search_grid(teacher_folder, out, progress=quiet, growth=1.0, **{**SMALL, "steps": (5,)})
        assert more.costs == first.costs and list(more.grids) == [5]
        with pytest.raises(AssertionError, match="asked again"):
            search_grid(teacher_folder, out, progress=quiet, seed=1, **SMALL)
    assert grid_files.read(out).grids == more.grids  # what failed left the file as it was


@pytest.mark.parametrize("cost", grid_descent.COSTS)
def test_descent_writes_each_number_of_steps_when_it_is_found_and_does_not_repeat_it(
    teacher_folder, tmp_path, monkeypatch, cost
):
    out, said = tmp_path / "grid.json", []
    options = {**SMALL, "cost": cost, "rounds": 3, "sampler": "heun"}
    grid = search_grid(teacher_folder, out, progress=said.append, **options)
    start = solvers.grids.times(None, grid.schedule, 3)
    assert grid.grids[3] != start and (grid.grids[3][0], grid.grids[3][-1]) == (start[0], start[-1])
    assert said[0].endswith("8 of 8 network calls") and sum("at the start" in line for line in said) == 2
    back, content = grid_files.read(out), out.read_bytes()
    assert back.grids == grid.grids and back.prices == grid.prices and back.searched["sampler"] == "heun"
    again = search_grid(teacher_folder, out, progress=quiet, **{**options, "steps": (3,)})
    assert again.grids == grid.grids and out.read_bytes() == content
    found = descent.descend

    def once(model, batches, times, **options):
        if len(times) == 6:
            raise KeyboardInterrupt
        return found(model, batches, times, **options)

    monkeypatch.setattr(descent, "descend", once)
    with pytest.raises(KeyboardInterrupt):
        search_grid(teacher_folder, out, progress=quiet, **{**options, "steps": (2, 3, 4, 5)})
    assert list(grid_files.read(out).grids) == [2, 3, 4]
    assert grid_files.read(out).grids[3] == grid.grids[3]


def test_an_interrupted_search_leaves_nothing_behind(teacher_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "trajectory_costs", interrupted)
    assert main(["search-grid", str(teacher_folder), "--out", str(tmp_path / "grid.json")]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_prints_the_levels_and_how_to_use_them(teacher_folder, tmp_path, capsys):
    out = tmp_path / "new" / "grid.json"
    arguments = ["search-grid", teacher_folder, "--points", 6, "--samples", 4, "--steps", 2, 3, "--out", out]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "network calls" in said and "sigma/alpha" in said and "'searched'" in said
    assert set(json.loads(out.read_text())["grids"]) == {"2", "3"}


def test_what_cannot_be_searched_is_one_sentence(teacher_folder, tmp_path):
    out = tmp_path / "grid.json"
    for words, changes in (
        ("gits", {"cost": "fid"}),
        ("steps", {"steps": (9,)}),
        ("points", {"points": 1}),
        ("ipndm", {"solver": "heun"}),
        ("dpmpp_2m", {"solver": "ddmp"}),
        ("--data", {"cost": "bound"}),
        ("no way", {"cost": "bound", "data": "digits", "steps": (1,)}),
        ("no inner time", {"cost": "samples", "steps": (1, 2)}),
        ("growth", {"cost": "samples", "growth": 1.15}),
        ("draws noise", {"cost": "samples", "solver": "ddpm"}),
        ("draws noise", {"cost": "samples", "sampler": "ddpm"}),
        ("solver 'ddmi' is not known", {"cost": "samples", "sampler": "ddmi"}),
    ):
        with pytest.raises(UserError, match=words) as error:
            search_grid(teacher_folder, out, progress=quiet, **{**SMALL, **changes})
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    out.write_text("{}")
    with pytest.raises(UserError, match="not overwritten"):
        search_grid(teacher_folder, out, progress=quiet, **SMALL)
    assert out.read_text() == "{}"
    with pytest.raises(UserError, match="cannot write"):
        search_grid(teacher_folder, out / "below.json", progress=quiet, **SMALL)

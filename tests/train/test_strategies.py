"""Two ranks give one process's numbers, whatever is shared out between them."""

import importlib.util
import json

import pytest

from fewstep.train import Trainer
from tests.train import rank_runs, ranks, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.two_ranks("rank_runs", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{method: losses} of one process on the same global batches."""
    folder = tmp_path_factory.mktemp("alone")
    for method in small.METHODS:
        run = Trainer(small.recipe(folder / method, method), teacher=small.teacher(), loader=small.Digits())
        run.fit()
    return {method: rank_runs.losses(folder / method) for method in small.METHODS}


@pytest.mark.parametrize("case", rank_runs.CASES)
def test_losses_and_gradient_norms_are_those_of_one_process(case, found, alone):
    """1e-5 in float32: the same terms, summed in another order, over four updates."""
    theirs, ours = alone[case.split("-")[1]], found[0][case]["losses"]
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_clipping_is_exercised(alone):
    for method, lines in alone.items():
        norms = [line["gradient_norm/student"] for line in lines if "gradient_norm/student" in line]
        assert norms and min(norms) > small.CLIPS[method]


@pytest.mark.parametrize("method", small.METHODS)
def test_each_rank_holds_half_of_a_zero3_teacher(found, method):
    for rank in found:
        held = rank[f"zero3-{method}"]["teacher"]
        assert held["resident"] == 0  # nothing gathered is left behind
        assert held["shards"] == pytest.approx(held["whole"] / 2, rel=0.01)  # odd sizes are padded
        assert rank[f"zero2-{method}"]["teacher"]["resident"] == held["whole"]


@pytest.mark.parametrize("case", rank_runs.RESUMED)
def test_resuming_under_zero_is_bit_for_bit(found, case):
    assert found[0][case]["unequal after resuming"] == []
    assert found[0][case]["unequal states"] == []
    assert found[0][case]["states"] > 50
    assert json.dumps(found[0][case]["losses"])


def test_each_rank_goes_on_with_its_own_part_of_the_coming_means(found):
    for rank in found:
        before, after = rank["means"]
        assert before == after and before["loss/critic"][1] == 6  # updates, each of two micro-batches
    assert found[0]["means"][0] != found[1]["means"][0]  # each saw other samples

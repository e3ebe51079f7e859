"""The measured traps of sharded training (torch 2.13, DeepSpeed 0.19.8): the wrong way raises or is wrong,
ours is exact.

Exact means 1e-5 in float32 against one process on the whole batch (sums are taken in another order); wrong
means beyond 1e-3.
"""

import importlib.util

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.methods import OptimizerConfig
from fewstep.nets.mlp import MLP
from fewstep.train.strategies.single import LocalEngine
from tests.train import ranks

EXACT, WRONG = 1e-5, 1e-3
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def fails(result):
    """Whether a wrong way was seen to raise, or to be wrong."""
    return isinstance(result, str) or result > WRONG


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.two_ranks("rank_traps", tmp_path_factory.mktemp("traps"))


def test_3_executor_buffers_are_not_reused_while_gradients_are_on():
    """Reused, the second run would overwrite what the first run's backward needs."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(4), schedules.get("edm"), "x0")
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plan = solvers.plan("heun", denoiser.schedule, 2, prediction=denoiser.prediction)
    first, second = torch.randn(2, 3, 4)

    def gradient(*noises):
        denoiser.zero_grad()
        answers = [solvers.execute(plan, denoiser, noise, gradient="all").x for noise in noises]
        answers[0].square().sum().backward()
        return [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]

    for alone, interleaved in zip(gradient(first), gradient(first, second), strict=True):
        assert torch.equal(alone, interleaved)
    kept = torch.randn(3, 4, requires_grad=True)
    buffer = torch.empty(3, 4)
    out = (buffer.copy_(kept.detach()).requires_grad_(True)).square().sum()
    with torch.no_grad():
        buffer.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.slow
@needs_deepspeed
def test_4_a_frozen_zero3_teacher_is_differentiated_through_its_module_only(found):
    for rank in found:
        assert rank["frozen"]["module"] < EXACT
        assert fails(rank["frozen"]["engine"])
        assert isinstance(rank["frozen"]["twice"], str), "gradients of gradients work there now: allow R1 under ZeRO-3"


@pytest.mark.slow
@needs_deepspeed
def test_4_a_frozen_zero3_teacher_holds_half_its_parameters_on_each_of_two_ranks(found):
    for rank in found:
        assert rank["frozen"]["share"] == pytest.approx(0.5, abs=0.01)  # odd sizes are padded


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_5_a_critic_in_the_students_turn_is_called_fixed(found, stage):
    assert found[0][f"critic_fixed_{stage}"] < EXACT
    assert fails(found[0][f"critic_bare_{stage}"])


@pytest.mark.slow
@needs_deepspeed
def test_5_a_critic_in_the_students_turn_is_not_called_through_its_engine(found):
    assert fails(found[0]["critic_engine_3"])


@pytest.mark.slow
@needs_deepspeed
def test_6_a_trained_network_is_called_through_its_engine(found):
    assert found[0]["bare_engine"] < EXACT
    assert fails(found[0]["bare_bare"])


@pytest.mark.slow
@needs_deepspeed
def test_7_adapters_outside_the_tree_of_a_frozen_base_are_exact(found):
    assert found[0]["adapters"] < EXACT


@pytest.mark.slow
@needs_deepspeed
def test_7_two_engines_may_not_train_one_base(found):
    assert fails(found[0]["two_engines"])


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_7_an_unused_role_of_a_shared_engine_moves_without_a_word(found, stage):
    """One process leaves a parameter without gradient alone; ZeRO steps it with a gradient of zero (weight decay)."""
    assert found[0][f"unused_{stage}"] > WRONG


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_8_forward_mode_is_exact_under_zero_1_and_2(found, stage):
    assert found[0][f"forward_mode_{stage}"]["ours"] < EXACT


@pytest.mark.slow
@needs_deepspeed
def test_8_forward_mode_under_zero_3_is_refused_in_one_sentence(found):
    seen = found[0]["forward_mode_3"]
    assert "train.zero_stage" in seen["ours"] and seen["ours"].endswith(".")
    assert isinstance(seen["raw"], str)
    assert seen["linear"].startswith("deepspeed."), "ZeRO-3 no longer replaces F.linear"


@pytest.mark.slow
@needs_deepspeed
def test_9_gradient_clipping_is_what_the_recipe_says_and_not_deepspeeds_default(found):
    assert found[0]["clipping"]["ours"] < EXACT * 10  # weights of size 90 after the step
    assert found[0]["clipping"]["default"] > WRONG


def test_9_betas_are_floats():
    """torch 2.13's Adam refuses (0, 0.9)."""
    module = torch.nn.Linear(2, 2)
    config = OptimizerConfig.model_validate_json('{"name": "adam", "betas": [0, 0.9]}')
    engine = LocalEngine("e", {"m": module}, {"m": config}, None, 0)
    engine.backward(module(torch.ones(1, 2)).sum(), True)
    engine.step()
    betas = engine.torch_optimizer.param_groups[0]["betas"]
    assert all(isinstance(beta, float) for beta in betas)

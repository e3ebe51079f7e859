"""A plan as a diffusers scheduler gives the plan's numbers, in a pipeline and from a saved config."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import solvers
from fewstep.analytic import Mixture
from fewstep.diffusion import schedules
from fewstep.errors import UserError

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

from fewstep.solvers import diffusers as ours

MIXTURE = Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35])
SD = schedules.get("sd")
START = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DRAWN = torch.randn(4, 40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(scheduler, teacher, x, monkeypatch) -> torch.Tensor:
    """A pipeline's loop."""
    drawn = iter(DRAWN.unbind(1))
    monkeypatch.setattr(ours, "randn_tensor", lambda shape, **options: next(drawn))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        told = t.double() / scheduler._told_scale()
        x = scheduler.step(teacher.net(scaled, told.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("solver", solvers.names(alone=True))
def test_a_pipelines_loop_gives_the_plans_picture(solver, monkeypatch):
    plan = solvers.plan(solver, SD, 5, prediction="v", grid="leading")
    scheduler = ours.PlanScheduler(prediction_type="v_prediction", solver=solver, grid="leading")
    scheduler.set_timesteps(5)
    teacher = MIXTURE.teacher(SD, "v")
    found = run(scheduler, teacher, START * scheduler.init_noise_sigma, monkeypatch)
    carried = torch.stack([START, *DRAWN[:, : plan.stochastic_stages].unbind(1)], 1)
    # the loop hands times over in float32
    torch.testing.assert_close(found, solvers.sample(teacher, plan, carried), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("flow_prediction", "flow"), ("edm", "edm")])
def test_flow_and_edm_models(kind, name, monkeypatch):
    scheduler = ours.PlanScheduler(prediction_type=kind, solver="dpmpp_2m", shift=3.0)
    scheduler.set_timesteps(6)
    teacher = MIXTURE.teacher(scheduler.schedule, name)
    plan = solvers.plan("dpmpp_2m", scheduler.schedule, 6, prediction=name)
    found = run(scheduler, teacher, START * scheduler.init_noise_sigma, monkeypatch)
    torch.testing.assert_close(found, solvers.sample(teacher, plan, START), rtol=0, atol=1e-4)


def test_the_config_is_saved_and_loaded_by_diffusers(tmp_path):
    made = ours.PlanScheduler(
        prediction_type="v_prediction",
        solver="unipc",
        grid={"name": "karras", "rho": 5.0},
        options={"order": 3, "lower_order_final": True},
    )
    made.save_pretrained(tmp_path)
    again = ours.PlanScheduler.from_pretrained(tmp_path)
    for scheduler in (made, again):
        scheduler.set_timesteps(7)
    assert again.plan == made.plan and again.plan.options["order"] == 3
    assert torch.equal(again.timesteps, made.timesteps)


def test_it_takes_over_another_schedulers_config():
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(
        beta_start=0.001, beta_end=0.011, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    taken = ours.PlanScheduler.from_config(theirs.config, solver="dpmpp_3m")
    assert taken.schedule == schedules.get("sd", beta_start=0.001, beta_end=0.011)
    assert taken.prediction.kind == "v" and taken.config.solver == "dpmpp_3m"


@pytest.mark.parametrize(("solver", "index"), [("dpmpp_3m", 2), ("heun", 4), ("unipc", 3)])
def test_image_to_image_starts_anywhere_and_warms_up_again(solver, index, monkeypatch):
    scheduler = ours.PlanScheduler(prediction_type="v_prediction", solver=solver)
    scheduler.set_timesteps(6)
    teacher = MIXTURE.teacher(SD, "v")
    step = index // scheduler.order
    scheduler.set_begin_index(index)
    scheduler.timesteps = scheduler.timesteps[index:]
    x = scheduler.add_noise(MIXTURE.sample(4, torch.Generator().manual_seed(2)), START, scheduler.timesteps[:1])
    times = solvers.grids.times(None, SD, 6)
    rest = solvers.plan(solver, SD, 6 - step, grid=list(times[step:]), prediction="v", initial_scale=1.0)
    torch.testing.assert_close(
        run(scheduler, teacher, x, monkeypatch), solvers.sample(teacher, rest, x), rtol=0, atol=1e-4
    )


def test_pipelines_may_give_timesteps_or_sigmas():
    scheduler = ours.PlanScheduler()
    assert {"timesteps", "sigmas"} <= inspect.signature(scheduler.set_timesteps).parameters.keys()
    scheduler.set_timesteps(timesteps=[999, 500, 100])
    assert scheduler.plan.times == pytest.approx((999, 500, 100, -1))
    scheduler.set_timesteps(sigmas=[14.0, 3.0, 0.5, 0.0])
    assert [SD.ratio(t) for t in scheduler.plan.times] == pytest.approx([14.0, 3.0, 0.5, 0.0])
    flow = ours.PlanScheduler(prediction_type="flow_prediction")
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    shift = 2.718281828459045**1.15
    assert flow.timesteps.tolist() == pytest.approx(
        [1000 * shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25)]
    )


class Operators(TorchDispatchMode):
    """The operators torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("solver", "kind"), [("dpmpp_3m", "epsilon"), ("unipc", "edm"), ("heun", "flow_prediction")])
def test_no_step_copies_to_the_device_or_reads_from_it(solver, kind, monkeypatch):
    scheduler = ours.PlanScheduler(prediction_type=kind, solver=solver, grid="karras")
    x = torch.randn(2, 4, 8, 8)
    monkeypatch.setattr(ours, "lincomb", lambda inputs, table, dtypes: [inputs[0]] * len(table))
    for _ in range(2):  # the first step of a run too, and again from a fresh set_timesteps
        scheduler.set_timesteps(5, device="cpu")
        tables = [id(table) for table in ours.tables(scheduler.plan, x.device, torch.float32)]
        with Operators() as operators:
            for t in scheduler.timesteps.unbind():
                x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
        assert set(operators.names) <= {"unbind", "mul"}  # mul: edm's input scale
    assert tables == [id(table) for table in ours.tables(scheduler.plan, x.device, torch.float32)]


def test_a_time_taken_by_value_still_finds_its_place():
    scheduler = ours.PlanScheduler(solver="ddim")
    scheduler.set_timesteps(5)
    for place in (0, 3):
        found = [scheduler._position(t) for t in (scheduler.timesteps[place], float(scheduler.timesteps[place]))]
        assert found == [place, place]
    assert scheduler._position(scheduler.timesteps[2:][1]) == 3  # an image-to-image pipeline cuts its times


def test_only_the_last_plans_are_kept():
    scheduler = ours.PlanScheduler()
    scheduler.set_timesteps(20)
    kept = scheduler.plan
    for steps in range(2, 10):
        scheduler.set_timesteps(steps)
    scheduler.set_timesteps(20)
    assert scheduler.plan == kept and scheduler.plan is not kept and len(scheduler._plans) == 8
    scheduler.set_timesteps(8)
    again = scheduler.plan
    scheduler.set_timesteps(8)
    assert scheduler.plan is again


def test_a_diffusers_pipeline_gives_the_picture_of_its_own_scheduler():
    from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, UniPCMultistepScheduler

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    with torch.no_grad():  # a fresh transformer answers zero
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs = UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    mine = ours.PlanScheduler(
        solver="unipc", grid={"name": "linspace", "drop_last": True}, options={"lower_order_final": True}
    )
    pictures = []
    for scheduler in (theirs, mine):
        pipeline = DiTPipeline(transformer.eval(), vae.eval(), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(
            torch.from_numpy(pipeline([1, 2], num_inference_steps=4, generator=generator, output_type="np").images)
        )
    assert pictures[0].std() > 0.01
    torch.testing.assert_close(pictures[1], pictures[0], rtol=0, atol=1e-4)  # both in float32, 4 guided steps


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"solver": "dpm++"}, "solver 'dpm++' is not known"),
        ({"prediction_type": "noise"}, "prediction_type 'noise' is not known"),
        ({"beta_schedule": "linear"}, "beta_schedule 'linear' is not known"),
        ({"options": {"oder": 2}}, "option of solver 'dpmpp_2m', 'oder' is not known"),
    ],
)
def test_a_mistake_is_one_sentence(made, words):
    with pytest.raises(UserError) as error:
        ours.PlanScheduler(**made)
    assert words in str(error.value)

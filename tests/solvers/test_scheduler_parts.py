"""PlanScheduler with bounds on clean estimates and learned variances, against diffusers' own and `fewstep.sample`."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

PlanScheduler = pytest.importorskip("fewstep.solvers.diffusers").PlanScheduler

SD = schedules.get("sd")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
STEPS = 8
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
CLIP = {"clip_sample": True, "clip_sample_range": 0.8}
BOUNDS = {"threshold": {"threshold": {"quantile": 0.9, "most": 1.5}}, "clip": {"clip": 0.8}}


def net(x, t, cond=None):
    return torch.sin(1.3 * x) + 0.4 * torch.cos(0.01 * t)[:, None, None, None] * x


def twice(x, t, cond=None):
    """C channels of prediction, C of variance in [-1, 1]."""
    return torch.cat([net(x, t), torch.sin(2.0 * x + 0.01 * t[:, None, None, None])], 1)


def run(scheduler, network=net, start=NOISE, **options):
    """A pipeline's loop."""
    x, generator = start * scheduler.init_noise_sigma, torch.Generator().manual_seed(7)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    for t in scheduler.timesteps:
        told = t.float().expand(len(x))
        x = scheduler.step(network(x.float(), told).to(x.dtype), t, x, **options).prev_sample
    return x


def close(found, expected, rtol=1e-5):
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("solver", "options"),
    [("ddim", {"unbounded_noise": True}), ("dpmpp_3m", {}), ("heun", {}), ("unipc", {}), ("pndm", {}), ("euler_a", {})],
)
def test_a_bounded_plan_gives_samples_picture(solver, options, bound, monkeypatch):
    options = {**options, **BOUNDS[bound]}
    plan = solvers.plan(solver, SD, STEPS, prediction="v", grid="leading", **options)
    draws = torch.randn(3, plan.stochastic_stages, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    drawn = iter(draws.unbind(1))
    monkeypatch.setattr(solvers.diffusers, "randn_tensor", lambda shape, **_: next(drawn))
    scheduler = PlanScheduler(prediction_type="v_prediction", solver=solver, grid="leading", options=options)
    scheduler.set_timesteps(STEPS)
    carried = torch.cat([NOISE[:, None], draws], 1)
    # the loop hands times over in float32
    close(run(scheduler), solvers.sample(net, plan, carried), 1e-4)
    assert (solvers.sample(net, plan, carried) - solvers.sample(net, free(plan), carried)).abs().max() > 0.05


def free(plan):
    options = {key: value for key, value in plan.options.items() if key not in BOUNDS}
    return solvers.plan(plan.solver, SD, STEPS, prediction=plan.prediction, **options)


CASES = [
    ("DDIMScheduler", {**THRESHOLD, "clip_sample": False, **LEADING}, "ddim", {"unbounded_noise": True}, {}),
    ("DDIMScheduler", {**CLIP, **LEADING}, "ddim", {"unbounded_noise": True}, {}),
    ("DDIMScheduler", {**CLIP, **LEADING}, "ddim", {}, {"use_clipped_model_output": True}),
    ("DDPMScheduler", {**CLIP, "timestep_spacing": "leading"}, "ddpm", {}, {}),
    ("DPMSolverMultistepScheduler", {**THRESHOLD, **LEADING}, "dpmpp_2m", {"lower_order_final": True}, {}),
    ("DPMSolverSinglestepScheduler", THRESHOLD, "dpmpp_2s", {"inner": "grid"}, {}),
    ("UniPCMultistepScheduler", {**THRESHOLD, **LEADING}, "unipc", {"lower_order_final": True}, {}),
]


@pytest.mark.parametrize(("theirs", "made", "solver", "options", "asked"), CASES)
def test_bounds_are_taken_over_from_diffusers_schedulers(theirs, made, solver, options, asked):
    scheduler = getattr(diffusers, theirs)(**BETAS, **made)
    scheduler.set_timesteps(STEPS)
    taken = PlanScheduler.from_config(scheduler.config, solver=solver, options={**options, "initial_scale": 1.0})
    taken.set_timesteps(timesteps=scheduler.timesteps.tolist())
    found = run(taken)
    close(found, run(scheduler, **asked), 1e-4)  # float32, and times of DPM-Solver's in float32
    bare = PlanScheduler(**BETAS, solver=solver, options={**options, "initial_scale": 1.0})
    bare.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert (run(bare) - found).abs().max() > 0.01


def test_a_learned_variance_in_diffusers_own_pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()
    theirs = diffusers.DDPMScheduler(**BETAS, variance_type="learned_range", timestep_spacing="leading")
    ours = PlanScheduler.from_config(
        theirs.config,
        solver="ddpm",
        grid={"name": "leading", "offset": 0},
        options={"variance": "learned_range", "initial_scale": 1.0},
    )
    pictures = []
    for scheduler in (theirs, ours):
        pipeline = diffusers.DDPMPipeline(unet, scheduler)
        assert pipeline.scheduler is scheduler
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline(2, num_inference_steps=6, generator=generator, output_type="np").images
        pictures.append(torch.from_numpy(drawn))
    assert pictures[0].std() > 0.05
    torch.testing.assert_close(pictures[1], pictures[0], rtol=0, atol=1e-4)  # float32, 6 steps


@pytest.mark.parametrize("options", [{**BOUNDS["threshold"]}, {"variance": "learned_range", **BOUNDS["clip"]}])
def test_such_plans_are_saved_and_loaded_by_diffusers(options, tmp_path):
    made = PlanScheduler(solver="ddpm", options=options, **THRESHOLD)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["options"] == options and saved["thresholding"]
    again = PlanScheduler.from_pretrained(tmp_path)
    for scheduler in (made, again):
        scheduler.set_timesteps(5)
    assert again.plan == made.plan and again.plan.stages[0].nonlinear
    network = twice if "variance" in options else net
    assert torch.equal(run(again, network), run(made, network))


def test_a_config_is_taken_over_with_the_other_class_defaults():
    taken = PlanScheduler.from_config(diffusers.DDIMScheduler(beta_schedule="scaled_linear").config)
    assert taken.config.clip_sample and taken.schedule == schedules.get("sd", beta_start=0.0001, beta_end=0.02)
    flow = PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert flow.prediction.kind == "flow" and flow.schedule == schedules.get("flow", shift=3.0)
    with pytest.raises(UserError, match="beta_schedule 'linear' is not known"):
        PlanScheduler.from_config(diffusers.DDPMScheduler().config)
    own = diffusers.DDIMScheduler(trained_betas=[0.01] * 1000).config
    with pytest.raises(UserError, match="betas of its own"):
        PlanScheduler.from_config(own)
    assert PlanScheduler.from_config(own, schedule=SD.to_dict()).schedule == SD
    edm = PlanScheduler.from_config({"sigma_schedule": "karras"})
    audio = PlanScheduler.from_config({"sigma_schedule": "exponential", "solver_order": 2})
    assert edm.schedule == schedules.get("edm")
    assert [audio.schedule.ratio(t) for t in (audio.schedule.t_min, audio.schedule.t_max)] == pytest.approx([0.3, 500])


def test_options_stand_before_diffusers_names():
    made = PlanScheduler(options=BOUNDS["clip"], **THRESHOLD)
    made.set_timesteps(3)
    assert [part.kind for part in made.plan.stages[0].nonlinear] == ["map", "clamp"]
    both = PlanScheduler(**THRESHOLD, **CLIP)
    both.set_timesteps(3)
    assert "clip" not in both.plan.options  # as in diffusers, which clips only where it does not threshold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_pipeline_bounds_in_float32(dtype):
    scheduler = PlanScheduler(solver="dpmpp_2m", options=BOUNDS["threshold"])
    scheduler.set_timesteps(STEPS)
    found = run(scheduler, start=NOISE.to(dtype))
    scheduler.set_timesteps(STEPS)
    assert found.dtype == dtype
    close(found.float(), run(scheduler), STEPS * torch.finfo(dtype).eps)  # one rounding of x and of the output a step


class Operators(TorchDispatchMode):
    """The operators torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_step_with_parts_copies_to_the_device_or_reads_from_it(bound):
    scheduler = PlanScheduler(solver="dpmpp_3m", options=BOUNDS[bound])
    answers = torch.randn(STEPS, *NOISE.shape)
    for _ in range(2):  # the first step of a run too, and again from a fresh set_timesteps
        scheduler.set_timesteps(STEPS, device="cpu")
        x = NOISE
        with Operators() as operators:
            for t, answer in zip(scheduler.timesteps.unbind(), answers.unbind()):
                x = scheduler.step(answer, t, x).prev_sample
        bounding = {"clip": "clamp", "threshold": "_threshold"}[bound]
        assert {bounding, "_lincomb"} <= operators.names <= {"unbind", "empty_like", "_lincomb", bounding}


def test_image_to_image_keeps_its_bounds():
    scheduler = PlanScheduler(solver="dpmpp_2m", options=BOUNDS["threshold"])
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    scheduler.timesteps, scheduler.init_noise_sigma = scheduler.timesteps[2:], 1.0
    times = solvers.grids.times(None, SD, 6)[2:]
    rest = solvers.plan("dpmpp_2m", SD, 4, grid=list(times), initial_scale=1.0, **BOUNDS["threshold"])
    close(run(scheduler), solvers.sample(net, rest, NOISE), 1e-4)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"options": {"guidance": 3.0}}, "leave it out, the pipeline guides"),
        ({"options": {"guidance": {"name": "apg", "scale": 3.0}}}, "leave it out, the pipeline guides"),
        ({"solver": "ddpm", "options": {"variance": "residual"}}, "asks a network in the role 'moment'"),
        ({"solver": "genie"}, "asks a network in the role 'head' and a pipeline has one network"),
        ({"solver": "ctm", "grid": "leading", "options": {"two_times": True}}, "tells the network where it lands"),
        ({"options": {"clip": -1.0}}, "clip is -1.0"),
        ({"thresholding": True, "sample_max_value": 0.5}, "0 < least <= most"),
        ({"solver": "ddpm", "grid": [999.0, 300.0, -1.0], "options": {"variance": "second_moment"}}, "role 'moment'"),
    ],
)
def test_what_a_pipeline_cannot_run_is_refused_when_it_is_made(made, words):
    with pytest.raises(UserError) as error:
        PlanScheduler(**made)
    assert words in str(error.value) and str(error.value).count(". ") == 0


def test_a_network_without_the_learned_half_is_one_sentence():
    scheduler = PlanScheduler(solver="ddpm", options={"variance": "learned_range"})
    scheduler.set_timesteps(3)
    with pytest.raises(UserError, match="give 2 of its channels"):
        run(scheduler)

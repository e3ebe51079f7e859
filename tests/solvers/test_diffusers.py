"""Every sampler of diffusers 0.42.1, quirks included, is one of our plans: same final state on a random network.

The network is nonlinear, with weights of its own for every evaluation and every condition, guided with w = 4. Both
sides see the same noise, drawn per evaluation. Schedulers are handed their tables in float64; those that round inside
to float32 set the tolerances. Levels are taken from the scheduler, so that those tests are about solvers; the grids are
compared at the end.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

SIZE, GUIDANCE = 16, 4.0
STEPS = (1, 2, 3, 10, 50)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}


class Net(torch.nn.Module):
    """tanh(A_k x + b_k,cond) for the k-th evaluation."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(100, SIZE, SIZE, generator=draw, dtype=torch.float64) / SIZE**0.5
        self.shift = torch.randn(100, 3, SIZE, generator=draw, dtype=torch.float64)
        self.calls, self.times = 0, []

    def forward(self, x, t, cond):
        k = self.calls
        self.calls += 1
        self.times.append(float(t.reshape(-1)[0]))
        return torch.tanh(x.double() @ self.mix[k].T + self.shift[k][cond])

    def null(self, cond):
        return torch.full_like(cond, 2)

    def guided(self, x, t, cond):
        """What a pipeline does around its scheduler."""
        both = self(torch.cat([x, x]), torch.as_tensor(t), torch.cat([cond, self.null(cond)]))
        first, second = both.chunk(2)
        return second + GUIDANCE * (first - second)


START = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DRAWN = torch.randn(3, 100, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
COND = torch.tensor([0, 1, 0])


def theirs(scheduler, start, monkeypatch, convert: Callable = lambda out, x: out, evaluations=None, **keywords):
    """The final state of diffusers' loop, and the times it told its network."""
    net, x, now = Net(), start, []
    module = importlib.import_module(type(scheduler).__module__)

    def draw(shape, *arguments, **options):
        return DRAWN[:, len(now) - 1].to(options.get("dtype") or torch.float64)

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    monkeypatch.setattr(torch, "randn_like", lambda x, **options: DRAWN[:, len(now) - 1].to(x.dtype))
    for t in scheduler.timesteps[:evaluations]:
        now.append(t)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(convert(net.guided(scaled, t, COND), x), t, x, **keywords).prev_sample
    monkeypatch.undo()
    return x.double(), net.times


def ours(plan: solvers.Plan):
    """The final state of our plan from START (which the plan is made not to scale), with noise by evaluation."""
    net = Net()
    drawn = [DRAWN[:, i] for i, stage in enumerate(plan.stages) if stage.noise]
    x = solvers.sample(net, plan, torch.stack([START, *drawn], 1), COND)
    return x, net.times


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all() and torch.isfinite(expected).all()
    return float((found - expected).abs().max() / expected.abs().max())


def times_of(schedule: schedules.Schedule, sigmas) -> list[float]:
    """Schedule times of a scheduler's sigmas (sigma/alpha; flow's own sigma on the flow schedule), each once."""
    values = list(dict.fromkeys(float(sigma) for sigma in sigmas))
    if schedule.name == "flow":
        return values
    return [
        min(float(schedule.time_of_ratio(value)), schedule.last_time) if value > 0 else schedule.t_clean
        for value in values
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    scheduler: str
    solver: str
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "eps"
    exploding: bool = False  # whether the scheduler's state is x/alpha
    tolerance: float = 1e-5
    steps: tuple[int, ...] = STEPS
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        made = " ".join(f"{key}={value}" for key, value in self.made.items())
        return f"{self.scheduler} {made} {self.kind} {self.keywords or ''}"


def multistep(algorithm: str, order: int, solver: str, kind: str = "eps", options=None, **made) -> Case:
    made = {"algorithm_type": algorithm, "solver_order": order, **made}
    options = {"lower_order_final": True, **(options or {})}
    return Case("DPMSolverMultistepScheduler", solver, made, options, kind, tolerance=2e-5 if order == 3 else 1e-5)


def constant(tau: float) -> Callable:
    return lambda t: torch.tensor(tau)


SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
KARRAS = {"use_karras_sigmas": True}
HALF = {"curvature": "half_weight"}
CASES = [
    *(
        Case("EulerDiscreteScheduler", "euler", {"timestep_spacing": spacing}, kind=kind, exploding=True)
        for spacing in ("linspace", "leading", "trailing")
        for kind in ("eps", "v", "x0")
    ),
    *(
        Case("EulerDiscreteScheduler", "euler", {sigmas: True}, exploding=True)
        for sigmas in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    ),
    Case(
        "EulerDiscreteScheduler",
        "euler",
        KARRAS,
        {"churn": 4.0, "churn_low": 0.05, "churn_high": 10.0, "churn_noise": 1.003, "late_churn": True},
        exploding=True,
        keywords={"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.003},
    ),
    *(Case("EulerAncestralDiscreteScheduler", "euler_a", kind=kind, exploding=True) for kind in ("eps", "v")),
    *(
        Case("HeunDiscreteScheduler", "heun", made, kind=kind, exploding=True)
        for made, kind in (({}, "eps"), (KARRAS, "v"))
    ),
    *(
        Case("KDPM2DiscreteScheduler", "dpm2", made, kind=kind, exploding=True)
        for made, kind in (({}, "eps"), (KARRAS, "v"))
    ),
    # its sigma_down^2 = sigma'^2 - sigma_up^2 cancels in float32
    Case("KDPM2AncestralDiscreteScheduler", "dpm2", KARRAS, {"eta": 1.0}, exploding=True, tolerance=2e-4),
    *(
        Case("LMSDiscreteScheduler", "deis", made, {"order": 4, "coordinate": "rho"}, kind, exploding=True)
        for made, kind in (({}, "eps"), (KARRAS, "v"))
    ),
    # DPM-Solver++ multistep
    *(multistep("dpmsolver++", 1, "dpmpp_2m", kind) for kind in ("eps", "x0", "v")),
    *(multistep("dpmsolver++", 2, "dpmpp_2m", kind) for kind in ("eps", "x0", "v")),
    *(multistep("dpmsolver++", 3, "dpmpp_3m", kind, HALF) for kind in ("eps", "x0", "v")),
    multistep("dpmsolver++", 2, "dpmpp_2m", options={"variant": "exact"}, solver_type="heun"),
    multistep("dpmsolver++", 2, "dpmpp_2m", **KARRAS),
    multistep("dpmsolver++", 2, "dpmpp_2m", use_lu_lambdas=True),
    multistep("dpmsolver++", 2, "dpmpp_2m", **SIGMA_MIN),
    multistep("dpmsolver++", 3, "dpmpp_3m", options=HALF, **SIGMA_MIN),
    multistep("dpmsolver++", 3, "dpmpp_3m", options={**HALF, "slope": "exact"}, solver_type="heun"),
    multistep("dpmsolver++", 3, "dpmpp_3m", options={**HALF, "lower_order_final": False}, lower_order_final=False),
    multistep("dpmsolver++", 2, "dpmpp_2m", options={"euler_at_final": True}, euler_at_final=True, **SIGMA_MIN),
    *(multistep("dpmsolver++", order, "dpmpp_2m", "flow", use_flow_sigmas=True, flow_shift=3.0) for order in (1, 2)),
    multistep("dpmsolver++", 3, "dpmpp_3m", "flow", HALF, use_flow_sigmas=True, flow_shift=3.0),
    # the noise form
    *(
        multistep("dpmsolver", order, "exponential", kind, {"form": "eps", "slope": "midpoint", **HALF}, **SIGMA_MIN)
        for order in (1, 2, 3)
        for kind in ("eps", "v")
    ),
    # the SDE
    *(multistep("sde-dpmsolver++", order, "dpmpp_2m_sde", kind) for order in (1, 2) for kind in ("eps", "v")),
    multistep("sde-dpmsolver++", 2, "dpmpp_2m_sde", options={"slope": "exact"}, solver_type="heun"),
    multistep("sde-dpmsolver++", 3, "dpmpp_3m_sde", options={"curvature": "wrong_sign"}),
    # singlestep: the grid's times are the inner nodes
    *(
        Case(
            "DPMSolverSinglestepScheduler",
            solver,
            {
                "solver_order": order,
                "solver_type": kind,
                "algorithm_type": algorithm,
                "lower_order_final": lower,
                **final,
            },
            {
                "inner": "grid",
                "lower_order_final": lower,
                "variant": {"midpoint": "midpoint", "heun": "taylor"}[kind],
                **extra,
            },
            steps=(1, 2, 3, 10, 11, 12, 24) if lower else (12, 24),
            tolerance=2e-5,
        )
        for order, solver, algorithm, lower, final, extra in (
            (2, "dpmpp_2s", "dpmsolver++", True, {}, {}),
            (3, "dpmpp_3s", "dpmsolver++", True, {}, {}),
            (2, "dpmpp_2s", "dpmsolver++", True, SIGMA_MIN, {}),
            (3, "dpmpp_3s", "dpmsolver++", True, SIGMA_MIN, {}),
            (2, "dpmpp_2s", "dpmsolver++", False, SIGMA_MIN, {}),
            (3, "dpmpp_3s", "dpmsolver++", False, SIGMA_MIN, {}),
            (2, "dpm_solver", "dpmsolver", True, SIGMA_MIN, {"order": 2}),
            (3, "dpm_solver", "dpmsolver", True, SIGMA_MIN, {"order": 3}),
            (2, "dpmpp_2s", "sde-dpmsolver++", True, SIGMA_MIN, {"strength": 1.0}),
        )
        for kind in ("midpoint", "heun")
    ),
    # UniPC
    *(
        Case(
            "UniPCMultistepScheduler",
            "unipc",
            {"solver_order": order, "solver_type": variant, **final},
            {"order": order, "variant": variant, "lower_order_final": True},
            kind,
            tolerance=5e-5 if order == 3 else 1e-5,
        )
        for order in (1, 2, 3)
        for variant, final, kind in (
            ("bh2", {}, "eps"),
            ("bh2", SIGMA_MIN, "v"),
            ("bh1", SIGMA_MIN, "eps"),
            ("bh2", KARRAS, "x0"),
            ("bh2", {"use_flow_sigmas": True, "flow_shift": 3.0}, "flow"),
        )
    ),
    Case(
        "UniPCMultistepScheduler",
        "unipc",
        {"solver_order": 2, "disable_corrector": [0, 2]},
        {"order": 2, "disable_corrector": [0, 2], "lower_order_final": True},
        steps=(10, 24),
    ),
    Case(
        "UniPCMultistepScheduler",
        "unipc",
        {"solver_order": 3, "lower_order_final": False, **SIGMA_MIN},
        {"order": 3},
        tolerance=5e-5,
    ),
    Case(
        "UniPCMultistepScheduler",
        "unipc",
        {"solver_order": 2, "predict_x0": False, **SIGMA_MIN},
        {"order": 2, "form": "eps", "lower_order_final": True},
    ),
    # DEIS ends at sigma_min
    *(
        Case(
            "DEISMultistepScheduler",
            "deis",
            {"solver_order": order, "lower_order_final": lower},
            {"order": order, "coordinate": "log_rho", "lower_order_final": lower},
            kind,
            tolerance=5e-5 if order == 3 else 1e-5,
        )
        for order in (1, 2, 3)
        for kind in ("eps", "v", "x0")
        for lower in (True, False)
    ),
    # SA-Solver: integrals in absolute lambda in float32
    *(
        Case(
            "SASolverScheduler",
            "sa",
            {"predictor_order": p, "corrector_order": c, "tau_func": constant(tau)},
            {"predictor": p, "corrector": c, "strength": tau, "lower_order_final": True},
            kind,
            tolerance=2e-4 if p == 3 else 1e-5,
            steps=(2, 3, 10, 24),
        )
        for p, c in ((1, 1), (2, 1), (2, 2), (3, 3), (3, 4))
        for tau, kind in ((0.0, "eps"), (1.0, "eps"), (0.5, "v"))
    ),
    # EDM's own
    Case("EDMEulerScheduler", "euler", kind="edm"),
    Case(
        "EDMEulerScheduler",
        "euler",
        {},
        {"churn": 4.0, "churn_low": 0.05, "churn_high": 50.0, "churn_noise": 1.003, "late_churn": True},
        "edm",
        keywords={"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
    ),
    Case("EDMDPMSolverMultistepScheduler", "dpmpp_2m", {"solver_order": 2}, {"lower_order_final": True}, "edm"),
    Case("EDMDPMSolverMultistepScheduler", "dpmpp_3m", {"solver_order": 3}, {"lower_order_final": True, **HALF}, "edm"),
    Case(
        "EDMDPMSolverMultistepScheduler",
        "dpmpp_2m_sde",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        {"lower_order_final": True},
        "edm",
    ),
    # flow matching
    *(
        Case("FlowMatchEulerDiscreteScheduler", solver, {"shift": shift, **made}, kind="flow")
        for shift in (1.0, 3.0)
        for solver, made in (("euler", {}), ("consistency", {"stochastic_sampling": True}))
    ),
    *(Case("FlowMatchHeunDiscreteScheduler", "heun", {"shift": shift}, kind="flow") for shift in (1.0, 3.0)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_final_state_is_diffusers(case, monkeypatch):
    on_flow = case.kind == "flow"
    schedule = schedules.get("edm" if case.kind == "edm" else "flow" if on_flow else "sd")
    made = dict(case.made)
    if case.kind != "edm" and not case.scheduler.startswith("FlowMatch"):
        made = {**SD, "prediction_type": NAMES[case.kind], **made}
    for steps in case.steps:
        if case.options.get("order") and case.options["order"] > steps:
            continue
        scheduler = getattr(diffusers, case.scheduler)(**made)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        grid = times_of(schedule, scheduler.sigmas)
        evaluations = len(scheduler.timesteps)
        order = {"order": 1} if made.get("solver_order") == 1 and case.solver.startswith("dpmpp") else {}
        if case.solver == "exponential":
            order = {"order": min(made["solver_order"], len(grid) - 1)}
        plan = solvers.plan(
            case.solver,
            schedule,
            len(grid) - 1,
            grid=grid,
            prediction=Prediction(case.kind),
            guidance=GUIDANCE,
            initial_scale=1.0,
            **{**case.options, **order},
        )
        assert plan.evaluations == evaluations
        first, last = (schedule.alpha(t) if case.exploding else 1.0 for t in (grid[0], grid[-1]))
        expected, told = theirs(scheduler, START / first, monkeypatch, **case.keywords)
        found, ours_told = ours(plan)
        error = apart(found, expected * last)
        assert error < case.tolerance, (steps, error)
        if schedule.name == "sd":
            # diffusers rounds or truncates the times of grids laid in sigma to whole indices
            assert all(abs(a - b) < 1.0 + 1e-3 for a, b in zip(told, ours_told))


def tabled(name: str, **made):
    """A scheduler that reads its table of alphas, with that table in float64."""
    scheduler = getattr(diffusers, name)(**{**SD, **made})
    schedule = schedules.get("sd")
    alphas = torch.tensor([schedule.alpha(float(t)) ** 2 for t in range(1000)], dtype=torch.float64)
    scheduler.alphas_cumprod = alphas
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = alphas[0] if not made.get("set_alpha_to_one", True) else scheduler.one
    return scheduler


def compare(plan, scheduler, monkeypatch, tolerance=1e-9, **keywords) -> None:
    expected, told = theirs(scheduler, START, monkeypatch, **keywords)
    found, ours_told = ours(plan)
    assert apart(found, expected) < tolerance, apart(found, expected)
    assert ours_told == told


def planned(solver: str, steps: int, grid, kind: str, **options) -> solvers.Plan:
    schedule = schedules.get("sd")
    return solvers.plan(
        solver, schedule, steps, grid=grid, prediction=kind, guidance=GUIDANCE, initial_scale=1.0, **options
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim(kind, eta, to_one, monkeypatch):
    for steps in (1, 2, 10, 50):
        for spacing in ("leading", "trailing"):
            scheduler = tabled(
                "DDIMScheduler",
                prediction_type=NAMES[kind],
                clip_sample=False,
                set_alpha_to_one=to_one,
                timestep_spacing=spacing,
                steps_offset=1,
            )
            scheduler.set_timesteps(steps)
            grid = {"name": spacing, **({} if to_one else {"end": 0.0})}
            compare(planned("ddim", steps, grid, kind, eta=eta), scheduler, monkeypatch, eta=eta)


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 12), ("leading", 7)])
def test_ddims_target_is_a_stride_away_and_not_the_next_time(spacing, steps, monkeypatch):
    scheduler = tabled("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = [*(float(t) for t in scheduler.timesteps), -1.0]
    compare(planned("ddim", steps, grid, "eps", stride=1000 // steps), scheduler, monkeypatch)
    if spacing != "leading":
        plain, _ = ours(planned("ddim", steps, grid, "eps"))
        assert apart(plain, theirs(scheduler, START, monkeypatch)[0]) > 1e-3


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_ddpm(variance, kind, monkeypatch):
    for steps in (1, 10, 50):
        made = {"prediction_type": NAMES[kind], "clip_sample": False, "variance_type": variance}
        scheduler = tabled("DDPMScheduler", **made)
        scheduler.set_timesteps(steps)
        grid = {"name": "leading", "offset": 0}
        compare(planned("ddpm", steps, grid, kind, variance=variance), scheduler, monkeypatch)
        # its last step draws noise wherever its time is above 0: an option here, and no small noise at sigma = 0
        scheduler = tabled("DDPMScheduler", timestep_spacing="trailing", **made)
        scheduler.set_timesteps(steps)
        compare(
            planned("ddpm", steps, "trailing", kind, variance=variance, final_noise=True),
            scheduler,
            monkeypatch,
            tolerance=1e-5 if variance == "fixed_large" else 1e-9,
        ) if steps > 1 else None


@pytest.mark.parametrize("skip", [True, False])
def test_pndm(skip, monkeypatch):
    for steps in (4, 10, 50):
        scheduler = tabled("PNDMScheduler", skip_prk_steps=skip, steps_offset=1, set_alpha_to_one=False)
        scheduler.set_timesteps(steps)
        plan = planned("plms" if skip else "pndm", steps, {"name": "leading", "end": 0.0}, "eps")
        compare(plan, scheduler, monkeypatch)


def test_ipndm(monkeypatch):
    """Its schedule is TrigFlow's angle and its network a velocity; from alpha = 0 it would lose the first answer."""
    schedule = schedules.get("trigflow", sigma_data=1.0)
    for steps in (1, 2, 3, 10):
        levels = [0.999 * (1 - i / steps) for i in range(steps)] + [0.0]
        scheduler = diffusers.IPNDMScheduler(trained_betas=levels)
        scheduler.set_timesteps(steps)
        grid = [float(torch.tensor(level, dtype=torch.float64).asin()) for level in scheduler.betas]
        plan = solvers.plan("ipndm", schedule, steps, grid=grid, prediction="v", guidance=GUIDANCE, initial_scale=1.0)
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < 1e-5  # its alpha = sqrt(1 - beta^2) is float32


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_lcm(kind, monkeypatch):
    for steps in (1, 2, 4, 8):
        scheduler = tabled("LCMScheduler", prediction_type=NAMES[kind])
        scheduler.set_timesteps(steps)
        compare(planned("lcm", steps, None, kind, timestep_scaling=10.0), scheduler, monkeypatch, tolerance=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_tcd(kind, eta, monkeypatch):
    for steps in (1, 2, 4, 8):
        scheduler = tabled("TCDScheduler", prediction_type=NAMES[kind])
        scheduler.set_timesteps(steps)
        plan = planned("tcd", steps, {"name": "lcm", "end": 0.0}, kind, eta=eta)
        compare(plan, scheduler, monkeypatch, tolerance=1e-7, eta=eta)


def test_consistency_models(monkeypatch):
    schedule, kind = schedules.get("edm"), Prediction("edm", boundary=0.002)
    for steps in (1, 2, 4):
        scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
        scheduler.set_timesteps(steps)
        levels = [min(float(sigma), 80.0) for sigma in scheduler.sigmas[:steps]]
        plan = solvers.plan(
            "consistency",
            schedule,
            steps,
            grid=[*levels, 0.0],
            prediction=kind,
            guidance=GUIDANCE,
            initial_scale=1.0,
        )
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < 1e-5


def test_trigflow_consistency(monkeypatch):
    schedule = schedules.get("trigflow")
    for steps in (1, 2, 4):
        scheduler = diffusers.SCMScheduler(sigma_data=0.5)
        middle = {} if steps == 2 else {"intermediate_timesteps": None}
        scheduler.set_timesteps(steps, max_timesteps=1.56, **middle)
        grid = [float(t) for t in scheduler.timesteps]
        plan = solvers.plan(
            "consistency", schedule, steps, grid=grid, prediction="edm", guidance=GUIDANCE, initial_scale=1.0
        )
        # it expects the paper's F, of the other sign, times sigma_data, and scales no input
        scheduler.scale_model_input = lambda x, t: x / 0.5
        expected, _ = theirs(scheduler, START, monkeypatch, convert=lambda out, x: -0.5 * out, evaluations=steps)
        assert apart(ours(plan)[0], expected) < 1e-5


def test_the_published_third_order_rows_are_not_the_right_ones(monkeypatch):
    """What the options are for: the defaults differ from diffusers by far more than any tolerance here."""
    for made, solver, least in (
        ({"algorithm_type": "dpmsolver++"}, "dpmpp_3m", 1e-3),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp_3m_sde", 0.1),
    ):
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=3, **made)
        scheduler.set_timesteps(10)
        grid = times_of(schedules.get("sd"), scheduler.sigmas)
        plan = planned(solver, 10, grid, "eps", lower_order_final=True)
        assert apart(ours(plan)[0], theirs(scheduler, START, monkeypatch)[0]) > least


def test_bh1_to_sigma_zero_is_a_number_here(monkeypatch):
    scheduler = diffusers.UniPCMultistepScheduler(**SD, solver_type="bh1")
    scheduler.set_timesteps(6)
    grid = times_of(schedules.get("sd"), scheduler.sigmas)
    assert not torch.isfinite(theirs(scheduler, START, monkeypatch)[0]).all()
    assert torch.isfinite(ours(planned("unipc", 6, grid, "eps", variant="bh1"))[0]).all()


def ratios(grid, name: str, steps: int) -> list[float]:
    """sigma/alpha at a grid's times."""
    schedule = schedules.get(name)
    return [schedule.ratio(t) for t in solvers.grids.times(grid, schedule, steps)]


@pytest.mark.parametrize("steps", [2, 7, 10, 50])
def test_stable_diffusions_spacings_are_its_schedulers(steps):
    sd = schedules.get("sd")
    for scheduler, grid, made in (
        ("EulerDiscreteScheduler", "linspace", {"timestep_spacing": "linspace"}),
        ("DDIMScheduler", "trailing", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", "leading", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"name": "leading", "offset": 0}, {"timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"name": "linspace", "drop_last": True}, {"timestep_spacing": "linspace"}),
        ("LCMScheduler", "lcm", {}),
    ):
        theirs = getattr(diffusers, scheduler)(**SD, **made)
        theirs.set_timesteps(steps)
        ours = solvers.grids.times(grid, sd, steps)
        assert ours == pytest.approx([*(float(t) for t in theirs.timesteps), -1.0], rel=1e-6)


@pytest.mark.parametrize("steps", [2, 7, 10, 50])
@pytest.mark.parametrize(
    ("grid", "switch"),
    [
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ({"name": "beta", "coordinate": "ratio"}, "use_beta_sigmas"),
    ],
)
def test_grids_laid_in_sigma_are_its_schedulers(steps, grid, switch):
    theirs = diffusers.EulerDiscreteScheduler(**SD, **{switch: True})
    theirs.set_timesteps(steps)
    # theirs ends at sqrt(1 - alphas_cumprod[0]) in float32: 6e-8 of 8.5e-4
    assert ratios(grid, "sd", steps) == pytest.approx([float(sigma) for sigma in theirs.sigmas], rel=5e-5)


def test_align_your_steps_are_its_tables():
    from diffusers.schedulers import AysSchedules

    for name, table in (("sd", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("edm", "StableDiffusionVideo")):
        grid = {"name": "align_your_steps"} if name != "edm" else {"name": "align_your_steps", "model": "svd"}
        schedule = schedules.get(name, t_max=700.0) if name == "edm" else schedules.get(name)
        found = [schedule.ratio(t) for t in solvers.grids.times(grid, schedule, 10)]
        assert found == pytest.approx(AysSchedules[f"{table}Sigmas"], rel=1e-4)
        if name != "edm":  # the published indices are those levels, rounded
            told = solvers.grids.times(grid, schedule, 10)[:-1]
            assert all(abs(a - b) < 1.0 for a, b in zip(told, AysSchedules[f"{table}Timesteps"]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_flow_times_are_its_sigmas(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    schedule = schedules.get("flow", shift=shift)
    found = [schedule.sigma(t) for t in solvers.grids.times("uniform", schedule, 8)]
    assert found == pytest.approx([float(sigma) for sigma in theirs.sigmas], rel=1e-6)

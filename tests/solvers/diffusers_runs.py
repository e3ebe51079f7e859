"""How the tests against diffusers run a scheduler and a plan: one random network, one start, one noise.

The network is nonlinear, with weights of its own for every evaluation and every condition, guided with w = 4. Both
sides see the same noise, drawn per evaluation. Schedulers are handed their tables in float64; those that round inside
to float32 set the tolerances.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.schedules import Schedule

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

SIZE, GUIDANCE = 16, 4.0
STEPS = (1, 2, 3, 5, 10, 20, 50)
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


def cogvideos_final_state(scheduler, monkeypatch):
    """`theirs` for CogVideoXDPMScheduler, whose step takes the last clean estimate and its time."""
    net, x, old, before = Net(), START, None, None
    with monkeypatch.context() as patch:
        for number, t in enumerate(scheduler.timesteps):
            drawn = DRAWN[:, number]
            patch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, drawn=drawn, **__: drawn)
            x, old = scheduler.step(net.guided(x, t, COND), old, t, before, x)
            before = t
    return x, net.times


def ours(plan: solvers.Plan):
    """The final state of our plan from START (which the plan is made not to scale), with noise by evaluation."""
    net = Net()
    drawn = [DRAWN[:, i] for i, stage in enumerate(plan.stages) if stage.noise]
    x = solvers.sample(net, plan, torch.stack([START, *drawn], 1), COND)
    return x, net.times


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all() and torch.isfinite(expected).all()
    return float((found - expected).abs().max() / expected.abs().max())


def drawing_brownian(module: str, name: str):
    """A scheduler's class that draws from torchsde's Brownian tree, which tests replace: torchsde need not be there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{module}"), name)


def times_of(schedule: schedules.Schedule, sigmas) -> list[float]:
    """Schedule times of a scheduler's sigmas (sigma/alpha; flow's own sigma on the flow schedule), each once."""
    values = list(dict.fromkeys(float(sigma) for sigma in sigmas))
    if schedule.name == "flow":
        return values
    return [
        min(float(schedule.time_of_ratio(value)), schedule.last_time) if value > 0 else schedule.t_clean
        for value in values
    ]


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


def planned(solver: str, steps: int, grid, kind, schedule: Schedule | None = None, **options) -> solvers.Plan:
    """Guided, and from noise of std 1 as diffusers starts; on Stable Diffusion's schedule if none is given."""
    schedule = schedule or schedules.get("sd")
    return solvers.plan(
        solver, schedule, steps, grid=grid, prediction=kind, guidance=GUIDANCE, initial_scale=1.0, **options
    )

"""What guidance, bounds and shaped noise cost a run: memory after the first, looks at the device, breaks of the graph.

tests/solvers/test_executor.py has the same for every solver without them.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import solvers
from fewstep.diffusion import schedules

VP = schedules.get("vp")
STEPS, BATCH, SHAPE = 4, 4, (2, 32, 32)
NOISE = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
COND = torch.tensor([0.4, -0.7, 1.0, 0.2])
PICTURES = NOISE.nbytes
THRESHOLD = {"threshold": {"quantile": 0.9, "most": 2.0}}

# options of a plan -> pictures' worth of memory that parts take in a run: bounds and shaped noise, one a stage
PLANS = {
    "cfg": ({"guidance": 3.0}, 0),
    "interval": ({"guidance": {"name": "interval", "scale": 3.0, "start": 1, "stop": 3}}, 0),
    "cfg++": ({"guidance": {"name": "cfg++", "scale": 0.6}}, 0),
    "rescale": ({"guidance": {"name": "rescale", "scale": 3.0}}, 0),
    "apg": ({"guidance": {"name": "apg", "scale": 3.0, "radius": 20.0, "momentum": -0.5}}, 0),
    "zero star": ({"guidance": {"name": "cfg_zero_star", "scale": 3.0}}, 0),
    "mambo_g": ({"guidance": {"name": "mambo_g", "scale": 3.0}}, 0),
    "tcfg": ({"guidance": {"name": "tcfg", "scale": 3.0}}, 0),
    "perp_neg": ({"guidance": {"name": "perp_neg", "scale": 3.0, "weights_of": [0.5, 0.2]}}, 0),
    "autoguidance": ({"guidance": {"name": "autoguidance", "scale": 2.0}}, 0),
    "perturbed": ({"guidance": {"name": "perturbed", "scale": 2.0}}, 0),
    "classifier": ({"guidance": {"name": "classifier", "scale": 0.5}}, 0),
    "clip": ({"clip": 1.0}, STEPS),
    "threshold": (THRESHOLD, STEPS),
    "apg and threshold": ({"guidance": {"name": "apg", "scale": 3.0}, **THRESHOLD}, STEPS),
    # all stages but the last: noise, its standard deviation, their product
    "learned_range": ({"solver": "ddpm", "variance": "learned_range"}, 3 * (STEPS - 1)),
}


class Net(torch.nn.Module):
    """Answers from memory it owns, so that every allocation seen is the executor's."""

    def __init__(self, several: int = 1) -> None:
        super().__init__()
        self.several, self.kept = several, {}

    def forward(self, x, t, cond=None):
        if len(x) not in self.kept:
            self.kept[len(x)] = torch.sin(torch.cat([x] * self.several, 1))
        return self.kept[len(x)]


def run(name: str, net, steps: int = STEPS):
    options = {"solver": "ddim", "prediction": "v", **PLANS[name][0]}
    plan = solvers.plan(options.pop("solver"), VP, steps, **options)
    others = dict.fromkeys(plan.roles, Net() if isinstance(net, Net) else net)
    negatives = [0.1 * COND, -COND][: max(0, max(len(stage.conditions) for stage in plan.stages) - 2)]
    given = {"uncond": 0 * COND, "others": others, "negatives": negatives}
    seeds = torch.arange(BATCH) if plan.stochastic_stages else None
    return lambda noise, cond: solvers.sample(net, plan, noise, cond, seeds=seeds, **given)


def allocated(call) -> int:
    """Bytes in blocks of a picture's size and above that torch's allocator hands out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    assert result is not None
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() >= PICTURES // BATCH)


@pytest.mark.parametrize("name", PLANS)
def test_after_the_first_run_only_the_result_and_what_parts_take_is_allocated(name):
    sample = run(name, Net(2 if name == "learned_range" else 1))
    first = sample(NOISE, COND).clone()
    found = []
    bytes_taken = allocated(lambda: found.append(sample(NOISE, COND)) or found)
    assert torch.equal(found[0], first)
    assert bytes_taken <= (1 + PLANS[name][1]) * PICTURES


class Operators(TorchDispatchMode):
    """The operators torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


def several(x, t, cond=None):
    told = t if cond is None else t + cond
    return torch.tanh(torch.cat([x, 0.5 * x.flip(1)], 1) + told[:, None, None, None])


def single(x, t, cond=None):
    return several(x, t, cond)[:, : x.shape[1]]


def network(name: str):
    return several if name == "learned_range" else single


@pytest.mark.parametrize("name", PLANS)
def test_no_run_reads_from_the_device(name):
    sample = run(name, network(name))
    sample(NOISE, COND)
    with Operators() as operators:
        sample(NOISE, COND)
    assert len(operators.names) > STEPS
    reads = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
    assert not reads & {*operators.names}


@pytest.mark.parametrize("name", ["interval", "cfg++", "apg and threshold", "learned_range"])
def test_a_compiled_run_is_one_graph_with_the_same_numbers(name):
    sample = run(name, network(name), steps=2)
    expected = sample(NOISE, COND)
    torch.compiler.reset()
    found = torch.compile(sample, fullgraph=True, backend="eager")(NOISE, COND)
    # float32, sums in another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

"""Time grids searched by dynamic programming: of all ways from the first node to the last, the one of least cost.

Nodes are times, falling; a cost matrix holds at [i, j] what one step from node i to node j costs (i < j). Costs for
- following a teacher's trajectory, `trajectory_costs`: GITS, Chen et al. 2024, 2405.11326;
- the variational bound, `bound_costs`: Watson et al. 2021, 2106.03802;
- the bound at the optimal variance, `optimal_variance_costs`: Analytic-DPM, Bao et al. 2022, 2201.06503.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import real
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import registry, rows
from fewstep.solvers.executor import execute, sample
from fewstep.solvers.grids import is_clean

METRICS = ("dev", "l1", "l2")


@dataclasses.dataclass(frozen=True)
class Path:
    """Node indices from first to last, and what the way costs."""

    nodes: tuple[int, ...]
    cost: float


def search(costs: Any, most: int | None = None, growth: float = 1.0) -> dict[int, Path]:
    """The cheapest way of every number of steps 1..most (default: all) from node 0 to the last: O(most T^2) in all.

    costs: [T + 1, T + 1]; entries with i < j are read, infinite ones are never taken. What follows a step counts
    `growth` times as much (GITS' c, 1.15: 2405.11326, eq. 13): cost(path) = c_01 + growth (c_12 + growth (...)).
    Numbers of steps that no finite path has are left out.
    """
    table = torch.as_tensor(costs, dtype=torch.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        raise UserError(f"a cost matrix has shape [T + 1, T + 1] with T >= 1; got {list(table.shape)}.")
    last = len(table) - 1
    forward = torch.ones_like(table).triu(1).bool()
    if bool(table[forward].isnan().any()) or bool((table[forward] == -math.inf).any()):
        raise UserError("a cost matrix holds numbers or inf above its diagonal; this one holds nan or -inf.")
    most = last if most is None else most
    if not 1 <= most <= last:
        raise UserError(f"between {last + 1} nodes there are 1 to {last} steps; got {most}.")
    if not growth > 0:
        raise UserError(f"growth is {growth!r}; give a number above 0 (GITS takes 1.15, 1 is a plain sum).")
    table = table.masked_fill(~forward, math.inf)

    remaining = torch.full((last + 1,), math.inf, dtype=torch.float64)  # least cost from each node to the last
    remaining[last] = 0.0
    following: list[Tensor] = []  # [k - 1][i]: the node after i on the cheapest way of k steps
    found: dict[int, Path] = {}
    for steps in range(1, most + 1):
        remaining, after = (table + growth * remaining).min(dim=1)
        following.append(after)
        if math.isfinite(remaining[0]):
            nodes = [0]
            for chosen in reversed(following):
                nodes.append(int(chosen[nodes[-1]]))
            found[steps] = Path(tuple(nodes), float(remaining[0]))
    return found


def path_cost(costs: Any, nodes: Sequence[int], growth: float = 1.0) -> float:
    """What `search` charges for a given way: for comparing other grids with the searched one."""
    table = torch.as_tensor(costs, dtype=torch.float64)
    total = 0.0
    for a, b in reversed(list(itertools.pairwise(nodes))):
        total = float(table[a, b]) + growth * total
    return total


def trajectory_costs(
    denoiser: Any,
    noise: Tensor,
    times: Sequence[float],
    *,
    metric: str = "dev",
    solver: str = "dpmpp_2m",
    cond: Any = None,
    uncond: Any = None,
    guidance: float | None = None,
) -> Tensor:
    """[T + 1, T + 1] in float64: how far one Euler step from the teacher's state at node i lands from its state at j.

    noise: standard normal [B, ...]; the teacher walks over all nodes `times` by `solver` (one evaluation a step).
    metric: "l1" or "l2" norm of the difference, or "dev": how much further than the teacher the step is from the chord
    between the trajectory's ends (2405.11326, section 4; the default there). States are x/alpha, on the flow schedule
    x/(alpha + sigma), as the trapezoid of Heun's method takes them. Means over samples: batches of one size average.
    """
    if metric not in METRICS:
        raise choose("metric", metric, METRICS)
    schedule = denoiser.schedule
    plan = registry.plan(
        solver, schedule, len(times) - 1, grid=list(times), prediction=denoiser.prediction, guidance=guidance
    )
    if plan.stochastic_stages or len(plan.stages) != len(times) - 1:
        raise UserError(
            f"solver {solver!r} draws noise or takes more than one evaluation a step; "
            "walk the trajectory by one such as dpmpp_2m, deis or ipndm."
        )
    run = execute(plan, denoiser, noise, cond=cond, uncond=uncond, record=("x", "denoised"))
    states = torch.stack(run.recorded["x"]).double().flatten(2)  # [T + 1, B, D]
    answers = torch.stack(run.recorded["denoised"]).double().flatten(2)  # [T, B, D]
    norms = [_norm(schedule, t) for t in times]
    scales = states.new_tensor([1.0 / norm for norm in norms])[:, None, None]
    costs = torch.full((len(times), len(times)), math.inf, dtype=torch.float64)
    target = states * scales
    if metric == "dev":
        chord = target[-1] - target[0]
        chord = chord / chord.norm(dim=-1, keepdim=True)
        teacher = _from_chord(target, chord)  # [T + 1, B]
    for i, t in enumerate(times[:-1]):
        jumps = states.new_tensor([rows.jump(schedule, t, s) for s in times[i + 1 :]])  # [T - i, 2]
        landed = jumps[:, 0, None, None] * states[i] + jumps[:, 1, None, None] * answers[i]
        landed = landed * scales[i + 1 :]
        if metric == "dev":
            error = _from_chord(landed, chord, target[-1]) - teacher[i + 1 :]
        else:
            error = (landed - target[i + 1 :]).norm(p=1 if metric == "l1" else 2, dim=-1)
        costs[i, i + 1 :] = error.mean(1).cpu()
    return costs


def free_node(
    denoiser: Any,
    noise: Tensor,
    target: Tensor,
    times: Sequence[float],
    path: Path,
    *,
    solver: str = "ddim",
    cond: Any = None,
    uncond: Any = None,
    guidance: float | None = None,
) -> Path:
    """`path` with one more node after its first, which an analytic first step reaches: no further evaluation.

    Of the nodes that the path's first step passes over, the one with which `solver` takes `noise` [B, ...] nearest to
    `target`, as GITS' code does. Sample on it by plan(.., analytic_first_step=True).
    """
    first, second = path.nodes[:2]
    if second - first < 2:
        raise UserError("the path's first step passes over no node, so none can be free; lay more nodes, or take it.")
    prediction, nearest = denoiser.prediction, (math.inf, path.nodes)
    for node in range(first + 1, second):
        nodes = (first, node, *path.nodes[1:])
        grid = [times[n] for n in nodes]
        plan = registry.plan(
            solver,
            denoiser.schedule,
            len(grid) - 1,
            grid=grid,
            prediction=prediction,
            guidance=guidance,
            analytic_first_step=True,
        )
        ended = sample(denoiser, plan, noise, cond, uncond)
        nearest = min(nearest, (float((ended - target).flatten(1).norm(dim=1).mean()), nodes))
    return Path(nearest[1], path.cost)


def _norm(schedule: Schedule, t: float) -> float:
    alpha = float(schedule.alpha(t))
    norm = alpha + float(schedule.sigma(t)) if schedule.name == "flow" else alpha
    if norm < 1e-12:
        raise UserError(
            f"the trajectory starts at t={t!r} of schedule {schedule.name!r}, where there is no signal and x/alpha is "
            "infinite; start the nodes below it."
        )
    return norm


def _from_chord(points: Tensor, chord: Tensor, end: Tensor | None = None) -> Tensor:
    """Distances of points [N, B, D] to the line of direction `chord` [B, D] through `end` (default: the last)."""
    offset = points - (points[-1] if end is None else end)
    return (offset - (offset * chord).sum(-1, keepdim=True) * chord).norm(dim=-1)


def second_moments(
    denoiser: Denoiser,
    samples: Tensor,
    times: Sequence[float],
    *,
    cond: Any = None,
    generator: torch.Generator | None = None,
) -> tuple[list[float], list[float]]:
    """Per number and at each of `times` with sigma > 0: (E|x0 - x0_hat|^2, E|eps_hat|^2), over clean samples [B, ...].

    All that the bounds of a denoising sampler need to know of the model (2106.03802, section 3; 2201.06503, eq. 9).
    At pure noise (alpha = 0) eps_hat is the noise and the second is 1.
    """
    errors, moments = [], []
    with torch.no_grad():
        for t in times:
            noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype, device=samples.device)
            x = denoiser.schedule.add_noise(samples, noise, t)
            answer = denoiser(x, t, cond)
            errors.append(float((samples - answer).double().square().mean()))
            alpha, sigma = float(denoiser.schedule.alpha(t)), float(denoiser.schedule.sigma(t))
            moments.append(float(((x - alpha * answer) / sigma).double().square().mean()))
    return errors, moments


def bound_costs(schedule: Schedule, times: Sequence[float], errors: Sequence[float]) -> Tensor:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of every ancestral step, in nats per number (2106.03802, eq. 5 and 7).

    With the posterior's variance it is (e^{2 lambda_s} - e^{2 lambda_t})/2 E|x0 - x0_hat(x_t)|^2; `errors` are these
    expectations at each node but the last. A last node at sigma = 0 is reached from the node before it, free of charge.
    """
    snr = [real.exp(2.0 * schedule.half_log_snr(t)) for t in times]

    def cost(i: int, j: int) -> float:
        return 0.5 * (snr[j] - snr[i]) * errors[i]

    return _stepwise(schedule, times, cost, len(errors))


def optimal_variance_costs(schedule: Schedule, times: Sequence[float], moments: Sequence[float]) -> Tensor:
    """log(1 - (1 - tau_s^2/tau_t^2) Gamma_t): what a step adds to the bound at the optimal variance, up to terms that
    telescope (2201.06503, eq. 13); `moments` are Gamma_t = E|eps_hat|^2 per number at each node but the last.

    Gamma above 1, which only a poor estimate is, counts as 1: see `segmented`. The last node as in `bound_costs`.
    """
    if real.isinf(schedule.ratio(times[0])):
        raise UserError(
            f"the bound at the optimal variance is not defined from pure noise (t={times[0]!r} of schedule "
            f"{schedule.name!r}); start the nodes below it."
        )
    ratios = [float(schedule.ratio(t)) for t in times]

    def cost(i: int, j: int) -> float:
        kept = (ratios[j] / ratios[i]) ** 2
        return math.log1p(-(1.0 - kept) * min(moments[i], 1.0))

    return _stepwise(schedule, times, cost, len(moments))


def _stepwise(schedule: Schedule, times: Sequence[float], cost: Any, given: int) -> Tensor:
    last = len(times) - 1
    clean = is_clean(schedule, times[last])
    if given != last:
        raise UserError(f"{last + 1} nodes need {last} moments, one for each but the last; got {given}.")
    costs = torch.full((last + 1, last + 1), math.inf, dtype=torch.float64)
    for i in range(last):
        for j in range(i + 1, last + (not clean)):
            costs[i, j] = cost(i, j)
    if clean:
        costs[last - 1, last] = 0.0
    return costs


def segmented(costs: Any, moments: Sequence[float], most: int | None = None) -> dict[int, Path]:
    """`search`, where moments above 1 make the costs of the noisiest nodes meaningless: Analytic-DPM's dp_seg.

    Twice as many nodes as have such moments, or lie above one, are passed in even steps of the index, with a share of
    the steps that is 0.8 of their share of the nodes; the search is left with the rest.
    """
    table = torch.as_tensor(costs, dtype=torch.float64)
    last = len(table) - 1
    poor = max((i + 1 for i, moment in enumerate(moments) if moment > 1.0), default=0)
    cut = min(2 * poor, last - 1)
    if not cut:
        return search(table, most)
    rest = search(table[cut:, cut:])
    found = {}
    for steps in range(2, (last if most is None else most) + 1):
        inside = min(math.ceil((1.0 - 0.8 * cut / last) * steps), last - cut)
        outside = min(max(steps - inside, 1), cut)
        inside = steps - outside
        if inside in rest:
            even = [round(cut * i / outside) for i in range(outside)]
            nodes = (*even, *(cut + node for node in rest[inside].nodes))
            found[steps] = Path(nodes, path_cost(table, nodes))
    return found

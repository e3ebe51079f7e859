"""The sampler that a user holds: an artefact, ready to draw images from seeds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep import artefact as artefacts
from fewstep import solvers
from fewstep.artefact import Artefact
from fewstep.errors import UserError
from fewstep.runtime.given import Takes, described
from fewstep.solvers import Plan
from fewstep.solvers.grids import Grid

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
KEPT_PLANS = 64
TEACHER_SOLVER = "heun"  # where a teacher's artefact records no plan


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Student:
    """A student or teacher from its artefact folder, on `device`; UserError where the folder is damaged or missing."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(device)!r} is not available here; use 'cpu' or check your driver.") from error
    return Student(artefacts.load(path, device))


class Student:
    """Draws images from an artefact. A teacher's artefact samples with any number of steps and guidance scale.

    Each sample's noise is Philox keyed by its own seed, so a seed gives the same image whatever the batch.
    Calls from several threads may overlap: each thread has buffers of its own.
    """

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        self._plans: dict[str, Plan] = {}

    @property
    def denoiser(self) -> Any:
        return self.artefact.denoiser

    @property
    def kind(self) -> str:
        return self.artefact.kind

    @property
    def classes(self) -> int | None:
        return self.artefact.classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.artefact.image_shape

    @property
    def steps_offered(self) -> tuple[int, ...]:
        """The numbers of steps with a recorded plan; a teacher takes any other number too."""
        return tuple(sorted(self.artefact.plans))

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def plan(
        self,
        steps: int | None = None,
        guidance: float | Mapping[str, Any] | None = None,
        grid: Grid | None = None,
        solver: str | None = None,
    ) -> Plan:
        """The plan for `steps` (default: the most that are recorded); built on demand for a teacher.

        guidance: None means what the recorded plan has, 1.0 conditional only; a teacher also takes a form such as
        {"name": "interval", "scale": 2.0}. grid: other times to ask at, as `solvers.plan` takes them. solver: another
        one than a teacher's own.
        """
        recorded = self.artefact.plans
        if steps is None:
            if not recorded:
                raise UserError("this artefact records no plan; say how many steps.")
            steps = max(recorded)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps is {steps!r}, it must be a whole number from 1 to {MOST_STEPS}.")
        form = isinstance(guidance, Mapping)
        if guidance is not None and not form and not (isinstance(guidance, int | float) and abs(guidance) <= 100.0):
            raise UserError(f"guidance is {guidance!r}, it must be a number from -100 to 100.")
        own = recorded[steps].guidance if steps in recorded else None
        kept = steps in recorded and (guidance is None or guidance == (1.0 if own is None else own))
        if kept and grid is None and solver is None:
            return recorded[steps]
        if self.kind != "teacher":
            offered = ", ".join(str(number) for number in self.steps_offered)
            if steps not in recorded:
                raise UserError(f"steps is {steps}, this student was distilled for: {offered}.")
            if not kept:
                raise UserError(
                    f"guidance is {guidance}, but this student has its guidance inside; leave guidance out."
                )
            if solver is not None and solver != recorded[steps].solver:
                raise UserError(f"solver is {solver!r}, but this student has its own; leave solver out.")
        if guidance is not None and guidance != 1.0 and self.classes is None:
            raise UserError(f"guidance is {guidance}, but this teacher knows no classes; leave guidance out.")
        key = repr((steps, guidance, grid, solver))
        plan = self._plans.get(key) or self._build(steps, guidance, grid, solver)
        self._plans[key] = plan
        for oldest in list(self._plans)[:-KEPT_PLANS]:  # a server may be asked for any guidance there is
            self._plans.pop(oldest, None)
        return plan

    def _build(self, steps: int, guidance: Any, grid: Grid | None, solver: str | None) -> Plan:
        """The recorded solver and options (the nearest plan's) with what was asked for in their place."""
        recorded = self.artefact.plans
        pattern = recorded[min(recorded, key=lambda number: (abs(number - steps), number))] if recorded else None
        scale = guidance if pattern is None or isinstance(guidance, Mapping) else pattern.guidance_at(guidance)
        options = dict(pattern.options) if pattern is not None else {}
        if solver is not None and pattern is not None and solver != pattern.solver:
            options = {"grid": options.get("grid")}
        if grid is not None:
            options["grid"] = grid
        elif isinstance(options.get("grid"), list) and options.get("steps") != steps:
            offered = ", ".join(map(str, self.steps_offered))
            raise UserError(
                f"steps is {steps}, but this teacher records its own times, for these steps only: {offered}."
            )
        options.pop("steps", None)
        return solvers.plan(
            solver or (pattern.solver if pattern is not None else TEACHER_SOLVER),
            self.denoiser.schedule,
            steps,
            prediction=self.denoiser.prediction,
            guidance=None if scale == 1.0 else scale,
            **options,
        )

    def noise(self, seeds: Tensor, plan: Plan | None = None) -> Tensor:
        """Standard normal noise of int64 seeds [B]: [B, C, H, W], or [B, 1 + S, C, H, W] for all stages of `plan`."""
        if plan is None:
            return fk.normal(seeds, self.image_shape, stream=0)
        streams = range(1 + plan.stochastic_stages)
        return torch.stack([fk.normal(seeds, self.image_shape, stream=stream) for stream in streams], dim=1)

    def sample(
        self,
        n_or_noise: int | Tensor | None = None,
        cond: int | Sequence[int] | Tensor | None = None,
        steps: int | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        guidance: float | Mapping[str, Any] | None = None,
        grid: Grid | None = None,
        solver: str | None = None,
        others: Mapping[str, Any] | None = None,
        negatives: Sequence[int | Sequence[int] | Tensor] | None = (),
    ) -> Tensor:
        """Draw images [B, C, H, W], about [-1, 1], on the artefact's device.

        n_or_noise: how many, or standard normal noise [B, C, H, W] or [B, 1 + S, C, H, W]; may be left out with seeds.
        cond: a class, one for each image, or None for no condition.
        seeds: int64 [B]; one int means seed, seed + 1, ...; None draws them from torch's generator.
        steps, guidance, grid, solver: see `plan`.
        others: what forms of guidance ask besides (autoguidance a "weak" one), by role: artefacts or networks.
        negatives: for "perp_neg", classes as in cond.
        """
        plan = self.plan(steps, guidance, grid, solver)
        batch, noise = self._start(n_or_noise, seeds, plan)
        chosen = self._seeds(seeds, batch)
        condition = self._condition(cond, batch)
        if condition is None and plan.guidance is not None:
            raise UserError("this plan is guided and needs a class for each image; give cond, or guidance=1.")
        with torch.no_grad():
            start = self.noise(chosen) if noise is None else noise
            stage_seeds = chosen if start.ndim == len(self.image_shape) + 1 else None
            given = (others or {}).items()
            networks = {role: other.denoiser if isinstance(other, Student) else other for role, other in given}
            away = [self._condition(one, batch) for one in (() if negatives is None else negatives)]
            return solvers.sample(
                self.denoiser, plan, start, condition, seeds=stage_seeds, others=networks, negatives=away
            )

    def _start(self, n_or_noise: int | Tensor | None, seeds: Any, plan: Plan) -> tuple[int, Tensor | None]:
        if isinstance(n_or_noise, Tensor):
            noise = self.takes(plan).noise(n_or_noise)
            return noise.shape[0], noise.to(self.device, torch.float32)
        if n_or_noise is None and seeds is not None:
            return (len(list(seeds)) if isinstance(seeds, Iterable) else 1), None
        if isinstance(n_or_noise, bool) or not isinstance(n_or_noise, int) or n_or_noise < 1:
            raise UserError(f"n is {described(n_or_noise)}, it must be a whole number of images from 1.")
        return n_or_noise, None

    def _seeds(self, seeds: int | Sequence[int] | Tensor | None, batch: int) -> Tensor:
        if seeds is None:
            return torch.randint(LARGEST_SEED, (batch,)).to(self.device)
        if isinstance(seeds, Tensor):
            given = seeds.flatten().tolist()
        elif isinstance(seeds, Iterable):
            given = list(seeds)
        else:
            given = list(range(seeds, seeds + batch)) if type(seeds) is int else [seeds] * batch
        for seed in given:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
                raise UserError(f"seed {seed!r} is not a whole number from 0 to 2^63 - 1.")
        if len(given) != batch:
            raise UserError(f"there are {len(given)} seeds for {batch} images; give one seed for each image.")
        return torch.tensor(given, dtype=torch.int64, device=self.device)

    def _condition(self, cond: int | Sequence[int] | Tensor | None, batch: int) -> Tensor | None:
        if cond is None:
            return None
        return self.takes().labels(cond, batch).to(self.device)

    def takes(self, plan: Plan | None = None) -> Takes:
        """What it is sampled from."""
        return Takes(self.image_shape, plan.stochastic_stages if plan else 0, self.classes, seeded=True)

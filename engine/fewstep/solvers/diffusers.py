"""Any plan as a diffusers scheduler: `StableDiffusionXLPipeline(..., scheduler=PlanScheduler(solver="dpmpp_3m"))`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import schedules
from fewstep.diffusion.linear import coefficient_dtype, combine
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import registry
from fewstep.solvers.plans import Plan
from fewstep_kernels import lincomb

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError:
    raise UserError("fewstep.solvers.diffusers needs diffusers; install it with: pip install diffusers") from None

KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow", "edm": "edm"}


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both declare config_name
    """One map a call, from the pipeline's (guided) network output to the next state.

    `solver`, `grid` and `options` are `plan`'s; `schedule` is a schedule as `to_dict` gives it, or None for Stable
    Diffusion's of the betas given (only "scaled_linear"), or "flow" where prediction_type is "flow_prediction". The
    config is plain JSON, saved and loaded by diffusers; `from_config(pipe.scheduler.config, solver=...)` takes over
    betas and prediction type from another scheduler.

    A pipeline may start at any step (image to image, `set_begin_index`): the solver then warms up from there.
    """

    _compatibles: list[str] = []
    order = 1
    config: Any

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        solver: str = "dpmpp_2m",
        grid: Any = None,
        options: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        shift: float = 1.0,
    ) -> None:
        if prediction_type not in KINDS:
            raise choose("prediction_type", prediction_type, KINDS)
        self.prediction = Prediction(KINDS[prediction_type])
        self.schedule = self._made_schedule(schedule)
        self._begin_index: int | None = None
        self._given: tuple[float, ...] | None = None
        self.init_noise_sigma = float(self.schedule.sigma(self.schedule.t_max))
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.plan: Plan | None = None
        lists = [value for value in (grid, *(options or {}).values()) if isinstance(value, (list, tuple))]
        if not lists:  # a wrong solver, grid or option is refused now and not in the middle of a pipeline
            self._compile(1)

    def _made_schedule(self, given: dict[str, Any] | None) -> Schedule:
        if given is not None:
            return schedules.from_dict(given)
        if self.prediction.kind == "flow":
            return schedules.get("flow", shift=self.config.shift)
        if self.prediction.kind == "edm":
            return schedules.get("edm")
        if self.config.beta_schedule != "scaled_linear":
            raise choose("beta_schedule", self.config.beta_schedule, ("scaled_linear",))
        return schedules.get(
            "sd",
            beta_start=self.config.beta_start,
            beta_end=self.config.beta_end,
            train_steps=self.config.num_train_timesteps,
            t_max=self.config.num_train_timesteps - 1,
        )

    def _compile(self, steps: int) -> Plan:
        options, grid = dict(self.config.options or {}), self.config.grid if self._given is None else list(self._given)
        if isinstance(options.get("order"), int):
            options["order"] = min(options["order"], steps)
        return registry.plan(self.config.solver, self.schedule, steps, grid=grid, prediction=self.prediction, **options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Compiles the plan. `timesteps` (as the network is told) or `sigmas` (sigma/alpha; on flow its sigma before
        the shift e^mu) replace the grid; sampling ends clean.
        """
        if mu is not None and self.prediction.kind == "flow":
            self.schedule = schedules.get("flow", shift=math.exp(mu))
        clean = self.schedule.t_clean
        self._given = None
        if timesteps is not None and sigmas is not None:
            raise UserError("set_timesteps got both timesteps and sigmas; give one of them.")
        if sigmas is not None:
            values = [float(sigma) for sigma in sigmas if float(sigma) > 0]
            flow = self.schedule.name == "flow"
            times = values if flow else [float(self.schedule.time_of_ratio(value)) for value in values]
            self._given = (*(min(t, self.schedule.last_time) for t in times), clean)
        elif timesteps is not None:
            scale = self._told_scale()
            told = [float(t) / scale for t in timesteps]
            self._given = (*(float(self.schedule.time_of_network_time(t)) for t in told), clean)
        if self._given is not None:
            num_inference_steps = len(self._given) - 1
        if num_inference_steps is None:
            raise UserError("set_timesteps got no num_inference_steps, timesteps or sigmas; give one of them.")
        self.plan = None
        self.plan = self._compile(num_inference_steps)
        self._steps = num_inference_steps
        self._times = self._given or registry.grid_times(
            self.config.solver, self.schedule, num_inference_steps, self.config.grid
        )
        self.order = -(-self.plan.evaluations // num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.init_noise_sigma = self.plan.initial_scale
        told = [stage.network_time * self._told_scale() for stage in self.plan.stages]
        self.timesteps = torch.tensor(told, dtype=torch.float32, device=device)
        self._begin_index = None
        self._restart()

    def _told_scale(self) -> float:
        """Pipelines of flow models pass 1000 times the network's time."""
        return float(self.config.num_train_timesteps) if self.schedule.name == "flow" else 1.0

    def _restart(self) -> None:
        self._index: int | None = None
        self._running: Plan | None = None
        self._kept: dict[str, Tensor] = {}

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        return self._index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        if self.prediction.kind != "edm":
            return sample
        index = self._position(timestep) if self._index is None else self._index
        return sample * self._planned().stages[index].input_scale

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x of the next evaluation from the network's output at this one; calls come in the order of `timesteps`."""
        plan = self._planned()
        if self._index is None:
            self._index = self._position(timestep)
            self._offset = self._index
            self._running = plan if self._index == 0 else self._rest(self._index)
        assert self._running is not None
        if self._index - self._offset >= len(self._running.stages):
            raise UserError(f"this plan has {plan.evaluations} evaluations; call set_timesteps before another run.")
        stage = self._running.stages[self._index - self._offset]
        known = {**self._kept, "x": sample, "cond": model_output}
        if stage.noise:
            known["noise"] = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        rows = [(name, row) for name, row in zip(stage.outputs, stage.matrix) if name != "input"]
        inputs = [known[name] for name in stage.inputs]
        table = torch.tensor([row for _, row in rows], dtype=coefficient_dtype(*inputs), device=sample.device)
        values = lincomb(inputs, table, dtypes=[sample.dtype] * len(rows))
        found = dict(zip((name for name, _ in rows), values))
        self._index += 1
        x = found.pop("x")
        self._kept.update(found)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _planned(self) -> Plan:
        if self.plan is None:
            raise UserError("this scheduler has no plan yet; call set_timesteps(num_inference_steps) first.")
        return self.plan

    def _position(self, timestep: float | Tensor | None) -> int:
        """Where a run begins: what the pipeline set, or the first evaluation told this time."""
        if self._begin_index is not None:
            return self._begin_index
        if timestep is None:
            return 0
        return int((self.timesteps - float(timestep)).abs().argmin())

    def _rest(self, index: int) -> Plan:
        """The plan of the steps left from evaluation `index`, which must be a step's first."""
        plan = self._planned()
        for done in range(1, self._steps):
            left = self._steps - done
            options = dict(self.config.options or {})
            if isinstance(options.get("order"), int):
                options["order"] = min(options["order"], left)
            options = {
                key: value[-left:] if isinstance(value, list) and len(value) == self._steps else value
                for key, value in options.items()
            }
            rest = registry.plan(
                self.config.solver,
                self.schedule,
                left,
                grid=list(self._times[done:]),
                prediction=self.prediction,
                **options,
            )
            if rest.stages[0].time == plan.stages[index].time:
                return rest
        raise UserError(f"evaluation {index} of this plan is inside a step of {self.config.solver!r}; begin at a step.")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at `timesteps` (as the network is told), one per sample or one for all."""
        told = timesteps.to(device=original_samples.device, dtype=torch.float64) / self._told_scale()
        if self.prediction.kind == "edm":
            times = torch.exp(4.0 * told)
        else:
            times = torch.as_tensor(self.schedule.time_of_network_time(told))
        times = times.reshape(-1).expand(original_samples.shape[0])
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        return combine([original_samples, noise], [[alpha, sigma]])[0].to(original_samples.dtype)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

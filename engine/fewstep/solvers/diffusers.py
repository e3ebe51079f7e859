"""Any plan as a diffusers scheduler: `StableDiffusionXLPipeline(..., scheduler=PlanScheduler(solver="dpmpp_3m"))`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import schedules
from fewstep.diffusion.linear import coefficient_dtype, combine
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import parts, registry
from fewstep.solvers.calls import split
from fewstep.solvers.memory import tracing
from fewstep.solvers.pipelines import bounds, laid_in_sigma, outputs, plan_for, tables
from fewstep.solvers.plans import Plan
from fewstep_kernels import lincomb

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError:
    raise UserError("fewstep.solvers.diffusers needs diffusers; install it with: pip install diffusers") from None

_KEPT_PLANS = 8
KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow", "edm": "edm"}


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both declare config_name
    """One map a call, from the pipeline's (guided) network output to the next state.

    `solver`, `grid` and `options` are `plan`'s; `schedule` is a schedule as `to_dict` gives it, or None for Stable
    Diffusion's of the betas given (only "scaled_linear"), or "flow" where prediction_type is "flow_prediction". The
    config is plain JSON, saved and loaded by diffusers; `from_config(pipe.scheduler.config, solver=...)` takes over
    betas (`rescale_betas_zero_snr` and CogVideoX's `snr_shift_scale` included), prediction type and bounds on clean
    estimates (`thresholding`, `clip_sample`; names and precedence are diffusers') from another scheduler; `threshold`
    and `clip` in `options` stand before those.

    The pipeline asks its one network and guides; so options that ask otherwise (`guidance`, a network in a role of its
    own, a network told where it lands) are refused here. A learned variance is read from the output's second half.

    A pipeline may start at any step (image to image, `set_begin_index`): the solver then warms up from there. Plans and
    their coefficients stay on the device between calls; a step copies nothing there and asks it nothing.
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
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
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
        self._plans: dict[tuple[Any, ...], Plan] = {}
        if not any(isinstance(value, (list, tuple)) for value in (options or {}).values()):
            # a wrong solver, grid or option is refused now and not in the middle of a pipeline
            self._plan_of(len(grid) - 1 if isinstance(grid, (list, tuple)) else 2, grid)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from another's config, what that leaves at its class's defaults included.

        diffusers drops those, so that DDPMScheduler(clip_sample=True by default) would come over without its clipping.
        One with a shift and no betas is of flow matching and its networks predict the flow; EDM's and Stable Audio's
        come with their levels.
        """
        if isinstance(config, Mapping):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            if "shift" in config and not config.keys() & {"beta_start", "prediction_type"}:
                config["prediction_type"] = "flow_prediction"
            if "sigma_schedule" in config:
                config = laid_in_sigma(config)
            if config.get("trained_betas") is not None and kwargs.get("schedule") is None:
                raise UserError(
                    "the config has betas of its own (trained_betas), which no schedule here follows; give one as "
                    f"schedule=.., of {', '.join(schedules.names())}."
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

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
            snr_shift=self.config.snr_shift_scale,
            zero_snr=bool(self.config.rescale_betas_zero_snr),
        )

    def _compile(self, steps: int) -> Plan:
        grid = self.config.grid if self._given is None else list(self._given)
        return self._kept_plan((steps, self._given, self.schedule), lambda: self._plan_of(steps, grid))

    def _plan_of(self, steps: int, grid: Any, options: dict[str, Any] | None = None) -> Plan:
        options = dict(self.config.options or {}) if options is None else options
        options = {**bounds(self.config), **options}
        if isinstance(options.get("order"), int):
            options["order"] = min(options["order"], steps)
        return plan_for(self.config.solver, self.schedule, steps, grid=grid, prediction=self.prediction, **options)

    def _kept_plan(self, key: tuple[Any, ...], make: Callable[[], Plan]) -> Plan:
        """The plan of this key, the last eight of which are kept for the pipeline's next calls."""
        if key not in self._plans:
            made = make()
            for oldest in list(self._plans)[: max(0, len(self._plans) + 1 - _KEPT_PLANS)]:
                self._plans.pop(oldest)
            self._plans[key] = made
        return self._plans[key]

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
        if device is not None:
            tables(self.plan, torch.device(device), torch.float32)

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
        """x of the next evaluation from the network's output at this one; calls come in the order of `timesteps`.

        model_output: [B, C, H, W] like the sample, or [B, 2 C, H, W] where the plan learns its variance.
        """
        plan = self._planned()
        if self._index is None:
            self._index = self._position(timestep)
            self._offset = self._index
            self._running = plan if self._index == 0 else self._rest(self._index)
        assert self._running is not None
        if self._index - self._offset >= len(self._running.stages):
            raise UserError(f"this plan has {plan.evaluations} evaluations; call set_timesteps before another run.")
        stage = self._running.stages[self._index - self._offset]
        answers = split(model_output, 1 + len(stage.answers), sample)
        known = {**self._kept, "x": sample, **dict(zip(("cond", *stage.answers), answers))}
        if stage.noise:
            known["noise"] = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        dtype = coefficient_dtype(sample, model_output)
        table, *of_parts = tables(self._running, sample.device, dtype)[self._index - self._offset]
        assert table is not None
        for part, matrix in zip(stage.nonlinear, of_parts):
            made = parts.run(part, [known[name] for name in part.inputs], matrix, None, dtype)
            known.update(zip(part.outputs, made))
        inputs = [known[name] for name in stage.inputs]
        names = outputs(stage)
        found = dict(zip(names, lincomb(inputs, table, dtypes=[sample.dtype] * len(names))))
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
        if isinstance(timestep, Tensor) and not tracing() and _shares_memory(timestep, self.timesteps):
            return int(timestep.storage_offset() - self.timesteps.storage_offset())
        return int((self.timesteps - float(timestep)).abs().argmin())

    def _rest(self, index: int) -> Plan:
        """The plan of the steps left from evaluation `index`, which must be a step's first."""
        return self._kept_plan((self._steps, self._given, self.schedule, index), lambda: self._plan_from(index))

    def _plan_from(self, index: int) -> Plan:
        for done in range(1, self._steps):
            left = self._steps - done
            options = {
                key: value[-left:] if isinstance(value, list) and len(value) == self._steps else value
                for key, value in (self.config.options or {}).items()
            }
            rest = self._plan_of(left, list(self._times[done:]), options)
            if rest.stages[0].time == self._planned().stages[index].time:
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


def _shares_memory(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is a number out of `whole`, whose place then needs no look at its value."""
    return (
        part.numel() == 1
        and part.dtype == whole.dtype
        and part.device == whole.device
        and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )

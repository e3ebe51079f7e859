"""A network with its schedule and prediction type: teacher and student are both one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import teacher_guidance
from fewstep.diffusion.guidance import Guidance
from fewstep.diffusion.linear import coefficient_dtype, combine
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.real import Real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError


class Denoiser(nn.Module):
    """x0_hat(x, t, cond) from `net(x_scaled, t_net, cond) -> F`, with F shaped like x.

    x is alpha(t) x0 + sigma(t) eps, [B, ...]; t is a float, a tensor [] or [B]; cond is what the network takes.
    Where t is a tensor every answer is differentiable in it.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: str | Prediction = "x0") -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.prediction = predictions.get(prediction)

    def forward(
        self, x: Tensor, t: float | Tensor, cond: Any = None, *, as_network: bool = False, **inputs: Any
    ) -> Tensor:
        """x0_hat; with `as_network` the bare network's output for an already scaled x and the network's own time [B].

        The second form exists so that executors and sharding engines have one entry for both.
        """
        if as_network:
            return self.net(x, t, **inputs) if cond is None else self.net(x, t, cond, **inputs)
        time = self._time(x, t)
        output = self._output(x, time, cond, inputs)
        return combine([x, output], [self.prediction.coefficients(self.schedule, time)])[0]

    def raw(self, x: Tensor, t: float | Tensor, cond: Any = None, **inputs: Any) -> Tensor:
        """F, the network's own output, at the unscaled x and schedule time t."""
        return self._output(x, self._time(x, t), cond, inputs)

    def eps(self, x: Tensor, t: float | Tensor, cond: Any = None, **inputs: Any) -> Tensor:
        """eps_hat = (x - alpha x0_hat)/sigma."""
        time = self._time(x, t)
        output = self._output(x, time, cond, inputs)
        return combine([x, output], [self.prediction.noise_coefficients(self.schedule, time)])[0]

    def score(self, x: Tensor, t: float | Tensor, cond: Any = None, **inputs: Any) -> Tensor:
        """grad_x log p_t(x) = -eps_hat/sigma."""
        time = self._time(x, t)
        output = self._output(x, time, cond, inputs)
        of_x, of_output = self.prediction.noise_coefficients(self.schedule, time)
        sigma = self.schedule.sigma(time)
        return combine([x, output], [(-of_x / sigma, -of_output / sigma)])[0]

    def velocity(self, x: Tensor, t: float | Tensor, cond: Any = None, **inputs: Any) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' x0_hat + sigma' eps_hat."""
        time = self._time(x, t)
        output = self._output(x, time, cond, inputs)
        return combine([x, output], [self._velocity_row(time)])[0]

    def guided(
        self,
        x: Tensor,
        t: float | Tensor,
        cond: Any,
        guidance: float | Tensor | Mapping[str, Any] | None,
        uncond: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """x0_hat of uncond + w (cond - uncond) by one doubled call; w a float or [B]; None and 1.0 skip the second
        half. guidance may be a form instead, of those of `teacher_guidance` that ask cond and uncond alone.
        """
        form = _form(guidance) if isinstance(guidance, Mapping) else None
        if not (form.acts if form else guiding.is_guided(guidance)):  # type: ignore[arg-type]
            return self(x, t, cond, **inputs)
        assert guidance is not None
        time = self._time(x, t)
        uncond = self.null(cond) if uncond is None else uncond
        twice = torch.cat([x, x])
        time_twice = torch.cat([time, time]) if isinstance(time, Tensor) and time.ndim else time
        doubled = {
            key: guiding.joined(value, value) if isinstance(value, Tensor) else value for key, value in inputs.items()
        }
        output = self._output(twice, time_twice, guiding.joined(cond, uncond), doubled)
        halves = {"cond": output[: len(x)], "uncond": output[len(x) :]}
        of_x, of_output = self.prediction.coefficients(self.schedule, time)
        if form is not None:
            answers = {name: combine([x, half], [(of_x, of_output)])[0] for name, half in halves.items()}
            times = time if isinstance(time, Tensor) else x.new_full((len(x),), time, dtype=coefficient_dtype(x))
            return teacher_guidance.guided(form, x, times, answers, self.schedule, self.prediction)
        of_cond, of_uncond = guiding.coefficients(guidance)  # type: ignore[arg-type]
        row = (of_x, of_output * of_cond, of_output * of_uncond)
        return combine([x, *halves.values()], [row])[0]

    def null(self, cond: Any) -> Any:
        """The null condition shaped like `cond`, as the network defines it."""
        if not hasattr(self.net, "null"):
            raise UserError(
                f"guidance needs an unconditional condition and {type(self.net).__name__} has no null(cond); "
                "pass uncond, or give the network that method."
            )
        null: Any = self.net.null
        return null(cond)

    def extra_repr(self) -> str:
        return f"schedule={self.schedule!r}, prediction={self.prediction!r}"

    def _time(self, x: Tensor, t: float | Tensor) -> Real:
        if not isinstance(t, Tensor):
            return float(t)
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
            raise UserError(
                f"time has shape {list(t.shape)} for a batch of {x.shape[0]}; give a number, or one time per sample."
            )
        return t.to(coefficient_dtype(x, t)).expand(x.shape[0])

    def _output(self, x: Tensor, time: Real, cond: Any, inputs: dict[str, Any]) -> Tensor:
        told = self.prediction.network_time(self.schedule, time)
        if not isinstance(told, Tensor):
            told = x.new_full((x.shape[0],), told, dtype=coefficient_dtype(x))
        if self.prediction.kind == "edm":
            x = combine([x], [(self.prediction.input_scale(self.schedule, time),)])[0]
        return self.net(x, told, **inputs) if cond is None else self.net(x, told, cond, **inputs)

    def _velocity_row(self, time: Real) -> tuple[Real, Real]:
        alpha_rate, sigma_rate = self.schedule.derivatives(time)
        x0 = self.prediction.coefficients(self.schedule, time)
        eps = self.prediction.noise_coefficients(self.schedule, time)
        return alpha_rate * x0[0] + sigma_rate * eps[0], alpha_rate * x0[1] + sigma_rate * eps[1]


def _form(given: Mapping[str, Any]) -> Guidance:
    form = teacher_guidance.get(given)
    assert form is not None
    if form.roles or form.conditions != ("cond", "uncond"):
        raise UserError(
            f"guidance {form.name!r} asks more than cond and uncond, and a denoiser alone has no more to ask; sample "
            "with a plan of it."
        )
    return form

"""Read-outs: what a student's answer means, as a module around the bare network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import combine
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import choose

READ_OUTS = ("denoiser", "skip", "jump", "plain")


class Jump(nn.Module):
    """G(x, t, s) = (sigma_s / sigma_t) x + (alpha_s - alpha_t sigma_s / sigma_t) g(x, t, s): a DDIM jump by g.

    The identity at s = t whatever the weights. With alpha = 1 it is equation 9 of CTM (Kim, Lai et al. 2023,
    arXiv:2310.02279). `two_times` tells the network the target time too, as the named input `s`; without it g(x, t) is
    a one-time denoiser.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: Prediction, two_times: bool = True) -> None:
        super().__init__()
        self.denoiser = Denoiser(net, schedule, prediction)
        self.two_times = two_times

    @property
    def net(self) -> nn.Module:
        return self.denoiser.net

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def null(self, cond: Any) -> Any:
        return self.denoiser.null(cond)

    def clean(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None) -> Tensor:
        """g(x, t, s), the clean-sample estimate; g(x, t, t) is a denoiser."""
        named = {"s": self.prediction.network_time(self.schedule, s)} if self.two_times else {}
        return self.denoiser(x, t, cond, **named)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None, *, as_network: bool = False) -> Tensor:
        """G; with `as_network` the bare network's output for an already scaled x and the network's own times [B]."""
        if as_network:
            return self.denoiser(x, t, cond, as_network=True, s=s)
        ratio = self.schedule.sigma(s) / self.schedule.sigma(t)
        rest = self.schedule.alpha(s) - self.schedule.alpha(t) * ratio
        return combine([x, self.clean(x, t, s, cond)], [(ratio, rest)])[0]


def read_out(
    kind: str | Callable[..., nn.Module],
    net: nn.Module,
    schedule: Schedule,
    prediction: Prediction,
    inputs: tuple[str, ...] = ("x", "t"),
) -> nn.Module:
    """The module a method calls: `net` behind the read-out `kind` (a name of `READ_OUTS` or a callable)."""
    if not isinstance(kind, str):
        return kind(net, schedule, prediction)
    if kind == "plain":
        return net
    if kind == "denoiser":
        return Denoiser(net, schedule, prediction)
    if kind == "skip":
        return Denoiser(net, schedule, replace(prediction, boundary=schedule.t_min))
    if kind == "jump":
        return Jump(net, schedule, prediction, two_times="s" in inputs)
    raise choose("read-out", kind, READ_OUTS)

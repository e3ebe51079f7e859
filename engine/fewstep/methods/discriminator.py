"""A discriminator: a small head on what a named layer of another network sees in a noisy picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import UserError
from fewstep.nets.network import Network, Way


class Head(nn.Module):
    """Features [B, N, W], [B, W, H, W'] or [B, W] -> one logit a sample [B], the mean over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            features = features.flatten(2).transpose(1, 2)
        hidden = functional.silu(self.first(self.norm(features)))
        return self.last(hidden).flatten(1).mean(1)


@dataclass(frozen=True)
class Discriminator:
    """`head` on the tap `at` of `backbone`; a call also gives the backbone's own answer, which costs nothing more."""

    backbone: Network
    head: Network
    at: str

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(backbone's answer, logits [B]), gradients to both networks' parameters."""
        return self._judge(x_t, t, cond, "call", inputs)

    def fixed(self, x_t: Tensor, t: Tensor, cond: Any = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(backbone's answer, logits [B]), gradients to x_t only."""
        return self._judge(x_t, t, cond, "fixed", inputs)

    def _judge(self, x_t: Tensor, t: Tensor, cond: Any, way: Way, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        answer, taps = self.backbone.features(x_t, t, cond, at=self.at, way=way, **inputs)
        head = self.head if way == "call" else self.head.fixed
        return answer, head(taps[self.at])


def make_head(backbone: nn.Module, at: str) -> Head:
    """A head for the tap `at` (the last of `net.taps` if "") of the network inside `backbone`."""
    name = tap_name(backbone, at)
    return Head(_taps(backbone)[name])


def tap_name(backbone: nn.Module, at: str) -> str:
    """`at`, or the last name of the network's `taps` where it is empty; `UserError` for a name it does not have."""
    taps = _taps(backbone)
    if at and at not in taps:
        raise UserError(f"the network has no tap {at!r} for a discriminator; choose one of: {', '.join(taps)}.")
    return at or list(taps)[-1]


def _taps(backbone: nn.Module) -> Mapping[str, int]:
    net = getattr(backbone, "net", backbone)
    taps = getattr(net, "taps", None)
    if not taps:
        raise UserError(
            f"a discriminator head needs a network that names its taps and {type(net).__name__} names none; "
            "give it `taps = {submodule: width}` or set the weight of the adversarial loss to 0."
        )
    return taps


def student_loss(logits: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-logit of the student's samples) (arXiv:2405.14867, equation 4)."""
    return functional.softplus(-logits).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake)."""
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of samples judged rightly, for the log."""
    with torch.no_grad():
        return 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())

"""Low-rank adapters: a network trained as a small correction to a frozen one, which others may share.

Hu et al. 2021, arXiv:2106.09685: a layer W x becomes W x + (alpha / rank) B A x with A [rank, in], B [out, rank].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewstep.errors import UserError, choose

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Lora(BaseModel):
    """Which layers of a network are corrected, and how much they can be.

    rank: of each correction. alpha: its scale is alpha / rank; None means alpha = rank. targets: ends of module names,
    such as "to_q" or "blocks.3.mlp"; empty means every linear layer and every convolution.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Correction(nn.Module):
    """B A x for one layer; B starts at zero."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            assert isinstance(layer, _CONVOLUTIONS)
            kind: Any = type(layer)
            geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            self.down = kind(layer.in_channels, rank, layer.kernel_size, bias=False, **geometry)
            self.up = kind(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Adapted(nn.Module):
    """`base` with low-rank corrections; answers as `base` does until it is trained.

    Only the corrections are its parameters. The base stays outside its tree, so that several adapted networks, and
    whoever owns the base, share one copy of it, sharded or not; it must hold no parameter that is trained elsewhere.
    """

    def __init__(self, base: nn.Module, lora: Lora) -> None:
        super().__init__()
        self.lora = lora
        self._held = (base,)  # a tuple, so that the base is not registered as a submodule
        layers = _targets(base, lora)
        self._names = {name: name.replace(".", "/") for name in layers}  # a module's name holds no dot
        self.corrections = nn.ModuleDict(
            {self._names[name]: Correction(layer, lora.rank) for name, layer in layers.items()}
        )
        first = next(base.parameters())
        self.corrections.to(first.device, first.dtype)

    @property
    def base(self) -> nn.Module:
        return self._held[0]

    @property
    def config(self) -> Any:
        """The base's: what `merged` is a state of."""
        return self.base.config

    @property
    def fewstep_config(self) -> Any:
        """Likewise."""
        return self.base.fewstep_config

    @property
    def taps(self) -> Any:
        return self.base.taps

    def null(self, cond: Any) -> Any:
        base: Any = self.base
        return base.null(cond)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        handles = [
            self.base.get_submodule(name).register_forward_hook(self._correcting(self.corrections[own]))
            for name, own in self._names.items()
        ]
        try:
            return self.base(*inputs, **named)
        finally:
            for handle in handles:
                handle.remove()

    def _correcting(self, correction: nn.Module) -> Callable[..., Tensor]:
        scale = self.lora.scale
        return lambda _layer, inputs, output: output + scale * correction(inputs[0])

    def merged(self, base: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of one plain network that answers as this one does, from whole states of the base and of this."""
        state = dict(base)
        for name, key in self._names.items():
            down, up = (own[f"corrections.{key}.{half}.weight"].double() for half in ("down", "up"))
            weight = state[f"{name}.weight"]
            change = up.flatten(1) @ down.flatten(1)
            state[f"{name}.weight"] = (weight.double() + self.lora.scale * change.view(weight.shape)).to(weight.dtype)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """A copy with corrections of its own over the same base."""
        memo[id(self.base)] = self.base
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


def _targets(base: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    kinds = (nn.Linear, *_CONVOLUTIONS)
    layers: dict[str, nn.Module] = {name: m for name, m in base.named_modules() if isinstance(m, kinds)}
    grouped = {name for name, m in layers.items() if getattr(m, "groups", 1) != 1}
    if not lora.targets:
        chosen = {name: m for name, m in layers.items() if name not in grouped}
    else:
        chosen = {}
        for target in lora.targets:
            found = {name: m for name, m in layers.items() if name == target or name.endswith("." + target)}
            if not found:
                raise choose("layer to adapt", target, sorted({name.rsplit(".", 1)[-1] for name in layers}))
            if found.keys() & grouped:
                raise UserError(
                    f"layer {min(found.keys() & grouped)!r} is a grouped convolution, which a low-rank correction "
                    f"cannot be merged into; leave {target!r} out of the adapter's targets."
                )
            chosen |= found
    if not chosen:
        raise UserError(f"{type(base).__name__} has no linear layer and no convolution to adapt; train it whole.")
    return chosen


__all__ = ["Adapted", "Correction", "Lora"]

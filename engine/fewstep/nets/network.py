"""`Network`: how a method holds any network, and the four ways to call it.

| call | gradients | how |
|---|---|---|
| `net(...)` | to its parameters | through its engine |
| `net.fixed(...)` | to its inputs only | its module, parameters frozen |
| `net.value(...)` | none | its module under `no_grad` |
| `net.tangent(primals, tangents)` | none; returns (f, df) | forward mode |

Sharding and gradient leaks are then the trainer's problem alone: under DeepSpeed ZeRO-3 a trained network called bare,
or a frozen one called through its engine, is silently wrong or raises (measured; `tests/train` holds the cases).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import UserError, choose
from fewstep.nets.lora import Adapted
from fewstep_kernels import carrying_tangents

Way = Literal["call", "fixed", "value"]


class _Masks:
    """The state of torch's generators at the first call, put back before each later one."""

    def __init__(self) -> None:
        self.states: dict[torch.device, Tensor] | None = None

    def replay(self, device: torch.device) -> None:
        if self.states is None:
            self.states = {torch.device("cpu"): torch.get_rng_state()}
            if device.type == "cuda":
                self.states[device] = torch.cuda.get_rng_state(device)
            return
        torch.set_rng_state(self.states[torch.device("cpu")])
        if device.type == "cuda" and device in self.states:
            torch.cuda.set_rng_state(self.states[device], device)


_masks: ContextVar[_Masks | None] = ContextVar("fewstep_same_masks", default=None)


@contextlib.contextmanager
def same_masks() -> Iterator[None]:
    """Every call of a `Network` in this context draws the same dropout masks (calls of one shape)."""
    token = _masks.set(_Masks())
    try:
        yield
    finally:
        _masks.reset(token)


class Network:
    """A module and, where it is trained, the engine that reduces and shards its gradients.

    `engine` is a callable with the module's own signature (a DDP or DeepSpeed wrapper, or the module itself when None).
    `tangents` says how `tangent` differentiates: "forward" (exact), or "difference" (central, for engines under which
    forward mode raises: ZeRO-3).
    """

    def __init__(
        self,
        module: nn.Module,
        engine: Callable[..., Any] | None = None,
        tangents: Literal["forward", "difference"] = "forward",
    ) -> None:
        self.module = module
        self.engine = engine
        self.tangents = tangents

    @property
    def schedule(self) -> Any:
        return self.module.schedule

    @property
    def prediction(self) -> Any:
        return self.module.prediction

    @property
    def net(self) -> nn.Module:
        """The bare network inside the read-out; the module itself where there is no read-out."""
        inner = getattr(self.module, "net", self.module)
        return inner if isinstance(inner, nn.Module) else self.module

    @property
    def layers(self) -> nn.Module:
        """The module whose submodules `features` taps: `net`, or the one it adapts."""
        return self.net.base if isinstance(self.net, Adapted) else self.net

    def null(self, cond: Any) -> Any:
        """The null condition like `cond` (None when there is no condition)."""
        module: Any = self.module
        return None if cond is None else module.null(cond)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Gradients reach the parameters (and the inputs), through the engine."""
        self._replay_masks(inputs)
        return (self.engine or self.module)(*inputs, **named)

    def fixed(self, *inputs: Any, **named: Any) -> Any:
        """Gradients reach the inputs only.

        The graph built here never refers to the parameters' gradient accumulators, so that backward and freeing it
        later are unaffected by their `requires_grad`, which is restored before this returns, also after an exception.
        """
        self._replay_masks(inputs)
        with _frozen(self.module):
            return self.module(*inputs, **named)

    def value(self, *inputs: Any, **named: Any) -> Any:
        """No gradients."""
        self._replay_masks(inputs)
        with torch.no_grad():
            return self.module(*inputs, **named)

    def tangent(self, primals: Sequence[Tensor], tangents: Sequence[Tensor], **named: Any) -> tuple[Tensor, Tensor]:
        """(f, df) of `module(*primals, **named)` along `tangents`, both without gradients.

        The named inputs (conditions) are constants. Exact forward mode; where an operator has no forward rule, reverse
        mode twice; where that fails too, an error that names the operator: never a silent zero.
        """
        self._replay_masks(primals)
        primals, tangents = tuple(primals), tuple(tangents)

        def answer(*inputs: Tensor) -> Tensor:
            return self.module(*inputs, **named)

        # torch's fused attention has no forward rule; with dropout, its mathematical form, which has, is left
        with torch.no_grad(), carrying_tangents(), sdpa_kernel(SDPBackend.MATH):
            if self.tangents == "difference":
                return _central_difference(answer, primals, tangents)
            try:
                value, change = torch.func.jvp(answer, primals, tangents)  # type: ignore[misc]
                return value.detach(), change.detach()
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower() and "jvp" not in str(error).lower():
                    raise
                reason = error
        self._replay_masks(primals)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _frozen(self.module):
            return _reverse_twice(answer, primals, tangents, reason)

    def by(self, way: Way) -> Callable[..., Any]:
        """The call of that name: "call", "fixed" or "value"."""
        ways: dict[str, Callable[..., Any]] = {"call": self, "fixed": self.fixed, "value": self.value}
        if way not in ways:
            raise choose("way to call a network", way, ways)
        return ways[way]

    def features(
        self, *inputs: Any, at: str | Sequence[str], way: Way = "call", **named: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """(answer, {name: tap}) of one call made in the given way; a tap is the output of the named submodule of `net`.

        Raises `UserError` for a name that is not a submodule. A submodule that runs twice gives its last output.
        """
        names = (at,) if isinstance(at, str) else tuple(at)
        submodules = dict(self.layers.named_modules())
        taps: dict[str, Tensor] = {}
        handles = []
        for name in names:
            if name not in submodules:
                raise choose(f"submodule to tap in {type(self.net).__name__}", name, [n for n in submodules if n])

            def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                taps[name] = output

            handles.append(submodules[name].register_forward_hook(keep))
        try:
            answer = self.by(way)(*inputs, **named)
        finally:
            for handle in handles:
                handle.remove()
        for name in names:
            if name not in taps:
                raise UserError(f"submodule {name!r} did not run in this call; tap one that does.")
        return answer, taps

    def gradient_norm(self, loss: Tensor, layer: str) -> Tensor:
        """|d loss / d parameters of `layer`|_2, detached; the graph is kept. For adaptive loss weights.

        `layer` names a submodule or a parameter of `net`.
        """
        chosen = [p for n, p in self.net.named_parameters() if n == layer or n.startswith(layer + ".")]
        chosen = [p for p in chosen if p.requires_grad]
        if not chosen:
            raise choose("layer with trained parameters", layer, [n for n, _ in self.net.named_modules() if n])
        gradients = torch.autograd.grad(loss, chosen, retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        return torch.stack(squares).sum().sqrt().to(loss.dtype) if squares else torch.zeros_like(loss.detach())

    def _replay_masks(self, inputs: Sequence[Any]) -> None:
        masks = _masks.get()
        if masks is not None:
            devices = [value.device for value in inputs if isinstance(value, Tensor)]
            masks.replay(devices[0] if devices else torch.device("cpu"))


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _reverse_twice(
    answer: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], reason: Exception
) -> tuple[Tensor, Tensor]:
    """df = d/du <u, J v> by two reverse passes, u being a dummy cotangent."""
    inputs = tuple(p.detach().requires_grad_(True) for p in primals)
    try:
        value = answer(*inputs)
        dummy = torch.zeros_like(value, requires_grad=True)
        pulled = torch.autograd.grad(value, inputs, dummy, create_graph=True, allow_unused=True)
        paired = [(g * v).sum() for g, v in zip(pulled, tangents) if g is not None]
        (change,) = torch.autograd.grad(torch.stack(paired).sum(), dummy)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"this network has no exact tangent: forward mode says {str(reason).splitlines()[0]!r}, reverse mode "
            f"twice {str(error).splitlines()[0]!r}; hold the network with tangents='difference'."
        ) from error
    return value.detach(), change.detach()


def _central_difference(
    answer: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(f(p + h v) - f(p - h v)) / 2h with h = eps^(1/3) max(1, |p|) / |v|: error of order eps^(2/3)."""
    epsilon = max(torch.finfo(p.dtype).eps for p in primals)
    size = torch.stack([p.abs().max() for p in primals]).max().clamp_min(1.0)
    speed = torch.stack([v.abs().max() for v in tangents]).max().clamp_min(torch.finfo(primals[0].dtype).tiny)
    step = epsilon ** (1 / 3) * size / speed
    masks = _Masks()
    values = []
    for shift in (step, -step, 0.0 * step):
        masks.replay(primals[0].device)
        values.append(answer(*(p + shift * v for p, v in zip(primals, tangents))))
    ahead, behind, here = values
    return here, (ahead - behind) / (2 * step)

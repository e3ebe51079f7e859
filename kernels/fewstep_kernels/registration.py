"""How an operator meets torch: the raw operator, the guard that keeps it honest, and the choice between its three
paths.

Operators made with torch.library return ZERO tangents under torch.func.jvp without an error, and opcheck does not see
it. So the raw operator refuses tangents and gradients, and the public function calls it only where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import _C, Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_is_tracing, _profiling = _C._is_tracing, _C._autograd._profiler_enabled
_dispatch_modes, _function_modes = _C._len_torch_dispatch_stack, _C._len_torch_function_stack
_functorch_level = _C._functorch.peek_interpreter_stack

LIBRARY = torch.library.Library("fewstep_kernels", "DEF")


def tracing() -> bool:
    """Whether a compiler or exporter is watching: it must see plain aten operations, which it fuses or serialises."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def quiet() -> bool:
    """Whether nobody follows the call: no compiler, tracer, mode, functorch transform, dual level or profiler.

    Then a public function may go past the dispatcher, which costs more than a small kernel.
    """
    return not (
        torch.compiler.is_compiling()
        or _is_tracing()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _profiling()
    )


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether all are tensors of torch's own, none negated by a bit (as an imaginary part of a conjugate is) or wrapped
    by a transform (one may be where no level is active)."""
    return all(
        type(x) in (Tensor, Parameter) and not x.is_neg() and not is_functorch_wrapped_tensor(x) for x in tensors
    )


def differentiating(tensors: Iterable[Tensor]) -> bool:
    """Whether a functorch transform or a dual level is active, or a gradient is wanted for one of the tensors."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define `fewstep_kernels::<schema>`, for every device, and return it.

    Calling it with a tensor that carries a tangent or wants a gradient raises RuntimeError.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.fewstep_kernels, name).default

    def guard(*arguments: Any) -> Any:
        for x in _tensors(arguments):
            if (torch.is_grad_enabled() and x.requires_grad) or forward_ad.unpack_dual(x).tangent is not None:
                public = name.removeprefix("_").removesuffix("_out")
                raise RuntimeError(
                    f"torch.ops.fewstep_kernels.{name} has no derivatives and would lose this one silently; "
                    f"call fewstep_kernels.{public} instead."
                )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(name, guard, "Autograd")
    torch.library.register_fake(f"fewstep_kernels::{name}", fake, lib=LIBRARY)
    return operator

"""attention_jvp and the normalisation pairs on a GPU, at the shapes of SDXL's U-Net and of DiT-XL/2."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from case import By, Case, ways
from streaming import streams
from timing import timed
from torch import Tensor
from torch.func import jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep_kernels as fk
from fewstep_kernels import backends

WIDTHS = (40, 64, 72, 80, 96, 128, 160, 256)


def _with_gradients(function: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor | None) -> list[Tensor]:
    if gradient is None:
        return [function(*tensors)]
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]


def _normalisation(operator, title, ours, eager, tensors, backward, device, small, percent) -> Case:
    x = tensors[0]
    gradient = torch.randn_like(x) if backward else None
    compiled = torch.compile(eager, **({"backend": "eager"} if small else {}))
    candidates = {
        f"{operator} ({way})": By(way, lambda: _with_gradients(ours, tensors, gradient))
        for way in ways(operator, device)
    }
    candidates["eager torch"] = lambda: _with_gradients(eager, tensors, gradient)
    candidates["torch.compile"] = lambda: _with_gradients(compiled, tensors, gradient)
    each = x.numel() * x.element_size()
    read, written = (3, 2) if backward else (1, 1)
    wide = [t.double().contiguous() for t in tensors]
    return Case(
        f"{title}, {'forward and backward' if backward else 'forward'}",
        candidates,
        lambda: _with_gradients(eager, wide, None if gradient is None else gradient.double().contiguous()),
        streams(read, written, x.numel(), x.dtype, device),
        read * each,
        written * each,
        (4 if backward else 2) * each,
        bound=2e-2 if x.dtype == torch.bfloat16 else 4e-5,  # some roundings of the dtype, of the largest value
        gradients=backward,
        least_percent=None if small or backward else percent,
        device=device,
    )


def group_norm_silu(device: str, small: bool) -> Iterator[Case]:
    """SDXL's levels, channels last, in bfloat16: with weight and bias (diffusers' GroupNorm, then SiLU), and AdaGN."""
    shapes = [((2, 8, 5, 7), 2)] if small else [((8, 320, 128, 128), 32), ((8, 640, 64, 64), 32)]
    for shape, groups in shapes:
        for modulated in (False, True):
            for backward in (False, True):
                x = torch.randn(shape, device=device).to(torch.float32 if small else torch.bfloat16)
                x = x.to(memory_format=torch.channels_last)
                size = (shape[0], shape[1]) if modulated else (shape[1],)
                tensors = [x, *(torch.randn(size, device=device).to(x.dtype) for _ in range(2))]

                def ours(x, a, b, groups=groups, modulated=modulated):
                    if modulated:
                        return fk.group_norm_silu(x, groups, scale=a, shift=b)
                    return fk.group_norm_silu(x, groups, a, b)

                def eager(x, a, b, groups=groups, modulated=modulated):
                    if not modulated:
                        return functional.silu(functional.group_norm(x, groups, a, b))
                    u = functional.group_norm(x, groups) * (1 + a[:, :, None, None]) + b[:, :, None, None]
                    return functional.silu(u)

                title = f"{list(shape)}, {'scale and shift' if modulated else 'weight and bias'}"
                yield _normalisation("group_norm_silu", title, ours, eager, tensors, backward, device, small, 85)


def norm_modulate(device: str, small: bool) -> Iterator[Case]:
    """DiT-XL/2's rows at 1024 pixels, in bfloat16."""
    shape = (2, 5, 63) if small else (8, 4096, 1152)
    for kind in ("layer", "rms"):
        for backward in (False, True):
            x = torch.randn(shape, device=device).to(torch.float32 if small else torch.bfloat16)
            tensors = [x, *(torch.randn(shape[0], shape[2], device=device).to(x.dtype) for _ in range(2))]

            def ours(x, scale, shift, kind=kind):
                if kind == "layer":
                    return fk.layer_norm_modulate(x, scale, shift)
                return fk.rms_norm_modulate(x, scale, shift, eps=1e-5)

            def eager(x, scale, shift, kind=kind, width=shape[2]):
                u = (
                    functional.layer_norm(x, (width,))
                    if kind == "layer"
                    else functional.rms_norm(x, (width,), eps=1e-5)
                )
                return u * (1 + scale[:, None]) + shift[:, None]

            yield _normalisation(
                f"{kind}_norm_modulate", f"{kind} norm {list(shape)}", ours, eager, tensors, backward, device, small, 85
            )


def under(kind: SDPBackend, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with sdpa_kernel(kind):
            return call()

    return run


def exact(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """Value and tangent in float64, a head at a time."""
    parts = []
    for head in range(primals[0].shape[1]):
        cut = [x[:, head : head + 1].double() for x in (*primals, *tangents)]
        parts.append(fk.attention_jvp(*cut))
    return [torch.cat(part, 1) for part in zip(*parts)]


def attention_jvp(device: str, small: bool) -> Iterator[Case]:
    """Value and tangent over head widths at 4096 tokens; the floor is the faster of flash and cuDNN without a tangent:
    three times its arithmetic is the least, so 33% of it the most."""
    shapes = [(1, 2, 33, 16)] if small else [(4, 16, 4096, width) for width in WIDTHS]
    torchs = functional.scaled_dot_product_attention
    for shape in shapes:
        dtype = torch.float32 if small else torch.bfloat16
        drawn = [torch.randn(shape, device=device).to(dtype) for _ in range(6)]
        primals, tangents = drawn[:3], drawn[3:]
        both = tuple(primals), tuple(tangents)
        candidates = {
            f"attention_jvp ({way})": By(way, lambda drawn=drawn: fk.attention_jvp(*drawn))
            for way in ways("attention_jvp", device)
        }
        candidates["func.jvp of attention"] = lambda both=both: jvp(fk.attention, *both)
        candidates["func.jvp of SDPA, math"] = under(SDPBackend.MATH, lambda both=both: jvp(torchs, *both))
        try:
            from jvp_flash_attention.jvp_attention import JVPAttn
        except ImportError:
            print("jvp_flash_attention is not installed: not measured.")
        else:
            candidates["jvp_flash_attention"] = lambda both=both: jvp(JVPAttn.fwd_dual, *both)
        each = drawn[0].numel() * drawn[0].element_size()
        yield Case(
            f"{list(shape)} {str(dtype).removeprefix('torch.')}",
            candidates,
            lambda primals=primals, tangents=tangents: exact(primals, tangents),
            forward(primals, device),
            6 * each,
            2 * each,
            8 * each,
            bound=2e-2 if dtype == torch.bfloat16 else 1e-4,
            least_percent=None if small or shape[3] == 256 else 25,  # at most 4.0 times a forward pass
            peak=None
            if device != "cuda"
            else lambda drawn=drawn, each=each: peak_memory(lambda: fk.attention_jvp(*drawn), 8 * each),
            device=device,
        )


def forward(primals: list[Tensor], device: str) -> dict[str, Callable[[], object]]:
    """Attention without a tangent, by each of torch's kernels that takes these tensors."""
    plain = lambda: functional.scaled_dot_product_attention(*primals)  # noqa: E731
    if device != "cuda":
        return {"SDPA forward": plain}
    found = {}
    for name, kind in (("flash forward", SDPBackend.FLASH_ATTENTION), ("cuDNN forward", SDPBackend.CUDNN_ATTENTION)):
        try:
            under(kind, plain)()
            found[name] = under(kind, plain)
        except RuntimeError as problem:
            print(f"{name} does not run here: {str(problem).splitlines()[0][:120]}")
    return found or {"SDPA forward": plain}


def peak_memory(call: Callable[[], object], inputs_and_outputs: int) -> float:
    """Bytes that a call needs at its peak, its inputs included, over those of inputs and outputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before + 6 * inputs_and_outputs // 8) / inputs_and_outputs


def host_microseconds(ours: By, rounds: int = 30) -> float:
    """The host's part of one launch, in inference mode: the clock around calls that wait for nothing."""
    with torch.inference_mode(), backends.asking(ours.way):
        return 1e6 * statistics.median(timed({"call": ours.call}, "cpu", rounds, 2e-4)["call"])

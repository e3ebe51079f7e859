"""lincomb, gram, the distances and threshold on a GPU: at latent size, and above 512 MiB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case import By, Case, ways
from streaming import streams
from torch import Tensor

import fewstep_kernels as fk

LATENTS = (16, 4, 128, 128)
LARGE = (160, 16, 128, 128)  # 160 MiB a float32 tensor


def sizes(small: bool) -> list[tuple[str, tuple[int, ...]]]:
    return [("small", (3, 4, 9, 7))] if small else [("latents", LATENTS), ("large", LARGE)]


def lincomb(device: str, small: bool) -> Iterator[Case]:
    """A guided solver step of two steps' history: four inputs, three outputs."""
    a, b, c, e, f, w, s = 0.61, 0.52, -0.13, 1.08, -0.4, 3.0, 0.77
    following = [a + b * e, b * f * w, b * f * (1 - w), c]
    rows = [following, [e, f * w, f * (1 - w), 0.0], [s * v for v in following]]
    table = torch.tensor(rows, device=device)
    for size, shape in sizes(small):
        for dtype in (torch.float32, torch.bfloat16):
            x, previous = (torch.randn(shape, device=device) for _ in range(2))
            both = torch.randn(2 * shape[0], *shape[1:], device=device).to(dtype)
            inputs = [x, both[: shape[0]], both[shape[0] :], previous]
            out = [torch.empty(shape, device=device, dtype=d) for d in (torch.float32, torch.float32, dtype)]

            def eager(x, both, previous, last=dtype):
                g, u = both.float().chunk(2)
                d = e * x + f * (u + w * (g - u))
                y = a * x + b * d + c * previous
                return y, d, (s * y).to(last)

            compiled = torch.compile(eager, fullgraph=True, **({"backend": "eager"} if small else {}))

            def ours(inputs=inputs, out=out):
                return fk.lincomb(inputs, table, out=out)

            def truth(inputs=inputs):
                return torch.einsum("mk,k...->m...", table.double(), torch.stack([t.double() for t in inputs]))

            mixed = x.numel() * (8 + 2 * both.element_size()), x.numel() * (8 + both.element_size())
            yield Case(
                f"guided step, {size}, network in {str(dtype).removeprefix('torch.')}",
                {f"lincomb ({way})": By(way, ours) for way in ways("lincomb", device)}
                | {
                    "eager torch": lambda x=x, both=both, p=previous, f=eager: f(x, both, p),
                    "torch.compile": lambda x=x, both=both, p=previous, f=compiled: f(x, both, p),
                },
                truth,
                # the same number of reads and writes, in tensors that hold as many bytes in all
                streams(4, 3, sum(mixed) // 28, torch.float32, device),
                *mixed,
                sum(mixed),
                bound=1e-5 if dtype == torch.float32 else 8e-3,  # some roundings; one bfloat16 rounding
                least_percent=90 if size == "large" else None,
                most_empty=1.3 if size == "latents" else None,
                device=device,
            )
            del x, previous, both, inputs, out


def noising(device: str, small: bool) -> Iterator[Case]:
    """x_t = alpha x + sigma noise, drawn inside the pass."""
    for size, shape in sizes(small):
        x, seeds = torch.randn(shape, device=device), torch.arange(shape[0], device=device)
        table, out = torch.tensor([[0.8, 0.6]], device=device), [torch.empty(shape, device=device)]

        def ours(x=x, seeds=seeds, table=table, out=out):
            return fk.lincomb([x], table, noise_seeds=seeds, out=out)

        def truth(x=x, seeds=seeds, shape=shape):
            return [0.8 * x.double() + 0.6 * fk.normal(seeds, shape[1:], dtype=torch.float64)]

        def eager(x=x, seeds=seeds, shape=shape):
            return 0.8 * x + 0.6 * fk.normal(seeds, shape[1:])

        bytes_each = x.numel() * 4
        yield Case(
            f"noising with drawn noise, {size}",
            {f"lincomb ({way})": By(way, ours) for way in ways("lincomb", device)}
            | {"normal, then eager torch": eager},
            truth,
            streams(1, 1, x.numel(), torch.float32, device),
            bytes_each,
            bytes_each,
            2 * bytes_each,
            device=device,
        )


def gram(device: str, small: bool) -> Iterator[Case]:
    """All products, sums and absolute sums of two, four and six tensors."""
    for size, shape in sizes(small):
        for count in (2, 6) if small else (2, 4, 6):
            inputs = [torch.randn(shape, device=device) for _ in range(count)]

            def eager(*inputs: Tensor):
                z = torch.stack([x.flatten(1) for x in inputs], 1)
                return z @ z.transpose(1, 2), z.sum(-1), z.abs().sum(-1)

            compiled = torch.compile(eager, fullgraph=True, **({"backend": "eager"} if small else {}))
            moved = count * inputs[0].numel() * 4
            yield Case(
                f"gram of {count}, {size}",
                {f"gram ({way})": By(way, lambda inputs=inputs: list(fk.gram(inputs))) for way in ways("gram", device)}
                | {
                    "eager torch": lambda inputs=inputs, f=eager: f(*inputs),
                    "torch.compile": lambda inputs=inputs, f=compiled: f(*inputs),
                },
                lambda inputs=inputs, f=eager: f(*(x.double() for x in inputs)),
                streams(count, 0, inputs[0].numel(), torch.float32, device),
                moved,
                0,
                moved,
                least_percent=90 if size == "large" and count >= 4 else None,
                most_empty=None,
                device=device,
            )


def _with_gradients(function, a: Tensor, b: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (a, b)]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def distance(device: str, small: bool) -> Iterator[Case]:
    """A pseudo-Huber distance with both gradients."""
    for size, shape in sizes(small):
        a, b = (torch.randn(shape, device=device) for _ in range(2))

        def eager(a, b):
            return (torch.sqrt((a - b).square() + 9e-4) - 0.03).flatten(1).mean(1)

        def ours(a, b):
            return fk.pseudo_huber_elementwise(a, b, c=0.03)

        compiled = torch.compile(eager, fullgraph=True, **({"backend": "eager"} if small else {}))
        functions = {f"pseudo_huber_elementwise ({way})": (way, ours) for way in ways("distance", device)}
        candidates = {
            name: By(way, lambda f=f, a=a, b=b: _with_gradients(f, a, b)) for name, (way, f) in functions.items()
        }
        candidates["eager torch"] = lambda a=a, b=b, f=eager: _with_gradients(f, a, b)
        candidates["torch.compile"] = lambda a=a, b=b, f=compiled: _with_gradients(f, a, b)
        each = a.numel() * 4
        yield Case(
            f"pseudo-Huber distance and both gradients, {size}",
            candidates,
            lambda a=a, b=b, f=eager: _with_gradients(f, a.double(), b.double()),
            streams(4, 2, a.numel(), torch.float32, device),
            4 * each,
            2 * each,
            4 * each,
            bound=3e-5,  # eager cancels where a and b are close: some roundings more
            gradients=True,
            device=device,
        )


def threshold(device: str, small: bool) -> Iterator[Case]:
    """Dynamic thresholding at 0.995."""
    for size, shape in sizes(small)[:1]:
        x = 2 * torch.randn(shape, device=device)

        def eager(x):
            s = torch.quantile(x.abs().flatten(1), 0.995, dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
            return torch.clamp(x, -s, s) / s

        each = x.numel() * 4
        yield Case(
            f"dynamic thresholding at 0.995, {size}",
            {f"threshold ({way})": By(way, lambda x=x: fk.threshold(x, 0.995)) for way in ways("threshold", device)}
            | {"eager torch (torch.quantile)": lambda x=x, f=eager: f(x)},
            lambda x=x, f=eager: [f(x.double())],
            streams(3, 1, x.numel(), torch.float32, device),
            3 * each,
            each,
            2 * each,
            bound=1e-4,  # torch computes the rank in float32, which moves the quantile by a thousandth of a gap
            device=device,
        )

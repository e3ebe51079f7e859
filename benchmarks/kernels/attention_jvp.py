"""attention_jvp on a CPU against torch's ways to a tangent of attention, and against attention without one.

    OMP_NUM_THREADS=2 python benchmarks/kernels/attention_jvp.py

The floor is as many multiplications with an addition as the tangent needs, six for each score and column of a head, in
registers alone (peak.cpp, with as many threads; it needs g++). A tangent does three times the arithmetic of attention
alone, so three forward passes of torch's fused attention are measured too. No time is printed for a candidate whose
values fail against float64. On a GPU: benchmarks/gpu/networks.py.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import asked, interleaved, publish, summary
from torch import Tensor
from torch.func import jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep_kernels import attention, attention_jvp, backend, backends

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of relative error: some float32 roundings; some bfloat16 ones
CASES = (  # batch, heads, queries, keys, width
    ((64, 8, 16, 16, 32), torch.float32),
    ((16, 4, 64, 64, 32), torch.float32),
    ((4, 6, 256, 256, 64), torch.float32),
    ((4, 6, 256, 256, 64), torch.bfloat16),
    ((2, 8, 1024, 77, 40), torch.float32),
    ((1, 8, 1024, 1024, 40), torch.float32),
    ((1, 4, 1024, 1024, 128), torch.float32),
    ((1, 1, 4096, 4096, 40), torch.float32),
)
FLOOR = "same arithmetic in registers"
Candidate = Callable[[], object]


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in three operations, as networks write it to have a tangent."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def mathematical(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(functional.scaled_dot_product_attention, primals, tangents)


def by_reference(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with backends.asking("reference"):
        return attention_jvp(*primals, *tangents)


def three_times(primals: tuple[Tensor, ...]) -> Tensor:
    for _ in range(2):
        functional.scaled_dot_product_attention(*primals)
    return functional.scaled_dot_product_attention(*primals)


def candidates(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> dict[str, Candidate]:
    """Value and tangent in every way, ours first; then the value alone, three times."""
    compiled = torch.compile(attention_jvp, dynamic=False)  # a compiler sees the reference
    return {
        f"attention_jvp ({backend('attention_jvp', 'cpu')})": lambda: attention_jvp(*primals, *tangents),
        "func.jvp of attention": lambda: jvp(attention, primals, tangents),
        "reference": lambda: by_reference(primals, tangents),
        "torch.compile of the reference": lambda: compiled(*primals, *tangents),
        "func.jvp of SDPA, math": lambda: mathematical(primals, tangents),
        "func.jvp of three operations": lambda: jvp(written, primals, tangents),
        "SDPA forward, three times": lambda: three_times(primals),
    }


def error(found: object, expected: tuple[Tensor, ...]) -> float:
    parts = found if isinstance(found, tuple) else (found,)
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(parts, expected))


def peak() -> ctypes.CDLL:
    """peak.cpp, compiled for this processor. Raises CalledProcessError or FileNotFoundError without g++."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.multiply_add.argtypes, loaded.multiply_add.restype = [ctypes.c_int64] * 2, ctypes.c_float
    return loaded


def case(floor: ctypes.CDLL, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> dict:
    batch, heads, queries, keys, width = shape
    sizes = [(batch, heads, count, width) for count in (queries, keys, keys)]
    primals, tangents = (tuple(torch.randn(size).to(dtype) for size in sizes) for _ in range(2))
    multiplications = 6 * batch * heads * queries * keys * width
    moved = sum(2 * x.numel() * x.element_size() for x in (*primals, primals[0]))
    ways = candidates(primals, tangents)
    with torch.no_grad():
        truth = jvp(written, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
        for name, call in ways.items():
            # three operations round every score to bfloat16
            if not error(call(), truth) < BOUND[dtype]:
                raise SystemExit(f"{name} is wrong by {error(call(), truth)}: no times are printed.")
        del truth
        ways[FLOOR] = lambda: floor.multiply_add(multiplications, torch.get_num_threads())
        seconds = interleaved(ways, 20 if multiplications < 1 << 30 else 7)
    results = summary(seconds, next(iter(ways)), FLOOR, moved)
    return {
        "case": f"[{batch}, {heads}, {queries}, {width}]" + (f", {keys} keys" if keys != queries else ""),
        "dtype": str(dtype).removeprefix("torch."),
        "multiplications": multiplications,
        "moved_bytes": moved,
        "read_to_write": f"{(2 * keys + queries) / queries:.3g}:1",
        "results": results,
        "targets": asked(results, reference=1, SDPA_forward=1),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    floor = peak()
    torch.compiler.config.recompile_limit = torch._dynamo.config.recompile_limit = 2 * len(CASES)
    publish("kernels_attention_jvp", [case(floor, *given) for given in CASES])

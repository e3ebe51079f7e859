"""attention_jvp against torch's mathematical attention under forward mode, and against attention without a tangent.

    OMP_NUM_THREADS=2 python benchmarks/kernels/attention_jvp.py

On a CPU, float32. On a GPU, bfloat16 over head widths at 4096 tokens, with flash and cuDNN forward and, where it is
installed, jvp_flash_attention. The floor is the fastest attention without a tangent: a tangent does three times its
arithmetic. No time is printed for a candidate whose values fail against float64; what raises here is named.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from measure import interleaved, publish, summary
from torch.func import jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep_kernels import attention, attention_jvp, backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of relative error: some float32 roundings; some bfloat16 ones
SHAPES = {  # batch, heads, tokens, width
    "cpu": [(16, 4, 64, 32), (4, 6, 256, 64), (1, 8, 1024, 40), (1, 1, 4096, 40)],
    "cuda": [(4, 16, 4096, width) for width in (40, 64, 72, 80, 96, 128, 160, 256)],
}
Candidate = Callable[[], object]


def written(q, k, v):
    """Attention in three operations, as networks write it to have a tangent."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def under(kind: SDPBackend, call: Callable[[], object]) -> Candidate:
    def run() -> object:
        with sdpa_kernel(kind):
            return call()

    return run


def rivals(primals, tangents) -> tuple[dict[str, Candidate], dict[str, Candidate]]:
    """({name: value and tangent}, {name: value})."""
    torchs = functional.scaled_dot_product_attention
    carried: dict[str, Candidate] = {
        f"attention_jvp ({backend('attention_jvp', DEVICE)})": lambda: attention_jvp(*primals, *tangents),
        "func.jvp of attention": lambda: jvp(attention, primals, tangents),
        "func.jvp of SDPA, math": under(SDPBackend.MATH, lambda: jvp(torchs, primals, tangents)),
        "func.jvp of three operations": lambda: jvp(written, primals, tangents),
    }
    plain: dict[str, Candidate] = {"SDPA forward": lambda: torchs(*primals)}
    if DEVICE == "cuda":
        plain = {
            "flash forward": under(SDPBackend.FLASH_ATTENTION, plain["SDPA forward"]),
            "cuDNN forward": under(SDPBackend.CUDNN_ATTENTION, plain["SDPA forward"]),
        }
        try:
            from jvp_flash_attention.jvp_attention import JVPAttn
        except ImportError:
            print("jvp_flash_attention is not installed: not measured.")
        else:
            carried["jvp_flash_attention"] = lambda: jvp(JVPAttn.fwd_dual, primals, tangents)
    return carried, plain


def error(found, expected) -> float:
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, expected))


def checked(candidates: dict[str, Candidate], truth, ours: str) -> dict[str, Candidate]:
    """Those whose values are right. A rival that raises is named and left out; a wrong candidate ends the run."""
    kept = {}
    for name, call in candidates.items():
        try:
            found = call()
        except Exception as problem:  # whatever a rival raises on a shape it does not take
            if name == ours:
                raise
            print(f"{name} does not run here: {str(problem).splitlines()[0][:120]}")
            continue
        found = found if isinstance(found, tuple) else (found,)
        if not error(found, truth) < BOUND[DTYPE]:
            raise SystemExit(f"{name} is wrong by {error(found, truth)}: no times are printed.")
        kept[name] = call
    return kept


def synchronised(call: Candidate) -> Candidate:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run if DEVICE == "cuda" else call


def exact(primals, tangents):
    """Value and tangent in float64, a head at a time."""
    parts = []
    for head in range(primals[0].shape[1]):
        cut = [tuple(x[:, head : head + 1].double() for x in given) for given in (primals, tangents)]
        parts.append(attention_jvp(*cut[0], *cut[1]))
    return tuple(torch.cat(part, 1) for part in zip(*parts))


def case(batch: int, heads: int, tokens: int, width: int, rounds: int) -> dict:
    drawn = [torch.randn(batch, heads, tokens, width, device=DEVICE).to(DTYPE) for _ in range(6)]
    primals, tangents = tuple(drawn[:3]), tuple(drawn[3:])
    carried, plain = rivals(primals, tangents)
    ours = next(iter(carried))
    moved = 8 * drawn[0].numel() * drawn[0].element_size()
    with torch.no_grad():
        truth = exact(primals, tangents)
        # float64 tiles of our own are held to plain attention where that fits
        if tokens <= 1024:
            plain_truth = jvp(written, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
            if not error(truth, plain_truth) < 1e-12:
                raise SystemExit("the float64 truth is wrong: no times are printed.")
        forward = checked(plain, truth[:1], "")
        candidates = checked(carried, truth, ours) | forward
        del truth
        peak = None
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            attention_jvp(*primals, *tangents)
            peak = (torch.cuda.max_memory_allocated() - before + 6 * moved // 8) / moved
        seconds = interleaved({name: synchronised(call) for name, call in candidates.items()}, rounds)
    fastest = min(forward, key=lambda name: statistics.median(seconds[name]))
    return {
        "case": f"[{batch}, {heads}, {tokens}, {width}] {str(DTYPE).removeprefix('torch.')}, floor: {fastest}",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "moved_bytes": moved,
        "read_to_write": "3:1",
        "peak_memory_over_inputs_and_outputs": peak,
        "results": summary(seconds, ours, fastest, moved),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    publish(
        "kernels_attention_jvp" + ("_gpu" if DEVICE == "cuda" else ""),
        [case(*shape, rounds=20 if DEVICE == "cuda" or shape[2] < 1024 else 5) for shape in SHAPES[DEVICE]],
    )

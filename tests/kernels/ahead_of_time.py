"""Triton kernels compiled for GPUs that are not here, and facts about their machine code.

A test module gives `compiled` a program that ends with `report({name: variant})`, where variant(capability) is
(ASTSource, options), or None where that pair is not asked for. It runs in a process of its own, without Triton's
interpreter; the facts are kept in .cache until a source or Triton changes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "kernels"
CAPABILITIES = (80, 90, 100)


def triton_before(*version: int) -> bool:
    """Whether the Triton here is older: its compiler gives other numbers of registers to the same kernel."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < version


def python(program: str, *arguments: str, **environment: str) -> str:
    """What a Python program prints; fails with its last words."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


_asked: list[tuple] = []  # (variant, capability, source, options)


def _facts(place: int) -> dict:
    """What is told of one variant for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    name, capability, source, options = _asked[place]
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    ptx = kernel.asm["ptx"]
    return {
        "variant": name,
        "capability": capability,
        "registers": int(found[1]),
        "spills": int(found[2]) + int(found[3]),
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory_columns": getattr(kernel.metadata, "tmem_size", None) or 0,
        "vector_loads": len(re.findall(r"ld\.global[.\w]*\.v[24]\.b(?:32|64) ", ptx)),
        "narrow_loads": len(re.findall(r"ld\.global\.b(?:16|32|64) ", ptx)),
        "copies": len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ptx)),
        "narrow_copies": len(re.findall(r"cp\.async\.ca\.shared\.global", ptx)),
        "vector_stores": len(re.findall(r"st\.global[.\w]*\.v[24]\.b(?:32|64) ", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "matrix_instructions": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx)),
    }


def report(variants: dict, capabilities: Iterable[int] = CAPABILITIES) -> None:
    """Compile {name: capability -> (ASTSource, options) or None} for every architecture, on every core, and print the
    facts."""
    for name, variant in variants.items():
        for capability in capabilities:
            found = variant(capability)
            if found is not None:
                _asked.append((name, capability, *found))
    # forked, since sources hold functions of the program handed to -c, which cannot be sent
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(_facts, range(len(_asked))))
    print(json.dumps(rows))


def compiled(program: str, sources: Iterable[Path]) -> list[dict]:
    """The facts a program reports, kept until it, a source, this file or Triton changes."""
    import triton

    digest = hashlib.sha256((triton.__version__ + program).encode())
    for path in (*sources, Path(__file__)):
        digest.update(path.read_bytes())
    kept = CACHE / f"{digest.hexdigest()[:24]}.json"
    if not kept.is_file():
        rows = json.loads(python(program, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(CACHE / "triton")))
        CACHE.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(rows, indent=1))
        part.replace(kept)
    return json.loads(kept.read_text())

"""What is compiled ahead of time is all there is: every Triton kernel has a variant, and CUDA C++'s machine code is
held to the same limits. Nothing here has run on a GPU."""

import collections
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from fewstep_kernels import native
from tests.kernels.ahead_of_time import CAPABILITIES, ROOT

triton = pytest.importorskip("triton")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LIBRARY = Path(native.__file__).parent / "_lib" / "libfewstep_cuda.so"
PROGRAMS = ("test_triton", "test_reductions_triton", "test_normalisation_triton", "test_attention_jvp_triton")
STACK = 64  # bytes a thread: where ten inputs, several outputs and drawn noise take all registers


def test_every_triton_kernel_that_is_launched_is_compiled_ahead_of_time():
    launched = set()
    for path in (ROOT / "kernels" / "fewstep_kernels").glob("*.py"):
        launched |= set(re.findall(r"\b(\w+_kernel)\[", path.read_text()))
    programs = "".join(importlib.import_module(f"tests.kernels.{name}").COMPILED for name in PROGRAMS)
    assert len(launched) >= 12
    assert {name for name in launched if not re.search(rf"\b{name}\b", programs)} == set()


def _listing(*options: str) -> str:
    if not LIBRARY.is_file():
        pytest.skip("libfewstep_cuda.so was not built: there is no nvcc")
    return subprocess.run([CUOBJDUMP, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def _name(symbol: str) -> str:
    return re.sub(r"^_ZN\d+_GLOBAL__N__\w{8}_\d+_\w+?_cu_\w{8}\d+", "", symbol)


def test_cuda_kernels_exist_for_every_architecture_and_hardly_spill():
    found = collections.defaultdict(set)
    architecture = 0
    for line in _listing("-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = _name(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", line):
            found[architecture].add(name)
            registers, stack, local = (int(x) for x in match.groups())
            assert registers <= 128 and local == 0, (name, architecture, registers, local)
            assert stack <= (STACK if name.startswith("lincomb_kernel") else 16), (name, architecture, stack)
    assert set(found) == set(CAPABILITIES)
    assert len({frozenset(names) for names in found.values()}) == 1 and len(found[90]) >= 20


def test_cuda_kernels_move_sixteen_bytes_at_a_time():
    loads, stores = collections.Counter(), collections.Counter()
    name = ""
    for line in _listing("-sass", "-arch", "sm_90").splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = _name(match[1])
        loads[name if "LDG.E.128" in line else ""] += 1
        stores[name if "STG.E.128" in line else ""] += 1
    for stem in ("lincomb_kernel", "ema_kernel", "adamw_ema_kernel", "squares_kernel"):
        assert any(name.startswith(stem) for name in loads), stem
    for name in {*loads, *stores} - {""}:
        assert loads[name] or name.startswith("draw_kernel"), name
        assert stores[name] or name.startswith("squares_kernel"), name

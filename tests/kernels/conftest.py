"""What tests run under: the C++ library as processors with fewer instructions would run it, a backend of attention."""

import os
import shutil
from pathlib import Path

import pytest

from fewstep_kernels import attention_primal, backends, native

CACHES = (native.cpu, backends.override, backends._missing, backends.choose)


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def instructions(request, monkeypatch, tmp_path):
    """The C++ library loaded anew, told to use at most these instructions."""
    library = Path(native.__file__).parent / "_lib" / "libfewstep_cpu.so"
    if not library.is_file():
        pytest.skip("libfewstep_cpu.so was not built")
    (tmp_path / "_lib").mkdir()
    shutil.copy(library, tmp_path / "_lib")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setitem(os.environ, "FEWSTEP_INSTRUCTIONS", request.param)
    for cache in CACHES:
        cache.cache_clear()
    try:
        if native.cpu().instructions != request.param:
            pytest.skip(f"this processor offers {native.cpu().instructions}, not {request.param}")
        yield request.param
    finally:
        monkeypatch.undo()
        for cache in CACHES:
            cache.cache_clear()


@pytest.fixture(params=("one tile", "tiles", "cpu"))
def attention_backend(request, monkeypatch):
    """attention_jvp by its reference, in one tile or in many small ones, and by C++."""
    if request.param == "cpu" and native.cpu().missing:
        pytest.skip(native.cpu().missing)
    if request.param == "tiles":
        monkeypatch.setattr(attention_primal, "SCORES", 60)
        monkeypatch.setattr(attention_primal, "ROWS", 3)
    with backends.asking("cpu" if request.param == "cpu" else "reference"):
        yield request.param

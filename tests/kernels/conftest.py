"""The C++ library as processors with fewer instructions would run it."""

import os
import shutil
from pathlib import Path

import pytest

from fewstep_kernels import backends, native

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
    if native.cpu().instructions != request.param:
        pytest.skip(f"this processor offers {native.cpu().instructions}, not {request.param}")
    yield request.param
    monkeypatch.undo()
    for cache in CACHES:
        cache.cache_clear()

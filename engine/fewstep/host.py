"""Two settings of the process that decide how fast small networks run on a CPU. Call before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt parameters (malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def prepare() -> None:
    """Keep freed memory, and let waiting threads sleep.

    By default glibc gives each large tensor back to the system and asks for it anew: every operation then pays for
    fresh, zeroed pages. OpenMP threads spin while they wait: where another program holds a core, two threads can be
    many times slower than one. What the user set stays. Measured in benchmarks/results/host.json.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 29)
        mallopt(_TRIM_THRESHOLD, 1 << 30)

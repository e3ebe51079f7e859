"""fewstep: large diffusion and flow teachers, distilled to students of one to four network calls."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep import analytic as analytic
    from fewstep import methods as methods
    from fewstep import solvers as solvers
    from fewstep.diffusion import Denoiser as Denoiser
    from fewstep.diffusion import schedules as schedules
    from fewstep.runtime import load as load
    from fewstep.solvers import grids as grids
    from fewstep.solvers import sample as sample

_PUBLIC = {
    "Denoiser": ("fewstep.diffusion", "Denoiser"),
    "analytic": ("fewstep.analytic", None),
    "grids": ("fewstep.solvers.grids", None),
    "load": ("fewstep.runtime", "load"),
    "methods": ("fewstep.methods", None),
    "sample": ("fewstep.solvers", "sample"),
    "schedules": ("fewstep.diffusion.schedules", None),
    "solvers": ("fewstep.solvers", None),
}

__all__ = ["Denoiser", "analytic", "grids", "load", "methods", "sample", "schedules", "solvers"]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use so that `import fewstep` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}; it has: {', '.join(__all__)}.")
    module, attribute = _PUBLIC[name]
    found = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

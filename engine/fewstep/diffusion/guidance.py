"""How a network's outputs combine into the guided one: forms of guidance as data.

Classifier-free guidance is F = w cond + (1 - w) uncond (2207.12598, eq. 6, with w = 1 + its w). Conversions between
prediction types are affine with the same coefficient on x for both outputs, so guiding F, x0 or eps is the same thing
for every form that is linear in the outputs with weights that sum to one.

A form is a frozen value (see guidance_forms); `get` makes one of a number or of {"name": name, option: value}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.guidance_forms import FORMS, Guidance, PlusPlus
from fewstep.diffusion.real import Number, Real
from fewstep.errors import UserError, choose

__all__ = ["FORMS", "Guidance", "PlusPlus", "coefficients", "get", "is_guided", "joined", "names", "per_step", "shown"]


def names() -> list[str]:
    """The forms `get` knows."""
    return sorted(FORMS)


def get(given: float | Mapping[str, Any] | Guidance | None) -> Guidance | None:
    """A form of guidance: a number is classifier-free guidance, {"name": name, option: value} any, None none."""
    if given is None or isinstance(given, Guidance):
        return given
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return Guidance(given)
    if not isinstance(given, Mapping):
        raise UserError(
            f"guidance is {given!r}; give a number, None, a form (such as {{'name': 'cfg', 'scale': 3.0}}) or one of "
            "these per step."
        )
    name = given.get("name", "cfg")
    form = FORMS.get(name) if isinstance(name, str) else None
    if form is None:
        raise choose("guidance", name, FORMS)
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key != "name"}
    known = [field.name for field in dataclasses.fields(form)]
    for option in options:
        if option not in known:
            raise choose(f"option of guidance {form.name!r},", option, known)
    if "scale" not in options:
        raise UserError(f"guidance {form.name!r} got no scale; give one, for example {{'scale': 3.0}}.")
    return form(**options)


def per_step(given: Any, ratios: Sequence[float]) -> list[Guidance | None]:
    """The form that acts in each step, from one for all or one per step; `ratios` are sigma/alpha where steps start."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    forms = [get(one) for one in given] if several else [get(given)] * len(ratios)
    if len(forms) != len(ratios):
        raise UserError(f"guidance has {len(forms)} entries for {len(ratios)} steps; give one number, or one per step.")
    return [
        form if form is not None and form.acts and form.within(step, ratio) else None
        for step, (form, ratio) in enumerate(zip(forms, ratios))
    ]


def shown(given: Any) -> Any:
    """`given` as JSON holds it."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [shown(one) for one in given]
    if isinstance(given, Mapping):
        given = get(given)
    if isinstance(given, Guidance):
        return given.to_dict()
    return None if given is None else float(given)


def is_guided(guidance: Real | None) -> bool:
    """Whether a scale needs the unconditional output at all (None and 1.0 do not)."""
    return guidance is not None and (isinstance(guidance, Tensor) or float(guidance) != 1.0)


def coefficients(guidance: Real) -> tuple[Number, Number]:
    """(of cond, of uncond)."""
    return guidance, 1.0 - guidance


def joined(first: Any, *others: Any, out: Any = None) -> Any:
    """Conditions as one of larger batch: tensors are concatenated, tuples, lists and dicts item by item."""
    every = (first, *others)
    if all(isinstance(one, Tensor) for one in every):
        return torch.cat(every, out=out) if out is not None else torch.cat(every)
    if all(isinstance(one, dict) and one.keys() == first.keys() for one in every):
        return {key: joined(*(one[key] for one in every), out=out[key] if out else None) for key in first}
    if all(isinstance(one, (tuple, list)) and len(one) == len(first) for one in every):
        return type(first)(joined(*items, out=out[i] if out else None) for i, items in enumerate(zip(*every)))
    if all(one is None for one in every):
        return None
    kinds = ", ".join(type(one).__name__ for one in others)
    raise UserError(
        f"guidance joins the condition ({type(first).__name__}) and the unconditional one ({kinds}) in "
        "one call; give both as tensors, or as tuples or dicts of tensors of one structure."
    )

"""Forms of guidance as frozen values: what the network is asked, and how the answers are weighed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fewstep.diffusion import prediction as predictions
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError, choose

SPACES = ("output", "denoised")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """uncond + w (cond - uncond), classifier-free guidance, and what all forms share.

    `scale` is w. A form acts in steps `start` to `stop` (excluded; None: to the end) whose noise level sigma/alpha is
    above `sigma_low` and at most `sigma_high` (guidance interval, 2404.07724); elsewhere the conditional output stands
    alone and no other is asked. A step's level is the one it starts from, for all its evaluations.
    """

    name: ClassVar[str] = "cfg"
    roles: ClassVar[tuple[str, ...]] = ()
    scale: float
    start: int = 0
    stop: int | None = None
    sigma_low: float | None = None
    sigma_high: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if (value is None and "None" in kind) or kind.startswith(("tuple", "str")):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if kind.startswith("int") and not (number and value == int(value) and value >= 0):
                raise UserError(f"{field.name} of guidance {self.name!r} is {value!r}; give a whole number from 0.")
            if not number:
                raise UserError(f"{field.name} of guidance {self.name!r} is {value!r}; give a number.")
            object.__setattr__(self, field.name, int(value) if kind.startswith("int") else float(value))
        if self.stop is not None and self.stop < self.start:
            raise UserError(
                f"guidance {self.name!r} acts from step {self.start} to {self.stop}; give 0 <= start <= stop."
            )
        if self.sigma_low is not None and self.sigma_high is not None and self.sigma_low >= self.sigma_high:
            raise UserError(
                f"guidance {self.name!r} acts where sigma/alpha is above {self.sigma_low:g} and at most "
                f"{self.sigma_high:g}; give sigma_low < sigma_high."
            )

    def _bounded(self, option: str, low: float, high: float = math.inf) -> None:
        """UserError where a number is not from `low` to `high`."""
        value = getattr(self, option)
        if not low <= value <= high:
            bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"from {low:g}"
            raise UserError(f"{option} of guidance {self.name!r} is {value!r}; give a number {bounds}.")

    @property
    def acts(self) -> bool:
        """Whether it changes the conditional output at all."""
        return self.scale != 1.0

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the network is asked."""
        return ("cond", "uncond")

    def weights(self) -> dict[str, float] | None:
        """Weights of the raw outputs by column; None where they are not constants."""
        return {"cond": self.scale, "uncond": 1.0 - self.scale}

    def within(self, step: int, ratio: float) -> bool:
        """Whether it acts in this step, which starts from sigma/alpha = ratio."""
        low = -math.inf if self.sigma_low is None else self.sigma_low
        high = math.inf if self.sigma_high is None else self.sigma_high
        return self.start <= step < (math.inf if self.stop is None else self.stop) and low < ratio <= high

    def to_dict(self) -> dict[str, Any]:
        """What `get` reads back; options at their defaults are left out."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {
            "name": self.name,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        }


@dataclasses.dataclass(frozen=True)
class PlusPlus(Guidance):
    """CFG++ (2406.08070): the clean estimate is guided, with w in [0, 1], the noise estimate is the unconditional one.

    Solvers have rows of their own for it: ddim, euler, dpmpp_2m. w = 1 is not the absence of guidance.
    """

    name = "cfg++"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bounded("scale", 0.0, 1.0)

    @property
    def acts(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Autoguidance(Guidance):
    """D_weak + w (D - D_weak), with a weaker network in the role "weak" (2406.02507), told the same condition.

    `prediction` is the weak network's prediction type where it is not the plan's: a name or its dictionary.
    """

    name = "autoguidance"
    roles = ("weak",)
    prediction: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of_weak(Prediction("x0"))

    def __hash__(self) -> int:
        return hash((self.scale, str(self.prediction)))

    @property
    def conditions(self) -> tuple[str, ...]:
        return ("cond",)

    def of_weak(self, own: Prediction) -> Prediction:
        """The weak network's prediction type."""
        if self.prediction is None:
            return own
        if isinstance(self.prediction, Mapping):
            return predictions.from_dict(self.prediction)
        return predictions.get(self.prediction)

    def weights(self) -> dict[str, float] | None:
        return None


@dataclasses.dataclass(frozen=True)
class Perturbed(Guidance):
    """uncond + w (cond - uncond) + v (cond - perturbed), v = `perturbed_scale`; the role "perturbed" is the network
    with its attention perturbed or layers skipped (PAG 2403.17377; SEG, SLG). With w = 1 uncond is not asked.
    """

    name = "perturbed"
    roles = ("perturbed",)
    perturbed_scale: float = 3.0

    @property
    def acts(self) -> bool:
        return self.scale != 1.0 or self.perturbed_scale != 0.0

    @property
    def conditions(self) -> tuple[str, ...]:
        return ("cond",) if self.scale == 1.0 else ("cond", "uncond")

    def weights(self) -> dict[str, float] | None:
        own = {"cond": self.scale + self.perturbed_scale, "uncond": 1.0 - self.scale}
        return {**{name: own[name] for name in self.conditions}, "perturbed": -self.perturbed_scale}


@dataclasses.dataclass(frozen=True)
class Classifier(Guidance):
    """eps - s sigma g, with g(x, t, cond) = grad_x log p(cond | x_t) from the role "gradient" (2105.05233, algorithm
    2), asked with the unscaled x and the schedule's own network time; s = `scale`.
    """

    name = "classifier"
    roles = ("gradient",)

    @property
    def acts(self) -> bool:
        return self.scale != 0.0

    @property
    def conditions(self) -> tuple[str, ...]:
        return ("cond",)

    def weights(self) -> dict[str, float] | None:
        return None


@dataclasses.dataclass(frozen=True)
class GramGuidance(Guidance):
    """Forms whose weights follow from inner products of the outputs, sample by sample (see `gram_guidance`).

    `of` says what they weigh: the network's outputs, as they come, or clean-sample estimates made of them.
    """

    of: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in SPACES:
            raise choose(f"of in guidance {self.name!r},", self.of, SPACES)

    def weights(self) -> dict[str, float] | None:
        return None

    def numbers(self) -> dict[str, Any]:
        """The options of its function in `gram_guidance`."""
        shared = {field.name for field in dataclasses.fields(GramGuidance)} - {"scale"}
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in {*shared, "scale"}
        }
        return {"guidance": self.scale, **own}


@dataclasses.dataclass(frozen=True)
class Rescaled(GramGuidance):
    """Guidance that keeps the conditional output's standard deviation, to the share `rescale` (2305.08891, eq. 15)."""

    name = "rescale"
    rescale: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bounded("rescale", 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Projected(GramGuidance):
    """APG (2410.02416, algorithm 1): of the difference, bounded to `radius`, the share `parallel` of its part along
    cond is kept; `momentum` (usually negative) adds earlier differences. On clean estimates, as the paper has it.
    """

    name = "apg"
    of: str = "denoised"
    parallel: float = 0.0
    radius: float | None = None
    momentum: float = 0.0
    base: str = "cond"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in ("cond", "uncond"):
            raise choose("base of guidance 'apg',", self.base, ("cond", "uncond"))
        if self.radius is not None and self.radius <= 0.0:
            raise UserError(f"radius of guidance 'apg' is {self.radius!r}; give a number above 0, or None.")

    @property
    def acts(self) -> bool:
        return self.scale != 1.0 or self.base == "uncond"


@dataclasses.dataclass(frozen=True)
class Perpendicular(GramGuidance):
    """Away from negative conditions only where they do not oppose the positive one (Perp-Neg, 2304.04968).

    `weights_of` holds one weight for each of one to four negatives, whose conditions a run is given as `negatives`.
    """

    name = "perp_neg"
    weights_of: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.weights_of if isinstance(self.weights_of, (tuple, list)) else ()
        fit = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given)
        fit = fit and all(math.isfinite(value) for value in given)
        if not 1 <= len(given) <= 4 or not fit:
            raise UserError(
                f"weights_of in guidance 'perp_neg' is {self.weights_of!r}; give one number for each of one to four "
                "negatives."
            )
        object.__setattr__(self, "weights_of", tuple(float(value) for value in given))

    @property
    def acts(self) -> bool:
        return True

    @property
    def conditions(self) -> tuple[str, ...]:
        return ("cond", "uncond", *(f"negative {number}" for number in range(len(self.weights_of))))


@dataclasses.dataclass(frozen=True)
class ZeroStar(GramGuidance):
    """CFG-Zero* (2503.18886): uncond scaled to its projection on cond; the first `zero_steps` outputs are zero."""

    name = "cfg_zero_star"
    zero_steps: int = 1

    @property
    def acts(self) -> bool:
        return self.scale != 1.0 or self.zero_steps > 0

    def numbers(self) -> dict[str, Any]:
        return {"guidance": self.scale}


@dataclasses.dataclass(frozen=True)
class Magnitude(GramGuidance):
    """MAMBO-G (2508.03442): w shrinks to 1 + (w - 1) e^(-a |cond - uncond| / |uncond|), a = `decay`."""

    name = "mambo_g"
    decay: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bounded("decay", 0.0)


@dataclasses.dataclass(frozen=True)
class Tangential(GramGuidance):
    """TCFG (2503.18137): uncond without its part along the second singular direction of the two outputs."""

    name = "tcfg"


FORMS: dict[str, type[Guidance]] = {
    form.name: form
    for form in (
        Guidance,
        PlusPlus,
        Autoguidance,
        Perturbed,
        Classifier,
        Rescaled,
        Projected,
        Perpendicular,
        ZeroStar,
        Magnitude,
        Tangential,
    )
}
FORMS["interval"] = Guidance  # the name its paper gives to plain guidance with bounds

"""Writes the measured orders into docs/solvers.md; test_orders.py holds the page to them.

python -m tests.solvers.orders_page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.solvers import test_laws, test_orders

PAGE = Path(__file__).parents[2] / "docs" / "solvers.md"
GRIDS = {"log_snr": "even", "graded": "graded", "jagged": "jagged", "karras": "karras"}


def named(solver: str, options: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"`{solver}({given})`" if given else f"`{solver}`"


def table() -> list[str]:
    """The page's rows, ODE solvers first, then stochastic ones (weak orders)."""
    rows = ["| sampler | steps in lambda | order by theory | 64 to 128 steps | 128 to 256 |", "|---|---|---|---|---|"]
    for number, (solver, order, grid, options) in enumerate(test_orders.CASES):
        early, late = test_orders.measured("mixture", number)
        rows.append(f"| {named(solver, options)} | {GRIDS.get(grid, grid)} | {order} | {early:.2f} | {late:.2f} |")
    for number, (solver, order, options) in enumerate(test_laws.CASES):
        early, late = test_laws.measured(number)
        # a restart's own points grow with the grid, and are no option to repeat
        given = {} if solver == "restart" else options
        rows.append(f"| {named(solver, given)} | even | weak {order} | {early:.2f} | {late:.2f} |")
    return rows


# (published, what is right instead): each a row of the cases, by solver, grid (none: a weak order) and options
PAIRS = [
    (("dpmpp_3m", "graded", {"curvature": "half_weight"}), ("dpmpp_3m", "graded", {})),
    (("dpmpp_3m_sde", None, {"curvature": "wrong_sign"}), ("dpmpp_3m_sde", None, {})),
    (("unipc", "log_snr", {"order": 3, "lower_order_final": True}), ("unipc", "graded", {"order": 3})),
    (("sa", "log_snr", {"strength": 0.0, "lower_order_final": True}), ("sa", "graded", {"strength": 0.0})),
    (
        ("sa", "log_snr", {"predictor": 2, "corrector": 1, "strength": 0.0}),
        ("sa", "log_snr", {"predictor": 2, "corrector": 2, "strength": 0.0}),
    ),
    (("plms", "log_snr", {"mixed": "output"}), ("plms", "log_snr", {})),
    (("ipndm", "jagged", {}), ("ipndm_v", "jagged", {})),
    (
        ("ipndm_v", "jagged", {"order": 3, "third": "misplaced_parenthesis"}),
        ("ipndm_v", "jagged", {"order": 3}),
    ),
    (
        ("ipndm_v", "graded", {"third": "misplaced_parenthesis", "fourth": "unbalanced"}),
        ("ipndm_v", "graded", {}),
    ),
    (
        ("dpmpp_3s", None, {"strength": 1.0, "variant": "taylor", "curvature": "wrong_sign"}),
        ("dpmpp_3s", None, {"strength": 1.0, "variant": "taylor"}),
    ),
    (("dpmpp_2s", None, {"strength": 1.0}), ("dpmpp_2m_sde", None, {})),
]


def late(solver: str, grid: str | None, options: Mapping[str, Any]) -> float:
    """The order from 128 to 256 steps of the case with these names."""
    if grid is None:
        found = [
            number for number, (name, _, given) in enumerate(test_laws.CASES) if (name, given) == (solver, options)
        ]
        return test_laws.measured(found[0])[1]
    wanted = {"predictor": 3, "corrector": 4} | dict(options) if solver == "sa" else options
    found = [
        number
        for number, (name, _, on, given) in enumerate(test_orders.CASES)
        if (name, on) == (solver, grid) and given in (options, wanted)
    ]
    return test_orders.measured("mixture", found[0])[1]


def pairs() -> list[str]:
    """Published samplers beside those that are right, with their orders."""
    rows = ["| published | order | right | order |", "|---|---|---|---|"]
    for published, right in PAIRS:
        (one, _, given), (other, _, instead) = published, right
        sides = [f"{named(one, given)} | {late(*published):.2f}", f"{named(other, instead)} | {late(*right):.2f}"]
        rows.append(f"| {' | '.join(sides)} |")
    return rows


REGIONS: dict[str, Callable[[], list[str]]] = {"pairs": pairs, "orders": table}


def ends(name: str) -> tuple[str, str]:
    """The lines around a region of the page."""
    return f"<!-- {name}: written by python -m tests.solvers.orders_page -->\n", f"<!-- end of {name} -->\n"


def written(name: str) -> list[str]:
    """The rows that stand on the page."""
    text, (begin, end) = PAGE.read_text(encoding="utf-8"), ends(name)
    return text[text.index(begin) + len(begin) : text.index(end)].strip().split("\n")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, made in REGIONS.items():
        begin, end = ends(name)
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = before + "\n".join(made()) + "\n" + after
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

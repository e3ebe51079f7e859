"""Fused operators for few-step samplers and their training; each `reference` in plain torch defines the result."""

from .backends import backend, report
from .ema import ema_update
from .inner_products import inner_products
from .lincomb import lincomb
from .noise import normal, uniform

__all__ = ["backend", "ema_update", "inner_products", "lincomb", "normal", "report", "uniform"]

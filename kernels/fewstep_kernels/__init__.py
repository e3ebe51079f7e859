"""Fused operators for few-step samplers and their training; `reference` implementations in plain torch define every result."""

from .backends import backend, report
from .ema import ema_update
from .inner_products import inner_products
from .lincomb import lincomb
from .noise import normal, uniform

__all__ = ["backend", "report", "ema_update", "inner_products", "lincomb", "normal", "uniform"]

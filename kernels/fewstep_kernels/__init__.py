"""Fused operators for few-step samplers and their training; `reference` implementations in plain torch define every result."""

from .ema import ema_update
from .inner_products import inner_products
from .lincomb import lincomb
from .noise import normal, uniform

__all__ = ["ema_update", "inner_products", "lincomb", "normal", "uniform"]

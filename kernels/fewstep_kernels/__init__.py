"""Fused operators for few-step samplers and their training; each `reference` in plain torch defines the result."""

from .attention_jvp import attention, attention_jvp, carrying_tangents, scaled_dot_product_attention
from .backends import backend, report
from .ema import ema_update
from .inner_products import inner_products
from .lincomb import lincomb
from .noise import normal, uniform

__all__ = [
    "attention",
    "attention_jvp",
    "backend",
    "carrying_tangents",
    "ema_update",
    "inner_products",
    "lincomb",
    "normal",
    "report",
    "scaled_dot_product_attention",
    "uniform",
]

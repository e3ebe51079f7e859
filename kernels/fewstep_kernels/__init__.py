"""Fused operators for few-step samplers and their training; each `reference` in plain torch defines the result."""

from . import backends, decay_profiles, interpreter
from .adamw_ema import adamw_ema_step
from .attention_jvp import attention, attention_jvp, carrying_tangents, scaled_dot_product_attention
from .backends import backend, report
from .distance import l1, l2, pseudo_huber, pseudo_huber_elementwise
from .ema import ema_update
from .gram import Gram, gram
from .group_norm_silu import group_norm_silu
from .inner_products import inner_products
from .l2norm import clip_coefficient, multi_tensor_l2norm
from .lincomb import lincomb
from .noise import normal, uniform
from .norm_modulate import layer_norm_modulate, rms_norm_modulate
from .optimizer import AdamWEma
from .self_test import self_test
from .threshold import threshold

if backends.interpreting():
    interpreter.repair()

__all__ = [
    "AdamWEma",
    "Gram",
    "adamw_ema_step",
    "attention",
    "attention_jvp",
    "backend",
    "carrying_tangents",
    "clip_coefficient",
    "decay_profiles",
    "ema_update",
    "gram",
    "group_norm_silu",
    "inner_products",
    "l1",
    "l2",
    "layer_norm_modulate",
    "lincomb",
    "multi_tensor_l2norm",
    "normal",
    "pseudo_huber",
    "pseudo_huber_elementwise",
    "report",
    "rms_norm_modulate",
    "scaled_dot_product_attention",
    "self_test",
    "threshold",
    "uniform",
]

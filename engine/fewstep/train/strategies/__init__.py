"""How training is spread over processes: single, ddp, deepspeed."""

from fewstep.train.strategies.base import Engine, Strategy
from fewstep.train.strategies.launch import launch, launched, start

__all__ = ["Engine", "Strategy", "launch", "launched", "start"]

"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP): the update in hand is finished and a checkpoint written; a second
one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(SystemExit):
    """One of these, after the checkpoint was written; leaves the process with code 130."""

    def __init__(self, sentence: str) -> None:
        super().__init__(130)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Signals:
    """Inside, these signals call `stop` once each, unless they are ignored (nohup); a second one acts as usual."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._received)

    def _received(self, number: int, _frame: Any) -> None:
        self.stop()
        signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

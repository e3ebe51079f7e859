"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP): the update in hand is finished and a checkpoint written; a second
one stops at once."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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
    """Inside, these signals call `stop`, unless they are ignored (nohup); a second one acts as usual, but for SIGHUP,
    which a closed terminal and the shell in it both send."""

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
        if number != signal.SIGHUP:
            signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def outliving_the_terminal() -> Iterator[None]:
    """Inside, a line for a terminal or a pipe that was closed is lost, and no error; so are all after it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE) or error.filename is not None:
            raise
        with contextlib.suppress(OSError, ValueError):  # a stream that has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())  # else what waits in its buffer makes the exit code 120
            os.close(nowhere)

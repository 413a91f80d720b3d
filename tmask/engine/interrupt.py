"""Ctrl-C and SIGTERM during training: the first signal asks for a stop after the update, the second stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as shells have it: 130 for SIGINT, 143 for SIGTERM
        self.checkpoint_step: int | None = None  # step of the run's checkpoint on disk; None before the first


class StopSignals:
    """Within ``with``: the first SIGINT or SIGTERM is noted in ``number``, the second one raises Interrupted.

    Inside `at_once` the first signal raises too. At the end the former handlers come back. Python allows handlers in
    the main thread only; in another thread nothing is noted. A signal that the process ignores stays ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: a handler that Python did not install and could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal break off this block at once; a signal noted before does so at the start."""
        self._at_once = True
        try:
            if self.number is not None:
                raise Interrupted(self.number)
            yield
        finally:
            self._at_once = False

    @contextlib.contextmanager
    def workers_later(self) -> Iterator[None]:
        """Delay the error about a dead data worker to the end of this block; torch's handler would raise anywhere.

        A loader that waits for the dead worker still raises inside the block.
        """
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            yield
            return
        died: list[int] = []

        def note(number: int, _: FrameType | None) -> None:
            died.append(number)

        before = signal.signal(signal.SIGCHLD, note)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGCHLD) is note:  # else torch set its handler here, with the first worker
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        if died and callable(before):
            before(signal.SIGCHLD, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data worker just forked; only the trainer decides
        if self.number is not None or self._at_once:
            raise Interrupted(number)
        self.number = number
        # os.write, not print: the handler may run in the middle of another write to the same stream.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")

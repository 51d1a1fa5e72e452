"""Stopping a run between two steps when the user or the system asks for it."""

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, Ctrl-C and a termination signal only set a mark; calling the object says whether it is set.

    patient: further signals change nothing (torchrun sends on what the terminal has sent already). Otherwise a second
    one ends the process at once.
    """

    def __init__(self, *, patient: bool) -> None:
        self.signal: signal.Signals | None = None
        self._patient = patient
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._mark)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell gives a process that ended by the signal: 130 for Ctrl-C, 143 for termination."""
        return 128 + (self.signal or signal.SIGINT)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and not self._patient:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

"""Medians of functions that take turns, so that a noisy moment of the machine meets all of them."""

import os
import statistics
import time
from collections.abc import Callable, Mapping

Function = Callable[[], object]

BUSY = 0.5
"""Load average from which results carry a warning. Where others take the cores, two threads that wait for each other
have been measured 100 times too slow, and peers as much as ours."""


def load_average() -> float:
    """How many programs wanted a core, on average over the last minute; 0 where the system does not say (Windows)."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def medians(functions: Mapping[str, Function], *, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds a call, by name.

    In a round each function is called in turn, about ``seconds`` long; every other round goes through them backwards,
    so that none always follows the same one.
    """
    repeats = {name: _repeats(function, seconds) for name, function in functions.items()}
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            measured[name].append(_seconds(functions[name], repeats[name]))
    return {name: statistics.median(times) for name, times in measured.items()}


def _repeats(function: Function, seconds: float) -> int:
    function()  # the first call prepares: weights are put in order, buffers are allocated
    once = _seconds(function, 1)
    if once < seconds / 4:
        once = _seconds(function, max(1, int(seconds / 4 / once))) if once > 0 else once
    return max(1, round(seconds / max(once, 1e-7)))


def _seconds(function: Function, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats

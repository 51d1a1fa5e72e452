"""A contest: one piece of work on one shape, done by our kernels and by their peers, and what we want to reach."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitorch_engine.cli.bench.timing import Function, medians


@dataclass(frozen=True)
class Goal:
    """So many times as fast as the best peer of a kind: at every shape, and in the geometric mean of the shapes."""

    row: str
    ours: str
    kind: str
    """What the names of the peers begin with: "int8" for "int8: torch x86"."""
    must: float | None = None
    aim: float | None = None
    on_average: bool = False
    """Whether ``must`` too is for the geometric mean."""


@dataclass(frozen=True)
class Contest:
    """``prepare()`` gives the functions to be timed, ours under the names that the goals say, then the peers."""

    work: str
    shape: str
    goals: Sequence[Goal]
    prepare: Callable[[], dict[str, Function]]
    seconds: float = 0.004
    measure: Callable[..., dict[str, float]] = medians
    trains: bool = False
    """Whether it is a step of training; all else is measured in torch.inference_mode."""


@dataclass(frozen=True)
class Result:
    """Seconds of every function of a contest, or why there are none."""

    work: str
    shape: str
    seconds: dict[str, float]
    goals: Sequence[Goal] = ()
    missing: str = ""

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints; microseconds."""
        times = {name: round(seconds * 1e6, 2) for name, seconds in self.seconds.items()}
        return {"work": self.work, "shape": self.shape, "microseconds": times, "missing": self.missing}

    @staticmethod
    def of_json(record: dict[str, Any], contests: Iterable[Contest]) -> "Result":
        """The reverse; the goals are those of the contest of that name today."""
        times = {name: microseconds / 1e6 for name, microseconds in record["microseconds"].items()}
        names = (record["work"], record["shape"])
        goals = next((contest.goals for contest in contests if (contest.work, contest.shape) == names), ())
        return Result(*names, times, goals, record["missing"])


def run(contest: Contest, *, rounds: int) -> Result:
    """Time a contest."""
    try:
        functions = contest.prepare()
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # an operator that this torch does not have
        return Result(contest.work, contest.shape, {}, contest.goals, f"{type(error).__name__}: {error}".split("\n")[0])
    with torch.inference_mode(not contest.trains):
        seconds = contest.measure(functions, rounds=rounds, seconds=contest.seconds)
    return Result(contest.work, contest.shape, seconds, contest.goals)


@dataclass(frozen=True)
class Ratio:
    """How our time compares with the best peer of a kind on one shape."""

    shape: str
    ours: float
    peer: str
    theirs: float

    @property
    def value(self) -> float:
        return self.theirs / self.ours


@dataclass(frozen=True)
class Verdict:
    """A goal and what was reached."""

    goal: Goal
    ratios: Sequence[Ratio]

    @property
    def worst(self) -> Ratio:
        return min(self.ratios, key=lambda ratio: ratio.value)

    @property
    def mean(self) -> float:
        """Geometric."""
        return math.exp(sum(math.log(ratio.value) for ratio in self.ratios) / len(self.ratios))

    @property
    def peer_wins(self) -> list[Ratio]:
        return [ratio for ratio in self.ratios if ratio.value < 1]

    @property
    def word(self) -> str:
        """What of the goal is reached, at every shape (must, but for goals on average) and in the mean (aim)."""
        must, aim = self.goal.must, self.goal.aim
        if must is not None and (self.mean if self.goal.on_average else self.worst.value) < must:
            return "MISSED"
        if aim is not None and self.mean < aim:
            return "must"
        return "" if must is None else "must, aim"


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """One for each goal that has a measurement, in the order in which the goals come first."""
    found: dict[tuple[str, str], tuple[Goal, list[Ratio]]] = {}
    for result in results:
        for goal in result.goals:
            peers = {name: s for name, s in result.seconds.items() if name.startswith(f"{goal.kind}: ")}
            if goal.ours in result.seconds and peers:
                best = min(peers, key=lambda name: peers[name])
                ratio = Ratio(result.shape, result.seconds[goal.ours], best, peers[best])
                found.setdefault((goal.row, goal.kind), (goal, []))[1].append(ratio)
    return [Verdict(goal, ratios) for goal, ratios in found.values()]


HEADS = ("work", "against the best", "every shape", "mean", "peer wins")


def table(found: Iterable[Verdict]) -> list[list[str]]:
    """Cells under HEADS: how many times as fast as the peer."""
    rows = []
    for verdict in found:
        goal, count = verdict.goal, len(verdict.ratios)
        ends = f"{verdict.worst.value:.2f} – {max(ratio.value for ratio in verdict.ratios):.2f}"
        if count == 1:
            ends = f"{verdict.mean:.2f}"
        wins = f"{len(verdict.peer_wins)} of {count}" if verdict.peer_wins else ""
        rows.append([goal.row, goal.kind, ends, f"{verdict.mean:.2f}", wins])
    return rows

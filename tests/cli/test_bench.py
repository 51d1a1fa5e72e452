"""``bitorch-engine bench``: what it judges, and that it runs; its numbers are not looked at."""

import importlib
import json

import pytest
import torch
from click.testing import CliRunner

from bitorch_engine.cli.app import app
from bitorch_engine.cli.bench.contest import Contest, Goal, Result, run, table, verdicts
from bitorch_engine.cli.bench.timing import medians

GOAL = Goal("conv", "ours", "int8", must=1.0, aim=2.0)


def result(shape: str, **seconds: float) -> Result:
    return Result("conv", shape, {name.replace("_", ": "): s for name, s in seconds.items()}, [GOAL])


def test_a_ratio_is_the_fastest_peers_time_over_ours() -> None:
    (verdict,) = verdicts([result("a", ours=2.0, int8_slow=9.0, int8_fast=6.0, fp32_other=1.0)])
    assert (verdict.worst.value, verdict.worst.peer) == (3.0, "int8: fast")
    assert verdict.word == "must, aim"


def test_must_is_judged_at_every_shape_and_aim_in_the_geometric_mean() -> None:
    (verdict,) = verdicts([result("a", ours=1.0, int8_x=8.0), result("b", ours=1.0, int8_x=0.5)])
    assert (verdict.mean, verdict.word) == (pytest.approx(2.0), "MISSED")
    assert [ratio.shape for ratio in verdict.peer_wins] == ["b"]
    assert table([verdict]) == [["conv", "int8", "0.50 – 8.00", "2.00", "1 of 2"]]
    (verdict,) = verdicts([result("a", ours=1.0, int8_x=1.5)])
    assert verdict.word == "must"


def test_a_goal_on_average_is_judged_in_the_geometric_mean_alone() -> None:
    goal = Goal("conv", "ours", "int8", must=1.5, aim=2.0, on_average=True)
    results = [
        Result("conv", shape, {"ours": 1.0, "int8: x": time}, [goal]) for shape, time in (("a", 4.0), ("b", 1.0))
    ]
    assert verdicts(results)[0].word == "must, aim"


def test_a_contest_is_measured_by_its_own_clock() -> None:
    contest = Contest("conv", "a", [GOAL], lambda: {"ours": int}, measure=lambda functions, **how: {"ours": 3.0})
    assert run(contest, rounds=1).seconds == {"ours": 3.0}


def test_all_but_training_is_measured_in_inference_mode() -> None:
    seen: list[bool] = []

    def measure(functions: object, **how: object) -> dict[str, float]:
        seen.append(torch.is_inference_mode_enabled())
        return {}

    for trains in (False, True):
        run(Contest("conv", "a", [GOAL], dict, measure=measure, trains=trains), rounds=1)
    assert seen == [True, False]


def test_a_goal_without_a_peer_or_without_ours_is_left_out() -> None:
    assert verdicts([result("a", ours=1.0, fp32_x=1.0), result("b", int8_x=1.0)]) == []


def test_what_cannot_be_prepared_is_reported_not_raised() -> None:
    def prepare() -> dict[str, object]:
        raise NotImplementedError("no such operator\nand more")

    missing = run(Contest("conv", "a", [GOAL], prepare), rounds=1)  # type: ignore[arg-type]
    assert (missing.seconds, missing.missing) == ({}, "NotImplementedError: no such operator")


def test_functions_take_turns_and_every_other_round_goes_backwards() -> None:
    calls: list[str] = []
    found = medians({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, seconds=0)  # type: ignore[misc]
    assert calls[-4:] == ["a", "b", "b", "a"]
    assert set(found) == {"a", "b"}


def test_results_go_through_json() -> None:
    one = result("a", ours=2e-6, int8_x=6e-6)
    contest = Contest("conv", "a", [GOAL], dict)
    assert Result.of_json(json.loads(json.dumps(one.as_json())), [contest]) == one


def test_the_command_measures_what_is_asked_for_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    arguments = ["bench", "--only", "depthwise*", "--rounds", "1", "--threads", "2"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    (measured,) = record["results"]
    assert measured["work"] == "depthwise conv"
    assert measured["microseconds"]["w4a8"] > 0
    assert record["machine"]["threads"] == 2
    assert torch.get_num_threads() == before
    text = CliRunner().invoke(app, arguments).stdout
    assert "depthwise" in text
    assert "2 threads" in text
    if not torch.cuda.is_available():
        assert "Not measured: the GPU's kernels; torch finds no CUDA device." in text


MODULE = importlib.import_module("bitorch_engine.cli.bench.command")  # the package has the command by that name


def test_in_80_columns_no_number_is_cut_and_our_goals_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    goal = Goal("int4 linear, 1 row, cold, float32 precision high", "ours", "onnxruntime int4", 9, 9)
    times = {"a": 0.5, "b": 10.25}
    MODULE.show(
        [Result("linear", n, {"ours": 1.0, "onnxruntime int4: x": t}, [goal]) for n, t in times.items()], 1, 0.0
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "onnxruntime int4" in line)
    assert row.split()[-7:] == ["0.50", "–", "10.25", "2.26", "1", "of", "2"]
    assert not any(word in line for line in lines for word in ("MISSED", "must", "busy"))


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (3.14159, 0.0, 0.0), raising=False)
    monkeypatch.setattr(MODULE, "contests", lambda: [Contest("conv", "a", [GOAL], lambda: {"ours": int})])
    assert json.loads(CliRunner().invoke(app, ["bench", "--only", "conv*", "--json"]).stdout)["machine"]["load"] == 3.14
    text = " ".join(CliRunner().invoke(app, ["bench", "--only", "conv*"]).stdout.split())
    assert "busy with other work (load 3.14 before this began): these numbers are not to be relied on." in text


def test_what_to_install_is_named_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(MODULE, "has_onnxruntime", lambda: False)
    MODULE.show([Result("conv", "a", {}, [GOAL], "needs x[y]")], 1, 0.0)
    text = " ".join(capsys.readouterr().out.split())
    assert "pip install 'bitorch_engine[bench]' compares" in text
    assert "Not measured: conv a: needs x[y]" in text


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    done = CliRunner().invoke(app, ["bench", "--only", "pooling"])
    assert done.exit_code == 2
    assert "Error: no contest fits --only pooling; they are conv 64-64 56x56 3x3, " in done.output

"""Packed weights under torch.optim and torch.distributed: every kind of layer trains, and all ranks hold the same bits.

Run as a program it is one of the ranks of ``RANKS``; see ``run_rank``.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bitorch_engine import nBitConv2d, nBitConvParameter, nBitConvTranspose2d, nBitLinear
from bitorch_engine.optim import DiodeMix
from bitorch_engine.parameters import PackedParameter

RANKS, STEPS, EVERY = 2, 50, 10


class Network(nn.Module):
    """A plain and a grouped transposed packed convolution, of 2 and of 8 bits, between float layers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nBitConv2d(3, 8, 3, w_bit=2, **settings)
        self.norm = nn.BatchNorm2d(8)
        self.up = nBitConvTranspose2d(8, 4, 2, groups=2, w_bit=8, **settings)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def batch_loss(network: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 6, 6, generator=generator)
    return F.mse_loss(network(x), torch.stack([x[:, i % 3].mean((1, 2)) + 0.2 * i for i in range(5)], 1))


def packed_of(network: nn.Module) -> list[PackedParameter]:
    return [p for p in network.parameters() if isinstance(p, PackedParameter)]


def stored(network: nn.Module) -> dict[str, Any]:
    """What all parameters of a network hold, as tensors and plain values that can be sent to the test."""
    held: dict[str, Any] = {}
    for name, p in network.named_parameters():
        if isinstance(p, PackedParameter):
            inner = {"codes": p.packed, "residual": p.residual, "scale": p.channel_scale, "moments": p.scale_moments}
            held |= {f"{name} {key}": None if t is None else t.clone() for key, t in inner.items()}
            held |= {f"{name} noise": (p.noise_seed, p.noise_step, p.grad_exponent)}
        else:
            held[name] = p.detach().clone()
    return held


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or bool(x == y)

    return [name for name in a.keys() | b.keys() if not equal(a.get(name), b.get(name))]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **k: torch.optim.SGD(p, lr=0.1, **k),
    "SGD momentum": lambda p, **k: torch.optim.SGD(p, lr=0.02, momentum=0.9, **k),
    "SGD nesterov": lambda p, **k: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, **k),
    "Adam": lambda p, **k: torch.optim.Adam(p, lr=0.01, **k),
    "AdamW": lambda p, **k: torch.optim.AdamW(p, lr=0.01, **k),
    "NAdam": lambda p, **k: torch.optim.NAdam(p, lr=0.01, **k),
    "RAdam": lambda p, **k: torch.optim.RAdam(p, lr=0.02, **k),
    "Adamax": lambda p, **k: torch.optim.Adamax(p, lr=0.01, **k),
    "Adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=0.05, **k),
    "Adadelta": lambda p, **k: torch.optim.Adadelta(p, lr=2.0, **k),
    "RMSprop": lambda p, **k: torch.optim.RMSprop(p, lr=0.003, **k),
    "Rprop": lambda p, **k: torch.optim.Rprop(p, lr=0.003, **k),
    "ASGD": lambda p, **k: torch.optim.ASGD(p, lr=0.1, **k),
}
FUSED = ("SGD", "SGD momentum", "SGD nesterov", "Adam", "AdamW", "Adagrad")
REFUSED = [(name, "foreach") for name in OPTIMIZERS] + [(name, "fused") for name in FUSED]


class TestOptimizers:
    """One plain convolution of 4 bits is trained with each of them in test_dispatch."""

    @pytest.mark.parametrize("settings", [{}, {"a_bit": 8, "g_bit": 8}], ids=["float", "a_bit=8-g_bit=8"])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_it_trains_layers_of_every_layout_beside_float_ones(self, name: str, settings: dict[str, Any]) -> None:
        network = Network(**settings)
        optimizer = OPTIMIZERS[name](network.parameters())
        first = batch_loss(network, 0).item()
        codes, scales = ([getattr(p, key).clone() for p in packed_of(network)] for key in ("codes", "channel_scale"))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = batch_loss(network, 0)
            loss.backward()
            return loss

        for _ in range(25):
            optimizer.step(closure)
        assert batch_loss(network, 0).item() < 0.6 * first
        for p, old_codes, scale in zip(packed_of(network), codes, scales, strict=True):
            assert type(p) is nBitConvParameter and p.dtype == torch.float32
            assert not torch.equal(p.codes, old_codes)
            assert torch.equal(p.channel_scale, scale)

    @pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
    @pytest.mark.parametrize(("name", "mode"), REFUSED)
    def test_multi_tensor_steps_are_refused_before_anything_has_changed(self, name: str, mode: str, steps: int) -> None:
        network = Network()
        optimizer = OPTIMIZERS[name](network.parameters(), **{mode: steps == 0})
        for step in range(steps):
            optimizer.zero_grad()
            batch_loss(network, step).backward()
            optimizer.step()
        optimizer.param_groups[0][mode] = True
        optimizer.zero_grad()
        batch_loss(network, steps).backward()
        before, state = stored(network), copy.deepcopy(optimizer.state_dict()["state"])
        assert steps or not state or set(state[0]) <= {"sum", "step"}  # Adagrad makes its state when it is made
        with pytest.raises(NotImplementedError, match=rf"\({mode}=True\) is not supported for packed weights"):
            optimizer.step()
        assert differing(stored(network), before) == []
        now = optimizer.state_dict()["state"]
        assert now.keys() == state.keys() and not any(differing(now[i], state[i]) for i in now)
        optimizer.param_groups[0][mode] = False  # and so it goes on
        optimizer.step()
        assert not torch.equal(network.up.weight.packed, before["up.weight codes"])

    def test_a_closure_is_not_called_where_the_step_is_refused(self) -> None:
        optimizer = torch.optim.AdamW(Network().parameters(), foreach=True)
        with pytest.raises(NotImplementedError, match="AdamW\\(foreach=True\\)"):
            optimizer.step(lambda: pytest.fail("called"))
        assert not optimizer.state

    @pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
    def test_lbfgs_is_refused_before_anything_has_changed(self, line_search: str | None) -> None:
        network = Network()
        batch_loss(network, 0).backward()
        before = stored(network)
        optimizer = torch.optim.LBFGS(network.parameters(), line_search_fn=line_search)
        with pytest.raises(NotImplementedError, match="need a first-order optimizer, got LBFGS: .* use bitorch_engine"):
            optimizer.step(lambda: pytest.fail("called"))
        assert differing(stored(network), before) == [] and not optimizer.state
        floats = [p for p in network.parameters() if not isinstance(p, PackedParameter)]
        torch.optim.LBFGS(floats).step(lambda: batch_loss(network, 0))  # of float weights it may be

    def test_groups_without_packed_weights_may_use_them(self) -> None:
        network = Network()
        packed = packed_of(network)
        others = [p for p in network.parameters() if not isinstance(p, PackedParameter)]
        optimizer = torch.optim.AdamW([{"params": others, "foreach": True}, {"params": packed}], lr=0.01)
        before = stored(network)
        batch_loss(network, 0).backward()
        optimizer.step()
        changed = differing(stored(network), before)
        assert {"head.weight", "norm.weight", "up.weight codes", "conv.weight residual"} <= set(changed)


class TestWrites:
    @pytest.mark.parametrize("layout", [{}, {"transposed": True, "groups": 2}], ids=["plain", "transposed"])
    @pytest.mark.parametrize("w_bit", range(1, 9))
    def test_values_on_the_grid_are_exact_and_leave_noise_and_generator_alone(
        self, w_bit: int, layout: dict[str, Any]
    ) -> None:
        weight = nBitConvParameter(torch.randn(6, 4, 3, 3), w_bit=w_bit, **layout)
        for _ in range(3):
            weight.update(weight, lr=0.01, grad=torch.randn(weight.shape))
        other = copy.deepcopy(weight)
        other.update(other, lr=0.5, grad=torch.randn(weight.shape))
        values, generator = other.dequantize(), torch.get_rng_state()
        assert not torch.equal(weight.codes, other.codes)
        with torch.no_grad():
            weight.copy_(values)
        assert torch.equal(weight.dequantize(), values) and torch.equal(weight.codes, other.codes)
        assert weight.noise_step == 3 and torch.equal(torch.get_rng_state(), generator)

    @pytest.mark.parametrize("w_bit", [1, 3, 4, 8])
    def test_values_off_the_grid_are_right_in_the_mean_of_many_noise_steps(self, w_bit: int) -> None:
        form, trials = nBitConvParameter(torch.zeros(1), w_bit=w_bit).format, 200
        level = 1.0 / 256
        scale = level * 2**form.hidden_bits / form.step
        weight = nBitConvParameter(torch.randn(40) * 0.1, w_bit=w_bit, scale=torch.tensor([scale]).expand(40))
        weight.require_residual_()
        values = (torch.rand(40) - 0.5) * 0.8
        total, generator = torch.zeros(40, dtype=torch.float64), torch.get_rng_state()
        for trial in range(trials):
            copied = copy.deepcopy(weight)
            copied.noise_step = trial
            copied.write_(values)
            assert copied.noise_step == trial + 1
            written = copied.level_values().view(-1)
            assert float((written - values).abs().max()) < 1.001 * level
            total += written
        assert torch.equal(torch.get_rng_state(), generator)
        # each of 40 means has a standard deviation of at most level / 2 / sqrt(trials)
        assert float((total / trials - values).abs().max()) < 5 * level / 2 / trials**0.5


class TestAverages:
    def test_a_list_of_averages_is_refused_with_what_to_do(self) -> None:
        model = nBitLinear(6, 4)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        averaged.update_parameters(model)
        with pytest.raises(
            NotImplementedError, match=r"average weight\.dequantize\(\), and put it back with quantize_"
        ):
            averaged.update_parameters(model)

    def test_the_recipe_keeps_moves_that_are_smaller_than_a_code(self) -> None:
        model = nBitLinear(60, 40, w_bit=3)
        start, optimizer = model.weight.dequantize(), DiodeMix(model.parameters(), lr=1e-3)
        with torch.no_grad():
            averages = {name: p.dequantize().clone() for name, p in model.named_parameters()}
        for _ in range(50):
            model.weight.grad, model.bias.grad = torch.ones(40, 60), torch.ones(40)
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    averages[name].lerp_(p.dequantize(), 0.01)
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(averages, strict=False)
        error = averaged.weight.dequantize() - averages["weight"]
        assert float(error.square().mean()) < 0.06 * float(averages["weight"].square().mean())
        assert model.weight.dequantize().mean() < averaged.weight.dequantize().mean() < start.mean()
        assert torch.equal(averaged.bias, averages["bias"])


# -- several ranks -----------------------------------------------------------------------------------------------------

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "same seed": {},
    "different seed per rank": {"seeds": (0, 1)},
    "a_bit=8 and g_bit=8": {"seeds": (0, 1), "settings": {"a_bit": 8, "g_bit": 8}},
    "learned scales, channel memory": {"settings": {"learn_scale": True}, "memory": "channel"},
    "GaLore": {"seeds": (0, 1), "group": {"rank": 2, "update_proj_gap": 20, "proj_type": "full"}},
    "torch.optim.AdamW": {"seeds": (0, 1), "optimizer": torch.optim.AdamW},
}


def train_case(case: Case, rank: int) -> list[dict[str, Any]]:
    """What the network of this rank holds at the start and after every ``EVERY`` steps, and its loss."""
    torch.manual_seed(case.get("seeds", (0, 0))[rank])
    network = Network(**case.get("settings", {}))
    model = nn.parallel.DistributedDataParallel(network)
    if "optimizer" in case:
        optimizer = case["optimizer"](model.parameters(), lr=0.01)
    else:
        groups = [{"params": model.parameters(), **case.get("group", {})}]
        optimizer = DiodeMix(groups, lr=0.01, weight_decay=0.01, memory=case.get("memory", "8bit"))
    seen = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            model.eval()
            with torch.no_grad():
                loss = 0.0 if step == 0 else batch_loss(network, -1).item()
            model.train()
            seen.append(stored(network) | {"loss": loss})
        optimizer.zero_grad()
        batch_loss(model, RANKS * step + rank).backward()  # each rank its own data
        optimizer.step()
    return seen


FIRST_BATCHES = [
    "one of each rank",
    "one is empty",
    "8 bits, largest on rank 0, smallest on rank 1",
    "rank 0 was first",
    "rank 1 was first",
    "rank 1 was first, and buffers stay",
    "compiled",
]


def first_batches(name: str, rank: int) -> dict[str, Tensor]:
    """Scale and range that each rank has after a first batch in DistributedDataParallel; hangs where one waits."""
    torch.manual_seed(0)
    layer = nBitLinear(6, 4, a_bit=8 if name.startswith("8 bits") else 4)
    model = nn.parallel.DistributedDataParallel(layer, broadcast_buffers=not name.endswith("buffers stay"))
    batch = torch.rand(8, 6) * (1 + rank) - rank
    if name.startswith("8 bits") and rank == 0:
        batch *= 3
    alone = nBitLinear(6, 4, a_bit=4)
    if rank == 1:  # a layer that this rank alone has
        alone(batch)
    if name.startswith(f"rank {rank} was first"):
        layer(batch * 100)
    if name == "compiled":
        model = nn.parallel.DistributedDataParallel(torch.compile(layer, backend="aot_eager"))
    model(batch[: 0 if name == "one is empty" and rank == 1 else 8]).sum().backward()
    assert layer.activation is not None
    return {"scale": layer.activation.initial_scale.clone(), "low": layer.activation.low.clone()}


def run_rank(folder: Path, rank: int) -> None:
    """All that a rank does. Its results are in ``folder / f"{rank}.pt"`` at the end."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=40))
    results: dict[str, Any] = {name: train_case(case, rank) for name, case in CASES.items()}

    for name in FIRST_BATCHES:
        results[name] = first_batches(name, rank)

    torch.manual_seed(rank)
    weight = nBitConvParameter(torch.randn(6, 4, 3, 3), w_bit=3, learn_scale=True)
    weight.update(weight, step=torch.zeros(()), lr=0.05, grad=torch.randn(weight.shape))
    holder = nn.ParameterDict({"weight": weight})
    before = stored(holder)
    with torch.no_grad():
        dist.broadcast(weight, src=0)
    after = stored(holder)
    weight.update(weight, step=torch.zeros(()), lr=0.05, grad=torch.ones(weight.shape))
    results["broadcast"] = [before, after, stored(holder)]

    try:
        DiodeMix([weight]).step_in_backward()
    except NotImplementedError as error:
        results["step_in_backward"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has to say, from one launch for all cases."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    processes = []
    try:
        for rank in range(RANKS):
            log = (folder / f"{rank}.log").open("w")
            with log:
                command = [sys.executable, __file__, str(folder), str(rank)]
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(RANKS))
    assert codes == [0] * RANKS, logs
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


class TestRanks:
    @pytest.mark.parametrize("case", CASES)
    def test_all_ranks_hold_the_same_bits(self, results: list[dict[str, Any]], case: str) -> None:
        first, second = (result[case] for result in results)
        assert len(first) == len(second) == STEPS // EVERY + 1
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            a, b = ({k: v for k, v in x.items() if k != "loss"} for x in (a, b))
            assert differing(a, b) == [], f"after {i * EVERY} steps"

    @pytest.mark.parametrize("case", CASES)
    def test_the_network_trains(self, results: list[dict[str, Any]], case: str) -> None:
        seen = results[0][case]
        for old, new in pairwise(seen):
            assert {"conv.weight codes", "up.weight codes", "conv.weight residual"} <= set(differing(old, new))
        assert seen[-1]["loss"] < seen[1]["loss"]

    @pytest.mark.parametrize("name", FIRST_BATCHES)
    def test_the_first_batches_of_all_ranks_set_one_scale(self, results: list[dict[str, Any]], name: str) -> None:
        first, second = (result[name] for result in results)
        assert first["scale"] > 0 and first == second
        torch.manual_seed(0)
        nBitLinear(6, 4, a_bit=4)
        batches = [torch.rand(8, 6)]
        batches.append(batches[0] * 2 - 1)
        if name.startswith("8 bits"):
            assert float(first["low"]) == -128
            assert float(first["scale"]) == pytest.approx(3 * float(batches[0].max()) / 127, rel=1e-5)
            return
        whole = {
            "one is empty": batches[0],
            "rank 0 was first": 100 * batches[0],
            "rank 1 was first, and buffers stay": 100 * batches[1],
        }
        # A rank that was first alone has its scale from rank 0, as DistributedDataParallel sends buffers.
        x = whole.get(name, torch.cat(batches))
        signed = bool((x < 0).any())
        assert float(first["low"]) == (-8 if signed else 0)
        high = 7 if signed else 15
        assert float(first["scale"]) == pytest.approx(2 * float(x.abs().mean()) / high**0.5, rel=1e-5)

    def test_a_broadcast_makes_the_bits_those_of_rank_0(self, results: list[dict[str, Any]]) -> None:
        (before0, after0, stepped0), (before1, after1, stepped1) = (result["broadcast"] for result in results)
        bits = [f"weight {name}" for name in ("codes", "residual", "scale", "moments")]
        assert set(bits) <= set(differing(before0, before1))  # else it would show nothing
        assert not {*bits} & {*differing(before0, after0)}
        assert differing(after0, after1) == []
        assert differing(stepped0, stepped1) == []
        assert set(bits) <= set(differing(after0, stepped0))

    def test_step_in_backward_is_refused_on_several_ranks(self, results: list[dict[str, Any]]) -> None:
        for result in results:
            assert "step_in_backward steps before gradients are averaged over ranks" in result["step_in_backward"]


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))

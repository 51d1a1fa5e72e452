"""Kernels follow torch's number of threads, give the same at each, and run in forked workers."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitorch_engine import nBitConv2d
from bitorch_engine.ops import cpu, pack, unpack

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")
COUNT = 1 << 20  # values enough for several threads


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def values() -> Tensor:
    return torch.randint(0, 8, (COUNT,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def running_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def round_trip() -> bool:
    x = values()
    return torch.equal(unpack(pack(x, 3), 3, COUNT), x)


class Worker(Dataset[Tensor]):
    """Runs kernels where a sample is loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        layer = nBitConv2d(16, 16, 3, padding=1, w_bit=2, a_bit=2)
        with torch.no_grad():
            assert layer(torch.ones(4, 16, 16, 16)).isfinite().all()
        return torch.tensor([round_trip(), torch.get_num_threads()])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    torch.set_num_threads(1)
    expected = pack(values(), 3)
    torch.set_num_threads(threads)
    assert torch.equal(pack(values(), 3), expected)
    assert torch.equal(unpack(expected, 3, COUNT), values())


# torch warns of a fork after its autograd threads have run; ours are OpenMP's.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # where there is one core
def test_forked_workers_run_kernels_after_the_parent_used_two_threads() -> None:
    assert round_trip()
    loader = DataLoader(Worker(), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [batch.tolist() for batch in loader] == [[[1, 1]]] * 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_with_one_thread_runs_kernels() -> None:
    assert round_trip()
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            os._exit(0 if round_trip() else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_one_thread_starts_none() -> None:
    torch.set_num_threads(1)
    before = running_threads()
    assert round_trip()
    assert running_threads() == before

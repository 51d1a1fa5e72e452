"""The place of this process among the processes that train one model (torchrun), or alone."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from bitorch_engine.cli.errors import UsageError


@dataclass(frozen=True)
class Replica:
    """Rank of this process among ``world`` processes, and the device it trains on."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shard(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch; the parts of all processes are of one size."""
        return batch[self.rank :: self.world]

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over all processes."""
        if self.world == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over all processes."""
        return model if self.world == 1 else nn.parallel.DistributedDataParallel(model)

    def close(self) -> None:
        """Leave the group of processes."""
        if self.world > 1:
            dist.destroy_process_group()


def join(device: str) -> Replica:
    """This process's place, as torchrun's environment says; alone without it.  device: as for ``chosen_device``."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = chosen_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Replica(rank, world, chosen)


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names: ``auto`` is CUDA where there is one; ``cuda`` is this process's own GPU.

    Raises UsageError where it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot compute on the device {name}: {reason}") from None

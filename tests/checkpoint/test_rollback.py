"""Whatever happens to a run, it is as before if the body raises, and as the body left it if not."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitorch_engine.checkpoint.rollback import restored_on_error, rng_state, set_rng_state
from bitorch_engine.optim import DiodeMix

Network = Callable[..., nn.Sequential]
Bits = Callable[[Any], Any]


def havoc(model: nn.Sequential, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Do to a run all that loading one does, and worse."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
        model[4].weight.fill_(3.0)
        model[0].weight.drop_residual_()
    model[0].__class__ = nn.Conv2d
    model[0].weight = nn.Parameter(torch.zeros(1))
    model[1].running_mean = None
    del model[5].g_bit
    model[7].register_buffer("more", torch.zeros(1))
    del model[2]
    fresh = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    vars(optimizer).update(vars(fresh))
    scheduler.load_state_dict({"base_lrs": [3.0], "junk": 1})
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)


def havoc_that_fails(error: type[BaseException], run: Any) -> None:
    with restored_on_error(*run):
        havoc(*run)
        raise error


def make_run(network: Network) -> tuple[nn.Sequential, torch.optim.Optimizer, Any]:
    model = network()
    optimizer = DiodeMix(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_is_as_before_where_the_body_raises(network: Network, bits_of: Bits, error: type[BaseException]) -> None:
    run = make_run(network)
    before, objects = bits_of([*run, rng_state()]), [id(p) for p in run[0].parameters()]
    with pytest.raises(error):
        havoc_that_fails(error, run)
    assert bits_of([*run, rng_state()]) == before
    assert [id(p) for p in run[0].parameters()] == objects
    run[0](torch.randn(2, 3, 8, 8)).sum().backward()
    run[1].step()


def test_what_the_body_did_stays_where_it_does_not_raise(network: Network) -> None:
    run = make_run(network)
    with restored_on_error(*run):
        havoc(*run)
    assert not run[0][0].weight.any()
    assert len(run[0]) == 7
    assert run[2].base_lrs == [3.0]


def test_random_numbers_come_again() -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), random.gauss(0, 1), np.random.randn(), random.random(), np.random.rand()]

    random.gauss(0, 1)  # leaves a second number to come, in both
    np.random.randn()
    state = rng_state()
    drawn = draw()
    draw()
    set_rng_state(state)
    assert draw() == drawn

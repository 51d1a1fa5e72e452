"""What every test starts from: one thread, seeded generators, and a hypothesis profile without deadlines."""

import os

import hypothesis
import pytest
import torch

if torch.cuda.device_count() == 0:  # the GPU's kernels are tested in Triton's interpreter; it reads this when it loads
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # results and timings do not depend on the machine's core count


class _TorchRandom:
    """torch's generator in the form that hypothesis seeds before each example, so that a failure can be replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis holds it weakly
hypothesis.register_random(_torch_random)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""What holds codes and steps them: the packed parameter and its update."""

from bitorch_engine.parameters import refusals  # noqa: F401 (registers itself with torch.optim)
from bitorch_engine.parameters.packed import PackedParameter

__all__ = ["PackedParameter"]

"""What holds codes and steps them: the packed parameter and its update."""

from bitorch_engine.parameters.packed import PackedParameter

__all__ = ["PackedParameter"]

"""``bitorch-engine bench``: how fast the kernels are on this computer, against torch's."""

from bitorch_engine.cli.bench.command import command

__all__ = ["command"]

"""Optimizers that step packed weights in place, and gradient projection."""

from bitorch_engine.optim.diode_mix import DiodeMix
from bitorch_engine.optim.galore_projector import GaLoreProjector

__all__ = ["DiodeMix", "GaLoreProjector"]

"""Files of models: for deployment, at their n bits, and for going on with training, exactly."""

from bitorch_engine.checkpoint.deployment import load, read_metadata, save
from bitorch_engine.checkpoint.format import CheckpointError
from bitorch_engine.checkpoint.training import load_training, save_training

__all__ = ["CheckpointError", "load", "load_training", "read_metadata", "save", "save_training"]

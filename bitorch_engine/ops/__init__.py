"""What can be computed on codes. Every op is defined by its plain-PyTorch reference; faster backends go over it."""

from bitorch_engine.ops import cpu
from bitorch_engine.ops.reference.conv import Convolution, multiply_exact
from bitorch_engine.ops.reference.levels import dither_levels, load_levels, store_levels_
from bitorch_engine.ops.reference.moments import moment_fits, new_moment
from bitorch_engine.ops.reference.noise import noise_bits, noise_key, uniform24
from bitorch_engine.ops.reference.update import SLICE, direction_, level_rate, tree_sum
from bitorch_engine.ops.schemas import add_, all_within, pack, unpack, update_

__all__ = [
    "SLICE",
    "Convolution",
    "add_",
    "all_within",
    "direction_",
    "dither_levels",
    "level_rate",
    "load_levels",
    "moment_fits",
    "multiply_exact",
    "new_moment",
    "noise_bits",
    "noise_key",
    "pack",
    "store_levels_",
    "tree_sum",
    "uniform24",
    "unpack",
    "update_",
]

cpu.register()

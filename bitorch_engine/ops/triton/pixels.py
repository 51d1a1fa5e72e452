"""Where the results of a phase lie, what they meet, and how their totals are stored; see ``geometry.Phase``."""

import triton
import triton.language as tl

from bitorch_engine.ops.triton.floats import narrowed


@triton.jit
def pixel_of(pixel, results):
    """(sample, z, y, x) of results that are counted through all samples."""
    rest, x = pixel // results[2], pixel % results[2]
    rest, y = rest // results[1], rest % results[1]
    return rest // results[0], rest % results[0], y, x


@triton.jit
def tap_of(tap, taps):
    """(z, y, x) of taps that are counted."""
    plane = taps[1] * taps[2]
    return tap // plane, tap // taps[2] % taps[1], tap % taps[2]


@triton.jit
def place_in(z, y, x, lengths):
    """The place in a map, and whether it is one."""
    return place_of(z, y, x, lengths), is_in(z, y, x, lengths)


@triton.jit
def place_of(z, y, x, lengths):
    """The place in a map; of a step in it, how far that leads."""
    return (z * lengths[1] + y) * lengths[2] + x


@triton.jit
def is_in(z, y, x, lengths):
    """Whether a place is in a map."""
    return (z >= 0) & (z < lengths[0]) & (y >= 0) & (y < lengths[1]) & (x >= 0) & (x < lengths[2])


@triton.jit
def weight_tap(z, y, x, first, every, kernel):
    """The weight's tap of a phase's."""
    return ((first[0] + z * every[0]) * kernel[1] + first[1] + y * every[1]) * kernel[2] + first[2] + x * every[2]


@triton.jit
def store_results(out, total, at, scales, lengths, first, every):
    """Store totals (pixels, channels) as floats; ``convolve.Scales`` says which.

    at: (sample, z, y, x) of the pixels, the channels, which of both there are, and how many channels the result has.
    """
    sample, z, y, x, channel, real, real_channel, channels = at
    channel_scale, scale, poison, bias, sample_scale = scales
    if channel_scale is not None:
        factor = tl.load(channel_scale + channel, mask=real_channel, other=0.0) * tl.load(scale)
        value = total.to(tl.float32) * factor[None, :]
        shift = tl.zeros_like(factor) if poison is None else tl.zeros_like(factor) + tl.load(poison)
        if bias is not None:
            shift += tl.load(bias + channel, mask=real_channel, other=0.0)
        value += shift[None, :]
    else:
        value = total.to(tl.float32) * tl.load(sample_scale + sample, mask=real, other=0.0)[:, None]
    to_z, to_y, to_x = first[0] + z * every[0], first[1] + y * every[1], first[2] + x * every[2]
    to = ((sample.to(tl.int64) * lengths[0] + to_z) * lengths[1] + to_y) * lengths[2] + to_x
    place = to[:, None] * channels + channel[None, :]
    tl.store(out + place, narrowed(value, out.dtype.element_ty), mask=real[:, None] & real_channel[None, :])

"""What autograd saves for backward, kept in a few bits per value.

    ReLU output, float             one bit each                the positive ones in n bits, each group with its range
    [0 .3 0 0 1.2 .7 0 .1 ...] ->  [0 1 0 0 1 1 0 1 ...]   +   [2 9 5 0 ...]  low .1, step .12

Rounding is random and unbiased, so that gradients are right on average (Chen et al. 2021, "ActNN", arXiv:2104.14129).
Tensors are worked on in blocks that fit the cache: what a float copy takes for a moment is bounded.
"""

import random
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from bitorch_engine import ops
from bitorch_engine.bits import bit_format


@dataclass
class SavedBytes:
    """What autograd has saved since the block began, each tensor counted once; that it is freed does not lower it.

    original_bytes: without compression, views of one storage together no more than the storage.  saved_bytes: as it is
    kept, tensors that were left alone included.
    Neither counts what there is anyway: parameters, ``keep``, tensor subclasses.
    """

    original_bytes: int = 0
    saved_bytes: int = 0


@contextmanager
def compress_saved_tensors(
    bits: int = 8, group_size: int = 256, *, min_numel: int = 1024, keep: Iterable[Tensor] = ()
) -> Iterator[SavedBytes]:
    """Within the block, autograd saves float tensors in ``bits`` (1 to 8) a value. Gives the block's ``SavedBytes``.

        with compress_saved_tensors(8) as saved:
            loss = loss_function(model(images), labels)
        loss.backward()                                 # inside or outside

    group_size: how many values share a range, at least 8; a group stays within one map of one sample and channel, or
    one row of a matrix.  min_numel: smaller tensors stay as they are.  keep: tensors that are held for other reasons
    (the batch of images, large buffers); they and their views stay too, as compressing them would only add to them.

    Signed values: the error is uniform, at most half a step either way, and does not depend on the value. Where no
    value is negative, zeros stay zero and positive values positive, so that ReLU's mask is exact; rounding is then to
    one of the neighbouring levels. Groups of equal values, and integer indices (of max pooling), are exact.
    On average over the noise a gradient is exact where backward is linear in what was saved (convolution, ``mul``), and
    otherwise (normalization, GELU, the sign of LeakyReLU's input) sees an argument that is off by that error.

    Left alone: parameters and other leaves that require grad, their views, autocast's copies of them; subclasses of
    Tensor; bool, uint8, complex and double; tensors with NaN, infinity, or a range that overflows.
    Each tensor is compressed once however many nodes save it, and decoded to its own strides anew for each use.
    In-place writes after a tensor was saved raise in backward as they do without compression.
    The noise follows ``torch.manual_seed``; entering the block draws one number from the default generator.
    """
    bit_format(bits)
    if group_size < 8:
        raise ValueError(f"group_size must be at least 8, got {group_size}: the range of a group alone takes 6 bytes.")
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in keep]
    dice = random.Random(int(torch.randint(1 << 62, (), device="cpu")))
    count = SavedBytes()
    counted: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
    seen: weakref.WeakValueDictionary[tuple[object, ...], _Saved] = weakref.WeakValueDictionary()

    def encode(tensor: Tensor) -> "_Floats | _Integers | None":
        source = _without_repetition(tensor.detach())
        if source.numel() < max(min_numel, 1) or _overlaps(source) or _is_cast_weight(tensor):
            return None
        code: _Floats | _Integers | None = None
        if source.dtype in _FLOATS:
            code = _Floats.encode(source, bits, group_size, dice)
        elif source.dtype in _INTEGERS:
            code = _Integers.encode(source)
        return code if code is not None and code.nbytes < source.nbytes else None

    @torch.no_grad()
    def save(tensor: Tensor) -> _Saved:
        if not _is_plain(tensor) or _is_weight(tensor):
            return _Saved(tensor)
        storage = tensor.untyped_storage()
        if any(reference() is storage for reference in kept):
            return _Saved(tensor)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        saved = seen.get(key)
        # An address is used again once its storage is freed: only the storage itself says that it is the same tensor.
        if saved is not None and saved.storage() is storage:
            return saved
        code = encode(tensor)
        before = counted.get(storage, 0)
        counted[storage] = min(before + _without_repetition(tensor).nbytes, storage.nbytes())
        original = counted[storage] - before
        count.original_bytes += original
        count.saved_bytes += original if code is None else code.nbytes
        saved = seen[key] = _Saved(tensor, code)
        saved.storage = weakref.ref(storage)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, _Saved.load):
        yield count


class _Saved:
    """One tensor as it is kept: itself, or its code. And how to tell that the original was written to meanwhile."""

    storage: "weakref.ref[torch.UntypedStorage]"

    def __init__(self, tensor: Tensor, code: "_Floats | _Integers | None" = None) -> None:
        # The result of a node leads to the node, and the node holds us: without detach() neither would be freed.
        self.tensor = tensor if tensor.is_leaf and code is None else tensor.detach()
        self.version = tensor._version
        self.code = code
        if code is not None:
            self.shape, self.stride = tensor.shape, tensor.stride()
            self.tensor.data = tensor.new_empty(0)  # lets the storage go; the version counter is still that of tensor

    def load(self) -> Tensor:
        """The tensor, for backward. Raises RuntimeError where the original was modified in place after it was saved."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"it is at version {self.tensor._version}; expected version {self.version} instead."
            )
        if self.code is None:
            return self.tensor
        tensor = self.tensor.new_empty(_extent(self.shape, self.stride)).as_strided(self.shape, self.stride)
        self.code.decode_into(_without_repetition(tensor))
        return tensor


# Which tensors are left alone ----------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _is_weight(tensor: Tensor) -> bool:
    """A parameter, frozen or not, another leaf that requires grad, or a view of one (``linear`` saves a transpose)."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)


def _is_cast_weight(tensor: Tensor) -> bool:
    """A copy in another dtype of a leaf that requires grad, or a view of it: what autocast makes of a weight."""
    node = (tensor if tensor._base is None else tensor._base).grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    source = node.next_functions[0][0]
    return source is not None and hasattr(source, "variable")  # only the node that accumulates a leaf's grad has one


def _overlaps(tensor: Tensor) -> bool:
    """Whether values share memory, as in the windows of ``unfold``."""
    return tensor.numel() > _extent(tensor.shape, tensor.stride())


# How a tensor is cut -------------------------------------------------------------------------------------------------

_SHORTEST_ROW = 32
"""Maps of fewer values share groups with their neighbours: the range of a group takes up to 6 bytes."""


def _block_size(device: torch.device) -> int:
    """Values worked on at a time: a few float copies fit the cache of a core; elsewhere, launches should be few."""
    return 1 << 18 if device.type == "cpu" else 1 << 21


def _extent(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements of storage from the first to the last one of a tensor that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _without_repetition(tensor: Tensor) -> Tensor:
    """The view of ``tensor`` in which dimensions that ``expand`` made have length 1."""
    return tensor[tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())]


def _row_length(shape: torch.Size) -> int:
    """Values of one map of (samples, channels, *map), of one row of a matrix, or of all where those are short."""
    for leading in (2, 1):
        if len(shape) > leading and prod(shape[leading:]) >= _SHORTEST_ROW:
            return prod(shape[leading:])
    return prod(shape)


def _slices(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views that cover the tensor, cut along the first dimension: as much as makes a block, one index at least."""
    return tensor.split(max(1, _block_size(tensor.device) * tensor.shape[0] // tensor.numel()))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views that cover the tensor, of at most a block each."""
    for piece in _slices(tensor):
        if piece.numel() <= _block_size(tensor.device):
            yield piece
        else:
            yield from _blocks(piece[0])


# The code of integers ------------------------------------------------------------------------------------------------


@dataclass
class _Integers:
    """Indices, without loss: how far each is above the least one at its place in any map.

    Max pooling repeats its geometry in every map: above the least index, those of a window lie at the same few
    distances everywhere, 9 for a 3 x 3 window. These are numbered, which takes 4 bits an index. Where they do not fit a
    byte, the distances themselves are kept, in the smallest integer type.

    least: one index a place, as (1, 1, *map).  codes: one tensor a slice.  distances: those that occur, or None.
    """

    least: Tensor
    codes: list[Tensor]
    distances: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.least.nbytes + sum(codes.nbytes for codes in self.codes)

    @classmethod
    def encode(cls, tensor: Tensor) -> "_Integers | None":
        """None where the distances overflow."""
        maps = tuple(range(max(1, min(2, tensor.dim() - 1))))
        least, most = tensor.amin(maps, keepdim=True), tensor.amax(maps, keepdim=True)
        widest = int((most - least).max())
        if int((most - least).min()) < 0:
            return None
        if widest > 255:
            return cls(_narrowed(least), [_narrowed(piece - least) for piece in _slices(tensor)], None)
        occurs = torch.zeros(256, dtype=torch.bool, device=tensor.device)
        for piece in _slices(tensor):
            occurs |= torch.bincount((piece - least).flatten(), minlength=256) > 0
        distances, number = occurs.nonzero().flatten(), occurs.cumsum(0).sub(1).to(torch.uint8)
        bits = _bits_for(distances)
        codes = [ops.pack(number[(piece - least).long()], bits) for piece in _slices(tensor)]
        return cls(_narrowed(least), codes, distances)

    def decode_into(self, tensor: Tensor) -> None:
        for piece, codes in zip(_slices(tensor), self.codes, strict=True):
            if self.distances is not None:
                codes = self.distances[ops.unpack(codes, _bits_for(self.distances), piece.numel()).long()]
            piece.copy_(codes.view(piece.shape)).add_(self.least)


def _bits_for(distances: Tensor) -> int:
    return max(1, (distances.numel() - 1).bit_length())


def _narrowed(values: Tensor) -> Tensor:
    """The same integers in the smallest type that holds them."""
    low, high = int(values.min()), int(values.max())
    for dtype in (torch.int8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return values.to(dtype)
    return values


# The code of floats --------------------------------------------------------------------------------------------------


@dataclass
class _Floats:
    """A float tensor: the codes of its ``_blocks``."""

    blocks: "list[_Block]"

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @classmethod
    def encode(cls, tensor: Tensor, bits: int, group_size: int, dice: random.Random) -> "_Floats | None":
        """None where a value is not finite, or might not be when it is decoded."""
        row, blocks = _row_length(tensor.shape), []
        for piece in _blocks(tensor):
            start = dice.randrange(_noise_period(tensor.device))
            block = _Block.encode(piece.reshape(-1, min(row, piece.numel())), bits, group_size, start)
            if block is None:
                return None
            blocks.append(block)
        return cls(blocks)

    def decode_into(self, tensor: Tensor) -> None:
        for piece, block in zip(_blocks(tensor), self.blocks, strict=True):
            piece.copy_(block.decode().view(piece.shape))


@dataclass
class _Block:
    """A matrix, each row in groups; a value is ``low + step * code``, less the dither where there is one.

    low: (rows, groups, 1), the least value of the group (the least positive one under a mask), in the matrix's dtype.
    step: (rows, groups, 1) bfloat16, rounded up so that the codes reach the greatest value.
    codes: packed, of all values, or of those that the mask has.  mask: which values are positive, packed.
    dither: where its noise begins; None for stochastic rounding, which stays within the range.
    """

    columns: int
    bits: int
    low: Tensor
    step: Tensor
    codes: Tensor
    code_count: int
    mask: Tensor | None
    dither: int | None

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.step.nbytes + self.codes.nbytes + (0 if self.mask is None else self.mask.nbytes)

    @classmethod
    def encode(cls, rows: Tensor, bits: int, group_size: int, start: int) -> "_Block | None":
        """rows: (rows, columns) float.  start: where its noise begins.  None as in ``_Floats.encode``."""
        columns, highest = rows.shape[1], 2**bits - 1
        groups = _grouped(rows, -(-columns // group_size)).to(torch.float32)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        least = float(low.min())
        mask = rows > 0 if least == 0 else None
        if mask is not None:
            low = _least_positive(groups)
        step = _bfloat16_above((high - low) / highest)
        if not bool(torch.isfinite(torch.cat([low - step, high + step]).to(rows.dtype)).all()):
            return None
        # Dither (Roberts 1962): round(x + noise) - noise is off by a uniform error of half the variance.
        noise = _noise(rows.device)[start : start + groups.numel()].view_as(groups)
        scaled = (groups - low).div_(torch.where(step > 0, step, 1)).add_(noise).clamp_(0, highest)
        index = scaled.to(torch.uint8).flatten(1)[:, :columns]
        if mask is not None:
            index = index.masked_select(mask)
        return cls(
            columns=columns,
            bits=bits,
            low=low.to(rows.dtype),
            step=step,
            codes=ops.pack(index, bits),
            code_count=index.numel(),
            mask=None if mask is None else ops.pack(mask.view(torch.uint8), 1),
            dither=start if least < 0 else None,
        )

    def decode(self) -> Tensor:
        """(rows, columns) float32."""
        rows, per_row = self.low.shape[:2]
        index = ops.unpack(self.codes, self.bits, self.code_count)
        if self.mask is not None:
            mask = ops.unpack(self.mask, 1, rows * self.columns)
            index = torch.zeros_like(mask).masked_scatter_(mask.view(torch.bool), index)
        groups = _grouped(index.view(rows, self.columns), per_row).to(torch.float32)
        low, step = self.low.to(torch.float32), self.step.to(torch.float32)
        if self.dither is not None:
            groups -= _noise(groups.device)[self.dither : self.dither + groups.numel()].view_as(groups)
            low = low + step / 2
        values = groups.mul_(step).add_(low).flatten(1)[:, : self.columns]
        return values if self.mask is None else values.mul_(mask.view(rows, self.columns))


def _grouped(rows: Tensor, per_row: int) -> Tensor:
    """(rows, per_row, length): the rows in groups of equal length, the last one filled up with copies of its end."""
    length = -(-rows.shape[1] // per_row)
    missing = length * per_row - rows.shape[1]
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
    return rows.reshape(rows.shape[0], per_row, length)


def _least_positive(groups: Tensor) -> Tensor:
    """The least value > 0 along the last dimension, kept, of float32 >= 0; 0 where there is none.

    Read as integers, such floats keep their order. Taking 1 off makes zero the greatest of all.
    """
    order = (groups.view(torch.int32) - 1) & 0x7FFFFFFF
    return (order.amin(-1, keepdim=True) + 1).view(torch.float32).abs()


def _bfloat16_above(values: Tensor) -> Tensor:
    """The nearest bfloat16 that is not below ``values`` (float32, >= 0)."""
    return ((values.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _noise_period(device: torch.device) -> int:
    return _block_size(device) * 5 // 4  # a block and the fillings of its groups


@cache
def _noise(device: torch.device) -> Tensor:
    """Uniform on (0, 1), float32: two periods of a random permutation of equidistant values.

    From a random start on, every element is uniform exactly. Reading it again, for the dither, costs no generator, and
    no more than memory: drawing would double the time of encoding.
    """
    period = _noise_period(device)
    once = torch.randperm(period, generator=torch.Generator().manual_seed(0)).add(0.5).div(period)
    return once.repeat(2).to(device)

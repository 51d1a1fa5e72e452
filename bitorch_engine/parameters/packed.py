"""The parameter that holds packed codes: a torch.nn.Parameter whose storage is n bits a weight."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from bitorch_engine import ops
from bitorch_engine.bits import BitFormat, bit_format, has_values, packed_size
from bitorch_engine.parameters.dispatch import dispatch
from bitorch_engine.parameters.step import update_
from bitorch_engine.quantizers.weight import fit_scale, from_levels, kept_scale, to_levels

_IN_PLACE = 3  # noise stream of writes by in-place operators


class PackedParameter(nn.Parameter):
    """A parameter of 1 to 8 bit codes that looks like a float tensor and is stored, and trained, as the codes.

    It is a wrapper tensor subclass. To autograd, optimizers and modules it has the float shape and dtype, and its
    ``.grad`` is an ordinary float tensor. What is stored are plain tensors:

    packed:         uint8, the codes' indices, ``w_bit`` bits each, in the order of ``to_rows`` (see ``bits.packing``)
    channel_scale:  float32, (R,), one scale an output channel; a weight is worth code * scale. It is positive, but for
                    what ``multiply_channels_`` has made of it
    residual:       uint8, ``8 - w_bit`` bits each: how far the weight is within its code. Training state, or None
    scale_moments:  float32, (2, R), Adam's moments of the scale where it is learned, or None

    data: float, quantized with the scale of least squared error (or ``scale``); or integer, taken as codes (``scale``
        defaults to 1); or another PackedParameter, shared; or None for an empty parameter.
    w_bit: 1 to 8. Default: 4 for float data, 8 for integer data.
    scale: one positive number, or one an output channel.
    transposed, groups: how a transposed convolution's weight, (in, out / groups, ...), is laid out. Its output channels
        are not its first dimension; ``to_rows`` finds them.
    learn_scale: the scale takes Adam steps too. Worth it where no normalization layer follows.
    dtype, device: of the parameter. Default: those of float data; torch's default dtype for integer data.

    A write in place, by any optimizer, goes to code and residual together and is rounded stochastically; a write of
    values that are all on the grid of codes is exact. The scale stays, and arithmetic in place (``add_``, ``mul_``) is
    clamped to what it reaches. New values are another matter: ``quantize_``, torch.nn.init, a float state_dict, and
    ``copy_`` or ``data =`` of a float tensor that the scale cannot hold (see ``take_``) bring a new scale. An operator
    that has no handler here sees the dequantized tensor.

    An exported program is decomposed (``run_decompositions``) after ``model.requires_grad_(False)``: torch makes a
    parameter of each tensor that is stored, and integers cannot require a gradient.
    """

    packed: Tensor
    channel_scale: Tensor
    residual: Tensor | None
    scale_moments: Tensor | None
    w_bit: int
    transposed_groups: int
    learn_scale: bool
    noise_seed: int | None
    noise_step: int
    grad_exponent: int | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        *,
        w_bit: int | None = None,
        scale: Tensor | float | None = None,
        transposed: bool = False,
        groups: int = 1,
        learn_scale: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "PackedParameter":
        if data is None:
            data = torch.empty(0, dtype=dtype, device=device)
        if not isinstance(data, Tensor):
            raise TypeError(f"data must be a tensor or None, got {type(data).__name__}.")
        if isinstance(data, PackedParameter):
            other_layout = transposed and data.transposed_groups != groups
            if (
                other_layout
                or learn_scale > data.learn_scale
                or w_bit not in (None, data.w_bit)
                or any(value is not None for value in (scale, dtype, device))
            ):
                raise ValueError(
                    "data is packed already: its bits, scale, layout, dtype and device stay. To change them, pass its "
                    "dequantize()."
                )
            return cls._wrap(data._inner(), data._meta(), data.shape, data.dtype, requires_grad)
        if data.dim() == 0:
            raise ValueError("data must have at least one dimension, output channels first, got a number.")
        if data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"data must be a float or an integer tensor, got {data.dtype}.")
        logical = dtype or (data.dtype if data.is_floating_point() else torch.get_default_dtype())
        if not logical.is_floating_point:
            raise TypeError(f"dtype must be a floating point type, got {logical}: it is what the weight looks like.")
        if w_bit is None:
            w_bit = 4 if data.is_floating_point() else 8
        form = bit_format(w_bit)
        data = data.detach().to(device)
        transposed_groups = _check_layout(data.shape, groups) if transposed else 0
        rows = _to_rows(data, transposed_groups)
        residual: Tensor | None
        if data.is_floating_point():
            if has_values(data) and not bool(torch.isfinite(data).all()):
                raise ValueError("data has NaN or Inf entries; a weight must be finite to be quantized.")
            channel_scale = _channel_scale(fit_scale(rows, form) if scale is None else scale, rows)
            levels = to_levels(rows, channel_scale, form).reshape(-1)
            packed = ops.pack(levels >> form.hidden_bits, w_bit)
            residual = _pack_residual(levels, form)
        else:
            packed = ops.pack(form.index(rows), w_bit)
            channel_scale = _channel_scale(1.0 if scale is None else scale, rows)
            residual = None
        inner = {"packed": packed, "channel_scale": channel_scale, "residual": residual, "scale_moments": None}
        meta = {
            "w_bit": w_bit,
            "transposed_groups": transposed_groups,
            "learn_scale": bool(learn_scale),
            "noise_seed": None,
            "noise_step": 0,
            "grad_exponent": None,
        }
        return cls._wrap(inner, meta, data.shape, logical, requires_grad)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """All is done in ``__new__``."""

    def __init_subclass__(cls) -> None:
        torch.serialization.add_safe_globals([cls])  # so that torch.load(weights_only=True) takes it

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def format(self) -> BitFormat:
        """The integers of this width."""
        return bit_format(self.w_bit)

    @property
    def codes(self) -> Tensor:
        """The integer codes: int8, the logical shape. A copy: what is written to it does not reach the weight.

        ``weight.write_(codes * weight.scale)`` writes other codes, exactly.
        """
        return self.unpack_codes()

    @property
    def scale(self) -> Tensor:
        """The scale, shaped to broadcast against ``codes``. Shares memory, but for a grouped transposed weight."""
        tail = [1] * (self.dim() - 2)
        if self.transposed_groups == 0:
            return self.channel_scale.view([-1] + [1] * (self.dim() - 1))
        if self.transposed_groups == 1:
            return self.channel_scale.view(1, -1, *tail)
        groups, out = self.transposed_groups, self.shape[1]
        per_group = self.channel_scale.view(groups, 1, out).expand(groups, self.shape[0] // groups, out)
        return per_group.reshape(self.shape[0], out, *tail)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that are really stored: codes and scale, and while training the residual and the scale's moments."""
        return sum(t.numel() * t.element_size() for t in self._inner().values() if t is not None)

    def dequantize(self, *, channels_last: bool = False) -> Tensor:
        """The weight that forward sees, code * scale: the logical shape and dtype. A copy; ``write_`` writes.

        channels_last: its memory is in channels-last order, where the weight has spatial dimensions.
        """
        _, columns = self._rows_shape()
        arguments = (self.packed, self.channel_scale, self.w_bit, columns, self.dtype)
        taps = math.prod(self.shape[2:])
        if not channels_last or taps == 1:
            return self.from_rows(ops.dequantize(*arguments))
        if self.transposed_groups:
            return ops.in_memory_format(self.from_rows(ops.dequantize(*arguments)), True)
        rows = ops.dequantize(*arguments, taps)
        return rows.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)

    def numpy(self, *, force: bool = False) -> Any:
        """The dequantized weight as a NumPy array, a copy. As for any tensor, only without gradient (or ``force``)."""
        if self.requires_grad and not force:
            raise RuntimeError(
                "cannot call numpy() on a parameter that requires grad; use weight.dequantize().numpy()."
            )
        return self.dequantize().numpy(force=force)

    def tolist(self) -> Any:
        """The dequantized weight as nested lists."""
        return self.dequantize().tolist()

    def storage(self) -> Any:
        """Raises TypeError: there is no memory of floats. safetensors asks for it."""
        raise TypeError(
            "a packed weight has no storage of floats. To write a model to a safetensors file, call "
            "bitorch_engine.save(model, path); weight.packed and weight.channel_scale are plain tensors."
        )

    def share_memory_(self) -> "PackedParameter":
        """Move what is stored to memory that other processes can share."""
        for inner in self._inner().values():
            if inner is not None:
                inner.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether other processes can share what is stored."""
        return self.packed.is_shared()

    def unpack_codes(self) -> Tensor:
        """``codes`` as a method, for code that torch.compile traces: it takes a property for a stored tensor."""
        return self.from_rows(self._row_codes())

    def _row_codes(self) -> Tensor:
        return self.format.codes(ops.unpack(self.packed, self.w_bit, self.numel())).view(self._rows_shape())

    def to_rows(self, x: Tensor) -> Tensor:
        """A tensor of the logical shape as a matrix with one row an output channel: (R, K), a view where possible."""
        return _to_rows(x, self.transposed_groups)

    def from_rows(self, rows: Tensor) -> Tensor:
        """A tensor of the logical shape from a matrix with one row an output channel."""
        groups = self.transposed_groups
        if not groups:
            return rows.view(self.shape)
        grouped = rows.view(groups, self.shape[1], self.shape[0] // groups, *self.shape[2:])
        return grouped.transpose(1, 2).reshape(self.shape).contiguous()

    # -- training state -----------------------------------------------------------------------------------------------

    def drop_residual_(self) -> "PackedParameter":
        """Free all training state: what is left is what is deployed. The next step starts with a new residual."""
        self.residual = None
        self.scale_moments = None
        self.noise_seed, self.noise_step, self.grad_exponent = None, 0, None
        return self

    def require_residual_(self) -> Tensor:
        """The residual, allocated where there is none yet (empty at 8 bits, which have nothing below the code)."""
        if self.residual is None:
            index = ops.unpack(self.packed, self.w_bit, self.numel())
            self.residual = _pack_residual(ops.dither_levels(index, self.format, 0), self.format)
        return self.residual

    def training_state(self) -> dict[str, Any]:
        """What has to be kept besides codes and scale to go on training exactly: tensors and plain values."""
        return {name: getattr(self, name) for name in _TRAINING_STATE}

    def load_training_state_(self, state: dict[str, Any]) -> "PackedParameter":
        """Put back what ``training_state`` gave. Raises ValueError where it belongs to another weight."""
        if state.keys() != set(_TRAINING_STATE):
            raise ValueError(f"training state has {sorted(_TRAINING_STATE)}, got {sorted(state)}.")
        wanted = {
            "residual": (torch.uint8, (packed_size(self.numel(), 8 - self.w_bit) if self.w_bit < 8 else 0,)),
            "scale_moments": (torch.float32, (2, self.channel_scale.numel())),
        }
        for name, (dtype, shape) in wanted.items():
            value = state[name]
            if value is not None and (value.dtype != dtype or tuple(value.shape) != shape):
                raise ValueError(f"{name} must be {dtype} of shape {shape}, got {value.dtype} {tuple(value.shape)}.")
        for name in _TRAINING_STATE:
            value = state[name]
            setattr(self, name, value.to(self.device, copy=True) if isinstance(value, Tensor) else value)
        return self

    def noise_key(self, *parts: int) -> int:
        """The key of this parameter's rounding noise.

        The seed is a fingerprint of the codes at the first use, so that every rank of a distributed run, having the
        same codes, draws the same noise, while layers differ from each other.
        """
        if self.noise_seed is None:
            content = torch.cat([self.packed.view(-1), self.channel_scale.contiguous().view(torch.uint8).view(-1)])
            self.noise_seed = zlib.crc32(content.cpu().numpy().tobytes())
        return ops.noise_key(self.noise_seed, *parts)

    # -- changing it --------------------------------------------------------------------------------------------------

    @staticmethod
    def update(
        qweight: "PackedParameter",
        exp_avg_s: Tensor | None = None,
        exp_avg_l: Tensor | None = None,
        step: Tensor | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        beta1: float = 0.99,
        beta2: float = 0.9999,
        eps: float = 1e-6,
        dtype: torch.dtype = torch.float16,
        correct_bias: bool | None = None,
        projector: Any = None,
        grad: Tensor | None = None,
    ) -> None:
        """One Adam step of the packed weight, in place. Defines how quantized weights are updated by gradients.

        qweight: the parameter.
        exp_avg_s: moving average of squared gradients. It has the gradient's shape, in float64, float32, bfloat16 or
            float16, or is ``ops.new_moment(shape, torch.uint8)``: 8 bits; or float32 with one value an output channel
            (the mean square of its gradient). None: the step is not divided.
        exp_avg_l: moving average of gradients, stored likewise. None: the gradient itself is used (beta1 = 0).
        step: one-element counter tensor, incremented here. Needed for the bias correction.
        lr: in units of the weight, as for AdamW: a weight moves by about lr a step, however coarse its codes are.
        weight_decay: decoupled, and applied to the scale, which it multiplies by 1 - lr * weight_decay: exact, no
            noise. It stops where a step of lr would be more than the scale.
        beta1, beta2, eps: Adam's.
        dtype: what is computed in: float64, or float32 for that and all that is smaller. Moments keep their own dtype
            and are rounded to it stochastically; those in float16 are held in units of a power of two that the
            parameter remembers (``grad_exponent``), so that small gradients do not underflow.
        correct_bias: Adam's bias correction; None means True where there is a ``step``.
        projector: a low-rank gradient projector (GaLore) with ``project`` and ``project_back``. ``grad`` is then the
            projected gradient (or None: ``qweight.grad`` is projected here), the moments have its shape, and the
            direction is projected back to (out_channels, -1).
        grad: the gradient; default ``qweight.grad``.

        A gradient of zero moves nothing. Raises ValueError where the gradient is not finite, TypeError and ValueError
        for what does not fit, before anything has changed.
        """
        update_(
            qweight,
            exp_avg_s,
            exp_avg_l,
            step,
            lr=lr,
            weight_decay=weight_decay,
            betas=(beta1, beta2),
            eps=eps,
            dtype=dtype,
            correct_bias=correct_bias,
            projector=projector,
            grad=grad,
        )

    def quantize_(self, data: Tensor, scale: Tensor | float | None = None) -> "PackedParameter":
        """Take new float values, with a new scale and a new residual, in place."""
        if data.shape != self.shape:
            raise ValueError(f"data must have shape {tuple(self.shape)}, got {tuple(data.shape)}.")
        fresh = type(self)(
            data.to(self.device, self.dtype),
            w_bit=self.w_bit,
            scale=scale,
            transposed=self.transposed_groups > 0,
            groups=max(1, self.transposed_groups),
        )
        return self._adopt_(fresh)

    def write_(self, values: Tensor) -> None:
        """Write float values of the logical shape with the scale there is: exact where all of them are on the grid of
        codes, else to code and residual, rounded stochastically; beyond the outermost codes they are clamped."""
        rows = self.to_rows(values.to(self.device))
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("cannot write NaN or Inf into a packed weight; nothing was changed.")
        form = self.format
        index = self.on_grid(rows)
        if index is not None:
            self.packed.copy_(ops.pack(index, self.w_bit))
            if self.residual is not None:
                self.residual.copy_(_pack_residual(ops.dither_levels(index, form, 0), form))
        else:
            self._add_(rows - self.level_values())
        self.count_version_()

    def convert_(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Become what ``fn`` makes of this weight (on another device, of another dtype), with its gradient; hooks,
        attributes and whoever refers to it stay. False, with nothing done, where torch cannot turn one into the other:
        from and to the meta device."""
        with torch.no_grad():
            converted = fn(self)
            if not isinstance(converted, PackedParameter):
                self.data = converted
            elif converted is not self:
                if not torch._has_compatible_shallow_copy_type(self, converted):
                    return False
                torch.Tensor.data.__set__(self, converted)  # type: ignore[attr-defined]
                for name, value in converted._inner().items():
                    setattr(self, name, value)
            if self.grad is not None:
                self.grad.data = fn(self.grad)
        return True

    def take_(self, values: Tensor) -> None:
        """Write float values with the scale there is where it holds them, as ``write_``; else, as ``quantize_``, with a
        new one for each output channel that it does not hold. What ``copy_`` does: a backup, or an average of earlier
        values, comes back on the old grid, and weights of another size are not clamped to it, or rounded to zeros."""
        rows = self.to_rows(values.to(self.device))
        scale = kept_scale(rows, self.channel_scale, self.format)
        if scale is self.channel_scale:
            self.write_(values)
            return
        renewed = scale != self.channel_scale
        if bool(renewed.all()):
            self.quantize_(values, scale)
        else:
            codes = (self._row_codes() * self.channel_scale[:, None]).to(rows.dtype)
            self.write_(self.from_rows(torch.where(renewed[:, None], codes, rows)))
            self._quantize_channels_(renewed, rows[renewed], scale)

    def _quantize_channels_(self, channels: Tensor, rows: Tensor, scale: Tensor) -> None:
        """Quantize the channels of a mask, (R,), from their rows and with their ``scale``, (R,); others stay."""
        form, residual = self.format, self.require_residual_()
        levels = ops.load_levels(self.packed, residual, form, 0, self.numel()).view(self._rows_shape())
        levels[channels] = to_levels(rows, scale[channels], form)
        self.packed.copy_(ops.pack(levels.reshape(-1) >> form.hidden_bits, self.w_bit))
        residual.copy_(_pack_residual(levels, form))
        self.channel_scale.copy_(scale)
        if self.scale_moments is not None:
            self.scale_moments.masked_fill_(channels, 0.0)  # of gradients of another scale
        self.count_version_()

    def multiply_channels_(self, factor: Tensor) -> None:
        """Multiply each output channel by a number, (R,), which may be negative or 0: the scales take it, exactly but
        for their rounding, and the codes stay."""
        self.channel_scale = (self.channel_scale * factor).to(torch.float32)
        self.scale_moments = None  # of gradients of another scale
        self.count_version_()

    def on_grid(self, rows: Tensor) -> Tensor | None:
        """The indices, uint8 1-D, of (R, K) floats that are all values of codes; None where one is not.

        Values may have been rounded to the parameter's dtype on their way.
        """
        form = self.format
        index = to_levels(rows, self.channel_scale, form) >> form.hidden_bits
        grid = (form.codes(index) * self.channel_scale[:, None]).to(rows.dtype)
        exact = (grid == rows) | (grid.to(self.dtype).to(rows.dtype) == rows)
        return index.reshape(-1) if bool(exact.all()) else None

    def level_values(self) -> Tensor:
        """The weight with its residual, (R, K) float32: what an in-place operator reads and moves."""
        residual = self.require_residual_()
        levels = ops.load_levels(self.packed, residual, self.format, 0, self.numel()).view(self._rows_shape())
        return from_levels(levels, self.channel_scale, self.format)

    def count_version_(self) -> None:
        """Tell that the codes were written. Below autograd, where this happens, nobody else counts the packed tensor's
        versions, by which kernels know whether the weight that they have arranged is still this one."""
        increment_version([tensor for tensor in (self, self.packed) if not tensor.is_inference()])

    def _add_(self, delta: Tensor) -> None:
        """Add (R, K) floats to the weight, rounded stochastically."""
        residual = self.require_residual_()
        self.noise_step += 1
        key = self.noise_key(self.noise_step, _IN_PLACE)
        ops.add_(self.packed, residual, self.channel_scale, delta, bits=self.w_bit, key=key)

    def _adopt_(self, other: "PackedParameter") -> "PackedParameter":
        """Take over what another packed weight of the same shape, width and layout holds, as copies."""
        mine = (tuple(self.shape), self.w_bit, self.transposed_groups)
        theirs = (tuple(other.shape), other.w_bit, other.transposed_groups)
        if mine != theirs:
            raise ValueError(
                f"a packed weight of (shape, w_bit, transposed_groups) {mine} cannot take one of {theirs}."
            )
        for name, value in other._inner().items():
            current = getattr(self, name)
            if current is not None and value is not None and current.shape == value.shape:
                current.copy_(value)
            elif name == "scale_moments" and current is not None and value is None:
                current.zero_()  # another view of this weight, as ``data``, may hold them too
            else:
                setattr(self, name, None if value is None else value.to(self.device, copy=True))
        self.noise_seed, self.noise_step, self.grad_exponent = other.noise_seed, other.noise_step, other.grad_exponent
        self.count_version_()
        return self

    @property
    def data(self) -> Tensor:
        """This parameter without autograd history; shares the codes. Assigning to it writes, as ``take_``."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ValueError(f"data must have shape {tuple(self.shape)}, got {tuple(value.shape)}.")
        with torch.no_grad():
            self.copy_(value)

    # -- what makes it a tensor subclass ------------------------------------------------------------------------------

    @classmethod
    def _wrap(
        cls,
        inner: dict[str, Tensor | None],
        meta: dict[str, Any],
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        requires_grad: bool,
    ) -> "PackedParameter":
        packed = inner["packed"]
        assert packed is not None
        self: PackedParameter = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device, requires_grad=requires_grad
        )
        for name, value in (inner | meta).items():
            setattr(self, name, value)
        return self

    def _with(self, inner: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> "PackedParameter":
        """Another one like this, without gradient, around other inner tensors."""
        return type(self)._wrap(inner, self._meta(), self.shape, dtype or self.dtype, False)

    def _inner(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in _INNER}

    def _meta(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _META}

    def _rows_shape(self) -> tuple[int, int]:
        rows = self.channel_scale.numel()
        return rows, self.numel() // max(1, rows)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache on disk tells weights apart by."""
        return repr((type(self).__name__, tuple(self.shape), self.__tensor_flatten__()))

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names = [name for name, value in self._inner().items() if value is not None]
        # Counters of the noise stay outside: they change every step, and a change here means a recompilation.
        context = {name: getattr(self, name) for name in ("w_bit", "transposed_groups", "learn_scale")}
        return names, context | {"dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: dict[str, Any], outer_size: torch.Size, outer_stride: Any
    ) -> "PackedParameter":
        meta = {"noise_seed": None, "noise_step": 0, "grad_exponent": None} | context
        dtype = meta.pop("dtype")
        return cls._wrap(dict.fromkeys(_INNER) | inner, meta, outer_size, dtype, False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return dispatch(PackedParameter, func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedParameter":
        if id(self) not in memo:
            copied = self._with({k: None if v is None else v.clone() for k, v in self._inner().items()})
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = (type(self), self._inner(), self._meta(), tuple(self.shape), self.dtype, self.requires_grad)
        return _rebuild, state

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        place = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return f"{type(self).__name__}(shape={tuple(self.shape)}, w_bit={self.w_bit}, dtype={self.dtype}{place}{grad})"


_INNER = ("packed", "channel_scale", "residual", "scale_moments")
_META = ("w_bit", "transposed_groups", "learn_scale", "noise_seed", "noise_step", "grad_exponent")
_TRAINING_STATE = ("residual", "scale_moments", "noise_seed", "noise_step", "grad_exponent")


def _rebuild(
    cls: type[PackedParameter],
    inner: dict[str, Tensor | None],
    meta: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
) -> PackedParameter:
    return cls._wrap(inner, meta, shape, dtype, requires_grad)


def _to_rows(x: Tensor, transposed_groups: int) -> Tensor:
    if transposed_groups:
        grouped = x.reshape(transposed_groups, x.shape[0] // transposed_groups, *x.shape[1:])
        return grouped.transpose(1, 2).reshape(transposed_groups * x.shape[1], -1)
    if x.dim() == 2:
        return x
    return x.reshape(x.shape[0], -1 if x.numel() else 0)


def _check_layout(shape: torch.Size, groups: int) -> int:
    if len(shape) < 2 or groups < 1 or shape[0] % groups:
        raise ValueError(
            f"a transposed weight has shape (in_channels, out_channels / groups, ...) with in_channels divisible by "
            f"groups (={groups}), got {tuple(shape)}."
        )
    return groups


def _channel_scale(scale: Tensor | float, rows: Tensor) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float32, device=rows.device).detach()
    if scale.numel() not in (1, rows.shape[0]):
        raise ValueError(
            f"scale must have one value, or one an output channel (={rows.shape[0]}), got {scale.numel()}."
        )
    if has_values(scale) and not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise ValueError("scale must be positive and finite.")
    return scale.reshape(-1).expand(rows.shape[0]).clone(memory_format=torch.contiguous_format)


def _pack_residual(levels: Tensor, form: BitFormat) -> Tensor:
    if form.hidden_bits == 0:
        return levels.new_empty(0)
    return ops.pack(levels.reshape(-1) & ((1 << form.hidden_bits) - 1), form.hidden_bits)


torch.serialization.add_safe_globals([PackedParameter, _rebuild])

"""The parameter: what it takes, what it holds, and how much of it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitorch_engine import nBitConv2d, nBitConvParameter, nBitConvTranspose2d
from bitorch_engine.bits import unpack
from bitorch_engine.parameters import PackedParameter

WIDTHS = range(1, 9)
CODES = {1: [-1, 1]} | {bits: list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in range(2, 9)}


def stored_bytes(weight: PackedParameter) -> int:
    """What the tensors inside really take, storage for storage."""
    inner = [t for t in vars(weight).values() if isinstance(t, Tensor)]
    return sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in inner}.values()
    )


def nearest_codes(values: Tensor, scale: Tensor, w_bit: int) -> Tensor:
    """The code nearest to each weight, by trying all of them."""
    codes = torch.tensor(CODES[w_bit], dtype=torch.float64)
    distance = (values.double()[..., None] - codes * scale.double()[..., None]).abs()
    return codes[distance.argmin(-1)]


class TestFloatData:
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_every_weight_takes_its_nearest_code(self, w_bit: int) -> None:
        data = torch.randn(6, 5, 3, 3)
        weight = nBitConvParameter(data, w_bit=w_bit)
        nearest = nearest_codes(data, weight.scale.expand(data.shape), w_bit) * weight.scale
        # where two codes are as near (to float32's precision) either will do
        assert torch.allclose((weight.dequantize() - data).abs(), (nearest - data).abs().float(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_code_and_residual_together_hold_the_weight_to_half_a_level(self, w_bit: int) -> None:
        data = torch.randn(6, 5, 3, 3) * 0.1
        weight = nBitConvParameter(data, w_bit=w_bit)
        step = weight.channel_scale[:, None] * (2 if w_bit == 1 else 1)
        low = CODES[w_bit][0] * weight.channel_scale[:, None]
        inside = (weight.to_rows(data) > low - step / 2) & (weight.to_rows(data) < low + (2**w_bit - 0.5) * step)
        error = (weight.level_values() - weight.to_rows(data)).abs() / step
        assert float(inside.float().mean()) > 0.85
        assert float(error[inside].max()) <= 0.5 / 2 ** (8 - w_bit) + 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_the_dtype_is_the_datas(self, dtype: torch.dtype) -> None:
        data = torch.randn(4, 3, 3, 3, dtype=dtype)
        weight = nBitConvParameter(data, w_bit=3)
        assert (weight.dtype, weight.shape, weight.device) == (dtype, data.shape, data.device)
        assert weight.channel_scale.dtype == torch.float32
        expected = (weight.codes.to(torch.float32) * weight.scale).to(dtype)
        assert weight.dequantize().dtype == dtype and torch.equal(weight.dequantize(), expected)

    def test_the_dtype_may_be_another(self) -> None:
        weight = nBitConvParameter(torch.randn(4, 3), dtype=torch.bfloat16)
        assert weight.dtype == torch.bfloat16 and weight.dequantize().dtype == torch.bfloat16

    def test_the_default_is_four_bits(self) -> None:
        assert nBitConvParameter(torch.randn(4, 3)).w_bit == 4

    @pytest.mark.parametrize(
        "scale", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3])], ids=["number", "0-d", "1-d"]
    )
    def test_a_given_scale_is_used(self, scale: Any) -> None:
        data = torch.randn(3, 4, 2)
        weight = nBitConvParameter(data, w_bit=4, scale=scale)
        expected = torch.as_tensor(scale).expand(3)
        assert torch.equal(weight.channel_scale, expected)
        assert torch.equal(weight.codes, (data / expected.view(3, 1, 1)).round().clamp(-8, 7).to(torch.int8))

    def test_the_scale_may_have_the_shape_that_the_parameter_gives(self) -> None:
        data = torch.randn(3, 4, 2, 2)
        first = nBitConvParameter(data, w_bit=4)
        assert torch.equal(nBitConvParameter(data, w_bit=4, scale=first.scale).codes, first.codes)

    def test_changing_the_data_afterwards_changes_nothing(self) -> None:
        data, scale = torch.randn(3, 4), torch.ones(3)
        weight = nBitConvParameter(data, w_bit=4, scale=scale)
        before = weight.dequantize()
        data.zero_()
        scale.zero_()
        assert torch.equal(weight.dequantize(), before)

    def test_data_that_requires_grad_is_a_new_leaf(self) -> None:
        weight = nBitConvParameter(torch.randn(3, 4, requires_grad=True) * 2)
        assert weight.is_leaf and weight.requires_grad and weight.grad_fn is None

    def test_a_view_or_a_strided_tensor_is_read_as_it_looks(self) -> None:
        data = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
        assert torch.equal(nBitConvParameter(data).codes, nBitConvParameter(data.contiguous()).codes)


class TestIntegerData:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.uint8], ids=str)
    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_all_codes_are_taken_exactly(self, w_bit: int, dtype: torch.dtype) -> None:
        codes = [code for code in CODES[w_bit] if dtype != torch.uint8 or code >= 0]
        data = torch.tensor(codes * 3).view(3, -1)[:, torch.randperm(len(codes))].to(dtype)
        weight = nBitConvParameter(data, w_bit=w_bit)
        assert weight.codes.dtype == torch.int8 and torch.equal(weight.codes.long(), data.long())
        assert torch.equal(weight.dequantize(), data.float())  # scale 1
        assert weight.dtype == torch.float32 and weight.residual is None

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_every_other_integer_is_refused(self, w_bit: int) -> None:
        for wrong in set(range(-130, 131)) - set(CODES[w_bit]):
            with pytest.raises(ValueError, match=rf"codes of {w_bit} bits? are .*, got {wrong}; choose a wider w_bit"):
                nBitConvParameter(torch.tensor([[CODES[w_bit][0], wrong]]), w_bit=w_bit)

    def test_the_default_is_eight_bits(self) -> None:
        assert nBitConvParameter(torch.tensor([[-128, 127]], dtype=torch.int8)).w_bit == 8

    def test_a_scale_and_a_dtype_may_be_given(self) -> None:
        data = torch.tensor([[-2, 1], [0, -1]], dtype=torch.int8)
        weight = nBitConvParameter(data, w_bit=2, scale=torch.tensor([0.5, 0.25]), dtype=torch.bfloat16)
        assert weight.dtype == torch.bfloat16
        assert weight.dequantize().tolist() == [[-1.0, 0.5], [0.0, -0.25]]

    def test_the_default_dtype_is_torchs(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert nBitConvParameter(torch.ones(2, 2, dtype=torch.int8)).dtype == torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)


class TestNoData:
    def test_none_gives_an_empty_parameter(self) -> None:
        weight = nBitConvParameter()
        assert weight.numel() == 0 and weight.nbytes == 0 and weight.requires_grad
        assert weight.codes.numel() == 0 and weight.dequantize().numel() == 0
        assert isinstance(copy.deepcopy(weight), nBitConvParameter)

    def test_dtype_and_device_of_an_empty_parameter(self) -> None:
        weight = nBitConvParameter(None, False, w_bit=2, dtype=torch.float16, device="meta")
        assert (weight.dtype, weight.device.type, weight.w_bit, weight.requires_grad) == (
            torch.float16,
            "meta",
            2,
            False,
        )


class TestMeta:
    @pytest.mark.parametrize("data", [torch.empty(4, 3), torch.empty(4, 3, dtype=torch.int8)], ids=["float", "integer"])
    def test_shapes_and_sizes_are_known_without_data(self, data: Tensor) -> None:
        weight = nBitConvParameter(data.to("meta"), w_bit=3)
        assert weight.device.type == "meta" and weight.shape == (4, 3)
        assert weight.packed.shape == (5,) and weight.channel_scale.shape == (4,)
        assert weight.dequantize().device.type == "meta" and weight.dequantize().shape == (4, 3)


class TestOtherPackedData:
    def test_codes_are_shared(self) -> None:
        first = nBitConvParameter(torch.randn(4, 3), w_bit=3)
        second = nBitConvParameter(first, requires_grad=False)
        assert second.packed is first.packed and second.channel_scale is first.channel_scale
        assert not second.requires_grad and first.requires_grad

    def test_another_width_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"data is packed already.*To change them, pass .*dequantize\(\)"):
            nBitConvParameter(nBitConvParameter(torch.randn(4, 3), w_bit=3), w_bit=4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"data": [1.0, 2.0]}, TypeError, "data must be a tensor or None, got list"),
            ({"data": torch.ones(2, 2, dtype=torch.bool)}, TypeError, "data must be a float or an integer tensor"),
            ({"data": torch.ones(2, 2, dtype=torch.complex64)}, TypeError, "data must be a float or an integer tensor"),
            ({"w_bit": 0}, ValueError, "bits must be 1 to 8, got 0"),
            ({"w_bit": 9}, ValueError, "bits must be 1 to 8, got 9"),
            ({"w_bit": 2.0}, TypeError, "bits must be an int from 1 to 8"),
            ({"dtype": torch.int8}, TypeError, "dtype must be a floating point type, got torch.int8"),
            ({"scale": 0.0}, ValueError, "scale must be positive and finite"),
            ({"scale": -1.0}, ValueError, "scale must be positive and finite"),
            ({"scale": float("nan")}, ValueError, "scale must be positive and finite"),
            ({"scale": torch.tensor([1.0, float("inf")])}, ValueError, "scale must be positive and finite"),
            (
                {"scale": torch.ones(3)},
                ValueError,
                r"scale must have one value, or one an output channel \(=2\), got 3",
            ),
            ({"data": torch.tensor([[1.0, float("nan")]])}, ValueError, "data has NaN or Inf entries"),
            ({"data": torch.tensor([[1.0, -float("inf")]])}, ValueError, "data has NaN or Inf entries"),
            ({"data": torch.ones(5), "transposed": True}, ValueError, "a transposed weight has shape"),
            ({"transposed": True, "groups": 3}, ValueError, r"in_channels divisible by groups \(=3\)"),
        ],
        ids=str,
    )
    def test_what_cannot_be_a_weight_is_refused(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            nBitConvParameter(**({"data": torch.ones(2, 4)} | arguments))


class TestWhatItHolds:
    def test_it_is_a_parameter(self) -> None:
        weight = nBitConvParameter(torch.randn(4, 3, 3, 3))
        assert isinstance(weight, nn.Parameter) and isinstance(weight, Tensor)
        assert weight.requires_grad and weight.is_leaf and weight.grad is None
        layer = nn.Module()
        layer.weight = weight
        assert dict(layer.named_parameters()) == {"weight": weight}

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_the_packed_codes_are_the_codes_indices_in_row_order(self, w_bit: int) -> None:
        weight = nBitConvParameter(torch.randn(5, 3, 3, 3), w_bit=w_bit)
        index = unpack(weight.packed, w_bit, weight.numel()).long()
        assert torch.equal(torch.tensor(CODES[w_bit])[index].view(weight.shape), weight.codes.long())

    @pytest.mark.parametrize("groups", [1, 2, 4])
    @pytest.mark.parametrize("shape", [(8, 3, 5), (8, 3, 2, 3), (8, 3, 2, 3, 2)], ids=str)
    def test_a_transposed_weight_has_a_row_for_each_output_channel(self, shape: tuple[int, ...], groups: int) -> None:
        scale = torch.rand(3 * groups) + 0.5
        weight = nBitConvParameter(torch.randn(shape), transposed=True, groups=groups, scale=scale)
        inner, out = shape[0] // groups, shape[1]
        for i in range(shape[0]):
            for j in range(out):
                row, column = i // inner * out + j, i % inner
                taps = math.prod(shape[2:])
                assert torch.equal(
                    weight.to_rows(weight.codes)[row].view(inner, taps)[column], weight.codes[i, j].view(taps)
                )
                assert torch.equal(weight.dequantize()[i, j], weight.codes[i, j] * scale[row])
                assert float(weight.scale.expand(shape[0], out, *weight.scale.shape[2:])[i, j].view(-1)) == scale[row]
        x = torch.randn(shape)
        assert torch.equal(weight.from_rows(weight.to_rows(x)), x)

    @pytest.mark.parametrize("layout", [{}, {"transposed": True, "groups": 2}], ids=["plain", "transposed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("w_bit", range(1, 9))
    def test_codes_are_a_copy_and_are_written_with_their_scale(
        self, w_bit: int, dtype: torch.dtype, layout: dict[str, Any]
    ) -> None:
        weight = nBitConvParameter(torch.randn(4, 6, 3, 3, dtype=dtype), w_bit=w_bit, **layout)
        before, scale = weight.codes, weight.channel_scale.clone()
        weight.codes.neg_()
        assert torch.equal(weight.codes, before)
        wanted = before.flip(0)
        weight.write_(wanted * weight.scale)
        assert torch.equal(weight.codes, wanted) and torch.equal(weight.channel_scale, scale)

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_it_holds_one_byte_a_weight_in_training_and_n_bits_after(self, w_bit: int) -> None:
        shape = (64, 32, 3, 3)
        weight = nBitConv2d(32, 64, 3, w_bit=w_bit).weight
        weights, scale = math.prod(shape), 4 * 64
        assert weight.nbytes == weights + scale
        assert weight.nbytes <= stored_bytes(weight) <= weight.nbytes + 16
        weight.drop_residual_()
        assert weight.nbytes == weights * w_bit // 8 + scale
        assert weight.nbytes <= stored_bytes(weight) <= weight.nbytes + 16
        weight.update(weight, grad=torch.ones(shape))
        assert weight.nbytes == weights + scale
        assert weight.nbytes <= stored_bytes(weight) <= weight.nbytes + 16

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_odd_sizes_take_no_more_than_whole_bytes(self, w_bit: int) -> None:
        weight = nBitConvParameter(torch.randn(3, 5, 3, 3), w_bit=w_bit)
        planes = -(-135 * w_bit // 8) - (-135 * (8 - w_bit) // 8)
        assert weight.nbytes == planes + 3 * 4

    def test_nothing_of_the_float_size_is_held(self) -> None:
        layer = nBitConvTranspose2d(32, 64, 3, w_bit=4, bias=False)
        held = [t for t in layer.__dict__.values() if isinstance(t, Tensor)]
        assert not held and stored_bytes(layer.weight) < layer.weight.numel() * 1.02

    def test_the_repr_says_what_it_is(self) -> None:
        weight = nBitConvParameter(torch.randn(4, 3, 3, 3, dtype=torch.bfloat16), w_bit=2)
        text = "nBitConvParameter(shape=(4, 3, 3, 3), w_bit=2, dtype=torch.bfloat16"
        assert repr(weight) == text + ", requires_grad=True)"
        assert repr(weight.detach()) == text + ")"
        assert repr(weight.to("meta")).startswith(text + ", device='meta'")
        assert f"{nBitConvParameter(torch.ones(1))}"


class TestTrainingState:
    def trained(self, w_bit: int = 3) -> nBitConvParameter:
        weight = nBitConvParameter(torch.linspace(-1, 1, 360).view(4, 10, 3, 3), w_bit=w_bit, learn_scale=True)
        v = m = torch.zeros(weight.shape, dtype=torch.float16)
        weight.update(weight, v.clone(), m.clone(), grad=torch.linspace(-1, 2, 360).view(weight.shape))
        return weight

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_dropping_the_residual_leaves_what_is_deployed(self, w_bit: int) -> None:
        weight = self.trained(w_bit)
        codes, scale, values = weight.codes, weight.channel_scale.clone(), weight.dequantize()
        assert weight.drop_residual_() is weight
        assert torch.equal(weight.codes, codes) and torch.equal(weight.channel_scale, scale)
        assert torch.equal(weight.dequantize(), values)
        assert weight.residual is None and weight.scale_moments is None

    @pytest.mark.parametrize("w_bit", WIDTHS)
    def test_a_new_residual_keeps_the_codes(self, w_bit: int) -> None:
        weight = self.trained(w_bit).drop_residual_()
        codes = weight.codes
        weight.require_residual_()
        assert torch.equal(weight.codes, codes)
        assert weight.residual.numel() == -(-360 * (8 - w_bit) // 8)

    def test_a_weight_with_its_state_goes_on_exactly(self) -> None:
        first, state = self.trained(), self.trained().training_state()
        second = nBitConvParameter(first.codes, w_bit=3, scale=first.channel_scale, learn_scale=True)
        assert second.load_training_state_(state) is second
        for weight in (first, second):
            v = m = torch.zeros(weight.shape, dtype=torch.float16)
            weight.update(weight, v.clone(), m.clone(), grad=torch.linspace(3, -1, 360).view(weight.shape))
        for name, value in vars(first).items():
            other = getattr(second, name)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name

    def test_state_holds_tensors_and_plain_values_and_is_not_aliased_on_the_way_in(self) -> None:
        state = self.trained().training_state()
        assert all(value is None or isinstance(value, (Tensor, int)) for value in state.values())
        weight = self.trained().load_training_state_(state)
        state["residual"].zero_()
        assert weight.residual.any()

    def test_state_of_another_weight_is_refused_and_changes_nothing(self) -> None:
        weight = self.trained()
        before = {k: copy.deepcopy(v) for k, v in vars(weight).items()}
        for name, value in {"residual": torch.zeros(5, dtype=torch.uint8), "scale_moments": torch.zeros(2, 7)}.items():
            with pytest.raises(ValueError, match=f"{name} must be .* of shape .*, got"):
                weight.load_training_state_(weight.training_state() | {name: value, "noise_step": 99})
        with pytest.raises(ValueError, match="training state has .*, got"):
            weight.load_training_state_({"residual": None})
        for name, value in vars(weight).items():
            assert torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name], name


class TestMultiplyChannels:
    @pytest.mark.parametrize("layout", [{}, {"transposed": True, "groups": 2}])
    @pytest.mark.parametrize("w_bit", range(1, 9))
    def test_each_output_channel_is_multiplied_and_no_code_changes(self, w_bit: int, layout: dict[str, Any]) -> None:
        weight = nBitConvParameter(torch.randn(4, 3, 3), w_bit=w_bit, **layout)
        before, packed, seen = weight.dequantize(), weight.packed.clone(), weight.packed._version
        factor = torch.tensor([-2.0, 0.5, 0.0, 4.0, -1.0, 1.0])[: weight.channel_scale.numel()]
        weight.multiply_channels_(factor)
        expected = weight.to_rows(before) * factor[:, None]
        assert torch.equal(weight.to_rows(weight.dequantize()), expected)
        assert torch.equal(weight.packed, packed) and weight.packed._version > seen

    @pytest.mark.parametrize("w_bit", range(1, 9))
    def test_a_write_reads_scales_that_are_negative_or_0(self, w_bit: int) -> None:
        weight = nBitConvParameter(torch.randn(3, 5, 3), w_bit=w_bit)
        weight.multiply_channels_(torch.tensor([-2.0, 0.5, 0.0]))
        before = weight.dequantize()
        with torch.no_grad():
            weight.copy_(before)
        assert torch.equal(weight.dequantize(), before)


class TestQuantize:
    def test_new_values_come_with_a_new_scale_and_a_new_residual_in_place(self) -> None:
        weight, data = nBitConvParameter(torch.randn(4, 3, 3, 3), w_bit=3), torch.randn(4, 3, 3, 3) * 50
        alias, packed = weight.detach(), weight.packed
        fresh = nBitConvParameter(data, w_bit=3)
        assert weight.quantize_(data) is weight
        assert weight.packed is packed and torch.equal(alias.codes, weight.codes)
        for name in ("packed", "channel_scale", "residual"):
            assert torch.equal(getattr(weight, name), getattr(fresh, name)), name

    def test_a_wrong_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"data must have shape \(4, 3\), got \(3, 4\)"):
            nBitConvParameter(torch.randn(4, 3)).quantize_(torch.randn(3, 4))

    def test_values_that_are_not_finite_are_refused_and_change_nothing(self) -> None:
        weight = nBitConvParameter(torch.randn(4, 3))
        before = weight.level_values()
        with pytest.raises(ValueError, match="NaN or Inf"):
            weight.quantize_(torch.full((4, 3), float("nan")))
        assert torch.equal(weight.level_values(), before)

"""The table of layers counts what is there: values, bytes, multiply-adds and codes."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bitorch_engine
from bitorch_engine.cli.inspect import bars
from bitorch_engine.cli.layers import layer_rows
from bitorch_engine.cli.models import small_resnet


def test_a_packed_layer_is_counted_by_its_codes_and_scales() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    bitorch_engine.quantize_(model, w_bit=3)
    conv, norm = layer_rows(model, (3, 5, 5))
    assert (conv.name, conv.kind, conv.shape, conv.bits) == ("0", "nBitConv2d", (8, 3, 3, 3), 3)
    assert conv.stored_bytes == 8 * 27 * 3 // 8 + 8 * 4
    assert conv.histogram == tuple(int((model[0].weight.codes == code).sum()) for code in conv.codes)
    assert list(conv.codes) == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert sum(conv.histogram) == conv.values == 216
    assert (norm.bits, norm.stored_bytes, norm.histogram, norm.macs) == (32, 4 * 8 * 4 + 8, None, 0)


def test_the_quantizer_of_a_layers_input_counts_with_the_layer() -> None:
    conv = nn.Conv2d(3, 8, 3)
    plain = layer_rows(conv, (3, 5, 5))[0]
    bitorch_engine.quantize_(conv, w_bit=8, a_bit=4)
    (row,) = layer_rows(conv, (3, 5, 5))
    quantizer = [*conv.activation.parameters(), *conv.activation.buffers()]
    assert row.values - plain.values == sum(tensor.numel() for tensor in quantizer) > 0
    assert row.stored_bytes == 8 * 27 + 8 * 4 + 8 * 4 + sum(tensor.nbytes for tensor in quantizer)


def test_one_bit_codes_are_minus_one_and_one() -> None:
    model = bitorch_engine.nBitConv2d(1, 2, 3, w_bit=1, bias=False)
    (row,) = layer_rows(model, (1, 4, 4))
    assert list(row.codes) == [-1, 1]
    assert (row.name, sum(row.histogram or ())) == ("(the model)", 18)


def test_multiply_adds_agree_with_torchs_own_counter() -> None:
    models = {
        (3, 16, 12): small_resnet(3, 10),
        (4, 9, 7): nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(6, 6, 3, groups=6)),
    }
    for shape, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
        model.train()
        assert 2 * sum(row.macs for row in layer_rows(model, shape)) == counter.get_total_flops()
        assert model.training


def test_a_histogram_becomes_at_most_sixteen_bars_and_shows_what_is_rare() -> None:
    assert bars((0, 1, 800, 400)) == " ▁█▄"
    assert bars((1,) * 256) == "█" * 16

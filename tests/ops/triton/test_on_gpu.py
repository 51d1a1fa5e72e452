"""What only a GPU can show: real sizes, other streams, graphs, a second device. Skipped where there is none."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitorch_engine import BinaryConv2d, nBitConv2d, nBitLinear, ops
from bitorch_engine.optim import DiodeMix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network() -> nn.Sequential:
    return nn.Sequential(
        nBitConv2d(64, 128, 3, stride=2, padding=1, w_bit=4, a_bit=8, g_bit=8),
        nBitConv2d(128, 128, 3, padding=1, groups=128, w_bit=3, a_bit=8, g_bit=8),
        BinaryConv2d(128, 64, 1),
    )


def images(device: str) -> Tensor:
    x = torch.randn(4, 64, 56, 56, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last).to(device)


def in_inference(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.train()(x)  # the first batch sets the activations' scales
        return model.eval()(x)


def test_a_layer_of_real_size_gives_what_the_cpu_gives() -> None:
    for layer in network():
        x = torch.randn(4, layer.in_channels, 56, 56, generator=torch.Generator().manual_seed(2))
        wanted = in_inference(layer, x)
        layer.to("cuda")
        with torch.no_grad():
            torch.testing.assert_close(layer(x.to("cuda")).cpu(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["8bit", "bf16", "channel"])
def test_fifty_steps_end_at_the_codes_of_the_cpu(memory: str) -> None:
    layer = nBitLinear(1024, 768, w_bit=4)
    layers = {"cpu": layer, "cuda": copy.deepcopy(layer).to("cuda")}
    optimizers = {device: DiodeMix([layer.weight], lr=1e-2, memory=memory) for device, layer in layers.items()}
    random = torch.Generator().manual_seed(3)
    for _ in range(50):
        grad = torch.randn(768, 1024, generator=random) * 1e-2
        for device, layer in layers.items():
            layer.weight.grad = grad.to(device)
            optimizers[device].step()
    assert torch.equal(layers["cuda"].weight.packed.cpu(), layers["cpu"].weight.packed)


def test_kernels_run_on_the_current_stream() -> None:
    model, x = network().to("cuda"), images("cuda")
    wanted = in_inference(model, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read zeros
        late = torch.zeros_like(x).copy_(x)
        found = model(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, wanted)


def test_inference_can_be_captured_in_a_graph() -> None:
    model, x = network().to("cuda"), images("cuda")
    in_inference(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            found = model(x)
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(found, model(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_computes_the_same() -> None:
    model, x = network().to("cuda:0"), images("cuda:0")
    wanted = in_inference(model, x).cpu()
    model.to("cuda:1")
    with torch.no_grad():
        assert torch.equal(model(x.to("cuda:1")).cpu(), wanted)


def test_offsets_pass_two_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GiB")
    codes = torch.zeros(2**31 + 1024, dtype=torch.uint8, device="cuda")
    codes[-1000:] = torch.arange(1000, device="cuda") % 8
    assert torch.equal(ops.unpack(ops.pack(codes, 3), 3, codes.numel())[-1000:], codes[-1000:])

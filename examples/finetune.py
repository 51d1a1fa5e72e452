"""Convert a trained float network to 2-bit convolutions, fine-tune it, save it, and load it into a new one."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bitorch_engine as be

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train_index, test_index = torch.randperm(len(y)).split([1437, 360])


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    model.train()
    for _ in range(epochs):
        for batch in train_index[torch.randperm(len(train_index))].split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> Tensor:
    return (model.eval()(x[test_index]).argmax(1) == y[test_index]).float().mean()


model = make_model()
train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), epochs=5)
print(f"float:                     {accuracy(model):.1%}")

with tempfile.TemporaryDirectory() as folder:
    float_file, file = Path(folder, "float.safetensors"), Path(folder, "model.safetensors")
    save_file(model.state_dict(), float_file)

    # The first convolution has few weights and sees the image itself: 4 bits there cost next to nothing.
    report = be.quantize_(model, w_bit=2, overrides={"0": {"w_bit": 4}})
    print(f"2 bits, before tuning:     {accuracy(model):.1%}")

    train(model, be.optim.DiodeMix(model.parameters(), lr=3e-3), epochs=5)  # after quantize_: it made new parameters
    print(f"2 bits, after tuning:      {accuracy(model):.1%}")

    be.save(model, file)
    fresh = make_model()
    be.load(fresh, file)
    print(f"loaded into a new network: {accuracy(fresh):.1%}")
    sizes = file.stat().st_size, float_file.stat().st_size

print(f"file: {sizes[0]:,} bytes, {sizes[0] / sizes[1]:.2f} of the float file's {sizes[1]:,}\n\n{report}")

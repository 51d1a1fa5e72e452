"""Train a network with 4-bit weights on handwritten digits. No float copy of the weights exists, at any time."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import bitorch_engine as be

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train, test = torch.randperm(len(y)).split([1437, 360])

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    be.nBitConv2d(32, 64, 3, stride=2, padding=1, w_bit=4), nn.BatchNorm2d(64), nn.ReLU(),
    be.nBitConv2d(64, 64, 3, padding=1, w_bit=4), nn.BatchNorm2d(64), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
)  # fmt: skip
optimizer = be.optim.DiodeMix(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

for epoch in range(10):
    model.train()
    for batch in train[torch.randperm(len(train))].split(64):
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy:.1%}")

weight = model[3].weight
print(f"{weight.numel()} weights in {weight.packed.nbytes} bytes, with codes such as {weight.codes[0, 0, 0].tolist()}")

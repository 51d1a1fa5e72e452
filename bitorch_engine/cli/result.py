"""What a run reached, as numbers to compare with float32 and AdamW."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bitorch_engine.cli.training import Epoch, packed_parameters

ADAMW_BYTES = 12
"""Per float32 weight: the weight and AdamW's two moments."""


@dataclass(frozen=True)
class Result:
    """The end of a run: accuracy, sizes of files in bytes, and bytes of training state for each packed weight."""

    accuracy: float
    epochs: int
    seconds: float
    packed_weights: int
    file_bytes: int
    float_file_bytes: int
    state_bytes: float

    def rows(self) -> list[tuple[str, str, str]]:
        """What is measured, in this run, and in float32 with AdamW, as text."""
        share = self.file_bytes / self.float_file_bytes
        return [
            ("accuracy on test images, not warped", f"{self.accuracy:.2%}", ""),
            ("model file", f"{kilobytes(self.file_bytes)} ({share:.2f}x)", kilobytes(self.float_file_bytes)),
            ("training state per packed weight", f"{self.state_bytes:.2f} bytes", f"{ADAMW_BYTES} bytes"),
            ("packed weights", f"{self.packed_weights:,}", ""),
            ("training time", f"{self.seconds:.0f} s, {self.epochs} epochs", ""),
        ]


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, epochs: Sequence[Epoch], file: Path, float_file_bytes: int
) -> Result:
    """The result of a finished run, sizes taken from the tensors and files that are there."""
    packed = packed_parameters(model)
    weights = sum(parameter.numel() for parameter in packed)
    state = sum(parameter.nbytes + tensor_bytes(optimizer.state[parameter]) for parameter in packed)
    return Result(
        accuracy=epochs[-1].accuracy,
        epochs=len(epochs),
        seconds=sum(epoch.seconds for epoch in epochs),
        packed_weights=weights,
        file_bytes=file.stat().st_size,
        float_file_bytes=float_file_bytes,
        state_bytes=state / max(1, weights),
    )


def tensor_bytes(content: object) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        return sum(tensor_bytes(value) for value in content.values())
    if isinstance(content, Sequence) and not isinstance(content, str):
        return sum(tensor_bytes(value) for value in content)
    return 0


def float_file_bytes(model: nn.Module) -> int:
    """Size of the safetensors file of a model before conversion."""
    return len(save({name: tensor.clone() for name, tensor in model.state_dict().items()}))


def kilobytes(count: int) -> str:
    """Bytes as text, in KB or MB of thousands."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"

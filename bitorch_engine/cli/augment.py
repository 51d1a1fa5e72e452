"""Random changes of training images that keep their meaning: a small warp, contrast and noise."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How far each random change goes, either way; the defaults are the task of the published digits figures."""

    degrees: float = 20.0
    scale: float = 0.15
    shear: float = 0.15
    shift: float = 0.13
    """In half widths of the image."""
    contrast: float = 0.25
    noise: float = 0.12
    """Standard deviation, for pixels of 0..1."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A changed copy of each image of a float batch (N, C, H, W).

        All random numbers come from ``generator``, on the CPU, so that every device sees the same images.
        """

        def spread(limit: float) -> Tensor:
            return ((torch.rand(len(images), generator=generator) * 2 - 1) * limit).to(images.device)

        angle, zoom, shear = spread(math.radians(self.degrees)), 1 + spread(self.scale), spread(self.shear)
        cosine, sine = angle.cos() / zoom, angle.sin() / zoom
        rows = [cosine, shear - sine, spread(self.shift), sine, cosine, spread(self.shift)]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
        contrast = (1 + spread(self.contrast)).view(-1, 1, 1, 1)
        noise = torch.randn(images.shape, generator=generator).to(images.device) * self.noise
        return F.grid_sample(images, grid, align_corners=False) * contrast + noise

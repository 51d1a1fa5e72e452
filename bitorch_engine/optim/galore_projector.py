"""GaLore: the gradient of a matrix in a basis of its few strongest directions (Zhao et al. 2024, arXiv:2403.03507)."""

import logging
from math import prod
from typing import Any

import torch
from torch import Tensor

_LOGGER = logging.getLogger(__name__)

_PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


class GaLoreProjector:
    """Projects the gradients of one parameter to few dimensions, and steps back to the parameter's shape.

    A gradient G of two or more dimensions counts as a matrix (shape[0], the rest), m x n. The bases are its leading
    singular vectors: P (m, r) on the left, Q (r, n) on the right, r = min(rank, m, n). By ``proj_type`` it becomes

        "right"   G Q^T       (m, r)        "std"           "right" where m >= n, else "left"
        "left"    P^T G       (r, n)        "reverse_std"   the other way round
        "full"    P^T G Q^T   (r, r)

    update_proj_gap: bases are computed anew in iterations that are a multiple of it.  scale: a factor on what is
    projected back.  verbose: log each new basis, with the share of the gradient's squared norm that it keeps.
    Bases are float32, and the signs of their vectors are fixed, so that equal gradients give equal bases: the ranks of
    a distributed run agree, and so does a repeated run. Products are computed in float32 or better and returned in the
    dtype of what came in.
    """

    def __init__(
        self, rank: int, verbose: bool = False, update_proj_gap: int = 200, scale: float = 1.0, proj_type: str = "std"
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        if update_proj_gap < 1:
            raise ValueError(f"update_proj_gap must be at least 1, got {update_proj_gap}.")
        if proj_type not in _PROJ_TYPES:
            raise ValueError(f"proj_type must be one of {', '.join(_PROJ_TYPES)}, got {proj_type!r}.")
        self.rank, self.verbose, self.update_proj_gap = rank, verbose, update_proj_gap
        self.scale, self.proj_type = scale, proj_type
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._shape: tuple[int, ...] = ()  # of the gradients that the bases are for; () before the first

    @property
    def ortho_matrix(self) -> Tensor | list[Tensor] | None:
        """The basis in use: P or Q, [P, Q] for "full", None before the first projection."""
        bases = [basis for basis in (self._left, self._right) if basis is not None]
        return bases if len(bases) == 2 else next(iter(bases), None)

    def project(self, grad: Tensor, iter: int) -> Tensor:
        """The gradient in few dimensions, a matrix. ``iter`` counts the steps: it says when bases are computed anew.

        Raises ValueError for fewer than two dimensions, for another shape than that of the bases in use and, where new
        ones are due, for values that are not finite. The projector is then as it was.
        """
        matrix, shape = _matrix(grad), tuple(grad.shape)
        new = not self._shape or iter % self.update_proj_gap == 0
        if new:
            side = self._side(*matrix.shape)
            bases = self.get_orthogonal_matrix(grad, self.rank, side)
            left, right = bases if isinstance(bases, list) else (bases, bases)
            self._left = None if side == "right" else left
            self._right = None if side == "left" else right
            self._shape = shape
        elif shape != self._shape:
            raise ValueError(f"the bases in use are for gradients of shape {self._shape}, got {shape}.")
        low_rank = matrix
        if self._left is not None:
            low_rank = self._left.to(matrix).t() @ low_rank
        if self._right is not None:
            low_rank = low_rank @ self._right.to(matrix).t()
        if new and self.verbose:
            kept = float((low_rank.norm() / matrix.norm()).square())
            _LOGGER.info("%s -> %s keeps %.1f %% of the squared norm", shape, tuple(low_rank.shape), 100 * kept)
        return low_rank.to(grad.dtype)

    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        """``scale`` times a projected step, in the shape of the gradients that were projected.

        Raises RuntimeError before the first ``project``, ValueError for a shape that ``project`` does not return.
        """
        if not self._shape:
            raise RuntimeError("there is no basis to project back from: call project first.")
        rows = self._shape[0] if self._left is None else self._left.shape[1]
        columns = prod(self._shape[1:]) if self._right is None else self._right.shape[0]
        if low_rank_grad.shape != (rows, columns):
            raise ValueError(f"the projected gradient is {rows} x {columns}, got shape {tuple(low_rank_grad.shape)}.")
        matrix = _matrix(low_rank_grad)
        if self._left is not None:
            matrix = self._left.to(matrix) @ matrix
        if self._right is not None:
            matrix = matrix @ self._right.to(matrix)
        return (self.scale * matrix).to(low_rank_grad.dtype).view(self._shape)

    def get_orthogonal_matrix(self, weights: Tensor, rank: int, type: str) -> Tensor | list[Tensor]:
        """The leading singular vectors, float32: P (m, r) for "left", Q (r, n) for "right", [P, Q] for "full".

        weights: two or more dimensions, finite.  r = min(rank, m, n).  In every vector the entry of largest magnitude
        is positive. Raises ValueError for another ``type``, and for weights that do not fit.
        """
        if type not in ("left", "right", "full"):
            raise ValueError(f"type must be left, right or full, got {type!r}.")
        matrix = _matrix(weights).to(torch.float32)
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("there is no basis for values that are NaN or Inf (in float32); skip this step.")
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        left, right = _fix_signs(left[:, :rank].t()).t().contiguous(), _fix_signs(right[:rank])
        return [left, right] if type == "full" else left if type == "left" else right

    def state_dict(self) -> dict[str, Any]:
        """The bases and the shape that they are for, without the settings: tensors and plain values."""
        return {"left": self._left, "right": self._right, "shape": list(self._shape)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the bases of a projector with the same settings."""
        self._left, self._right = state_dict["left"], state_dict["right"]
        self._shape = tuple(state_dict["shape"])

    def _side(self, rows: int, columns: int) -> str:
        if self.proj_type not in ("std", "reverse_std"):
            return self.proj_type
        return "right" if (rows >= columns) == (self.proj_type == "std") else "left"


def _matrix(tensor: Tensor) -> Tensor:
    """(shape[0], the rest), float32 or better."""
    if tensor.dim() < 2 or not tensor.numel():
        raise ValueError(
            f"GaLore projects gradients of 2 or more dimensions, none empty; got shape {tuple(tensor.shape)}."
        )
    return tensor.detach().flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))


def _fix_signs(vectors: Tensor) -> Tensor:
    """New rows, each with the sign that makes its entry of largest magnitude positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)

"""What becomes of a float weight whose place a packed one has taken: an optimizer that still has it is told so."""

from torch import Tensor, nn


class ReplacedError(RuntimeError, AttributeError):
    """Raised for the gradient of a weight that was converted; to ``hasattr`` the gradient is not there."""

    def __init__(self) -> None:
        super().__init__(
            "this float weight was converted, and the model trains a packed weight in its place, which an optimizer "
            "made before does not have: make the optimizer after quantize_ or load. (A module outside of what was "
            "converted that shares the weight needs its own: nn.Parameter(weight.detach().clone()).)"
        )


class ReplacedParameter(nn.Parameter):
    """A float weight that has been converted. Its values can be read; its gradient cannot.

    An optimizer made before the conversion holds it, finds no gradient, and would pass over it without a word, for as
    long as the model is trained.
    """

    @property
    def grad(self) -> Tensor | None:
        raise ReplacedError

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        raise ReplacedError


def replace_(weight: nn.Parameter) -> None:
    """Turn a weight that was converted into a ReplacedParameter, whoever holds it. One of a class of its own stays."""
    if type(weight) is nn.Parameter:
        weight.__class__ = ReplacedParameter

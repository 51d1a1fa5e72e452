"""How the base classes of the original BITorch Engine let their weight be set and read."""

from torch import Tensor

from bitorch_engine.layers.low_bit import LowBitLayer
from bitorch_engine.parameters import PackedParameter


class WeightAccess(LowBitLayer):
    """The methods of the original BITorch Engine's ``...Base`` layers that hand weights in and out."""

    def prepare_params(self) -> None:
        """Nothing to prepare: the weight is packed from the start."""

    def set_weight_data(self, x: Tensor) -> None:
        """Take new float weights, with a new scale."""
        self._packed_weight().quantize_(x)

    def set_quantized_weight_data(self, x: Tensor) -> None:
        """Take new integer codes of the weight's shape; the scale stays."""
        weight = self._packed_weight()
        if x.shape != weight.shape or x.is_floating_point():
            raise ValueError(f"codes must be integers of shape {tuple(weight.shape)}, got {x.dtype} {tuple(x.shape)}.")
        taken = self.parameter_class(x.to(weight.device), w_bit=self.w_bit)
        taken.channel_scale = weight.channel_scale  # as it is: a folded BatchNorm may have made it negative
        weight.data = taken

    def generate_quantized_weight(self, qweight_only: bool = False) -> None:
        """Drop the training state where ``qweight_only``: what stays are the codes and their scale."""
        if qweight_only:
            self._packed_weight().drop_residual_()

    def set_bits_binary_word(self, num: int) -> None:
        """Nothing to set: the bits of a weight are packed without gaps, into bytes."""

    @property
    def qweight(self) -> Tensor:
        """The packed codes, uint8."""
        return self._packed_weight().packed

    @property
    def opt_weight(self) -> Tensor:
        """The weight that the optimizer steps and forward uses: they are one."""
        return self.weight

    def _packed_weight(self) -> PackedParameter:
        if not isinstance(self.weight, PackedParameter):
            raise TypeError(
                f"the weight was replaced by a {type(self.weight).__name__}; it must be an "
                f"{self.parameter_class.__name__}."
            )
        return self.weight


def require_symmetric(symmetric: bool) -> None:
    """Raise NotImplementedError for ``symmetric=False``, which the original's binary layers may be asked for."""
    if not symmetric:
        raise NotImplementedError("symmetric=False is not supported: binary weights are -1 and +1, times a scale.")

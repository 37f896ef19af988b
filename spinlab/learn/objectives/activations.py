"""Terms on single rotated activations: how far they are from what a quantizer likes."""

from torch import Tensor
from torch.nn.functional import layer_norm

from spinlab.formats.integer import at_least_float32

UNIFORM_KURTOSIS = 1.8
_LEAST_VARIANCE = 1e-30  # keeps a token of zeros from becoming 0/0


def kurtosis_loss(y: Tensor) -> Tensor:
    """Return the mean over tokens of |kurtosis over channels - 1.8| (KurTail, arXiv 2503.01483).

    y: (..., width) rotated activations; their scale cancels. Each token is taken by itself, as
    the quantizer takes it. 1.8 is a uniform distribution's kurtosis; while no token is below it,
    this equals |mean kurtosis - 1.8|.
    """
    standard = layer_norm(at_least_float32(y), y.shape[-1:], eps=_LEAST_VARIANCE)
    return (standard.square().square().mean(-1) - UNIFORM_KURTOSIS).abs().mean()


def whip_loss(y: Tensor) -> Tensor:
    """Return the mean over tokens of the sum over channels of exp(-|y|) (DartQuant, 2511.04063).

    y: (..., width) rotated activations, in the scale the layer sees: exp(-|y|) acts within a few
    units of 0, and DartQuant takes normed activations (root mean square 1) for R1 and attention's
    values as they are for R2. The sum grows with the width: about width/2 for normal activations.
    """
    return at_least_float32(y).abs().neg().exp().sum(-1).mean()

"""What a rotation is learned for, and the table of terms on activations.

Such a term is a function of rotated activations (..., width) that returns their scalar mean loss.
It is weighed by `learn.objective.further.NAME`, or by a setting of its own as kurtosis and whip.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from spinlab.config import ObjectiveConfig
from spinlab.config.checks import choice
from spinlab.learn.objectives.activations import kurtosis_loss, whip_loss
from spinlab.learn.objectives.logits import head_loss

__all__ = ["ACTIVATION_TERMS", "check_objective", "head_loss", "kurtosis_loss", "whip_loss"]

ACTIVATION_TERMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "kurtosis": kurtosis_loss,
    "whip": whip_loss,
}


def check_objective(objective: ObjectiveConfig) -> None:
    """Raise InputError for a further term that is not in the table."""
    for name in objective.further:
        choice("learn.objective.further", name, tuple(ACTIVATION_TERMS))

"""How many tokens a model reads at once, and the windows that experiments cut for it."""

from transformers import PreTrainedConfig

from spinlab.config import Config
from spinlab.errors import InputError

# RoPE that transformers stretches by `factor` beyond what the config calls the model's positions;
# llama3 and longrope count the stretched positions there themselves
_STRETCHED = ("linear", "dynamic", "yarn")


def context_of(settings: PreTrainedConfig) -> int | None:
    """Return the longest sequence that a model's positions are made for; None if it has no limit.

    A sliding window is no limit: later tokens still have their positions.
    """
    longest: int | None = getattr(settings, "max_position_embeddings", None)
    rope = getattr(settings, "rope_parameters", None) or {}
    if longest is None or rope.get("rope_type") not in _STRETCHED:
        return longest
    trained = rope.get("original_max_position_embeddings") or longest
    return max(longest, int(trained * (rope.get("factor") or 1.0)))


def check_context(config: Config, settings: PreTrainedConfig) -> None:
    """Raise InputError where a window of text in use is longer than the model's context."""
    context = context_of(settings)
    windows = {"eval.window": config.eval.window, **config.calibration_windows}
    windows["eval.needle"] = max(config.eval.needle, default=0)
    for setting, length in windows.items():
        if context is not None and length > context:
            raise InputError(
                f"{setting}={length} is longer than the {context} tokens that the model "
                f"reads at once: set {setting}={context} or less"
            )

"""Learned rotations for LLM quantization: rotate, learn, quantize, run on integers, measure."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinlab.artefact.read import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for, and with it torch and transformers, when it is."""
    if name == "load":
        from spinlab.artefact.read import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

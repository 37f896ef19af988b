"""What a map says of a decoder layer: the paths of its parts, and how far its attention reaches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Describe a layer's attention by the paths of its parts, heads that are queries', and reach.

    window: how far back a token looks at most, or None. query_norm, key_norm: norms of single
    heads, or with wide_norms of all heads of a token together. neighbours: RoPE turns numbers 2d
    and 2d + 1 of a head together. softcap: scores are softcap·tanh(score / softcap), or as they
    are. sinks: a learned score of each head, without a value, joins the softmax.
    key_bias: keys are what their linear gives, bias and all, with nothing behind it but RoPE, which
    turns number d of a head with number d + rotary_dim/2.
    """

    path: str
    queries: str
    keys: str
    values: str
    out: str
    heads: int
    kv_heads: int  # divides `heads`
    head_dim: int
    rope: bool
    window: int | None
    query_norm: str | None = None
    key_norm: str | None = None
    wide_norms: bool = False
    neighbours: bool = False
    key_bias: bool = False
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True)
class GatedMLP:
    """Describe down(activation(gate)·up) by the paths of its parts."""

    path: str
    gate: str
    up: str
    down: str
    activation: str

    @property
    def by_silu(self) -> bool:
        """Tell whether the activation is SiLU, which is all that kernels gate by."""
        return self.activation in ("silu", "swish")


@dataclass(frozen=True)
class Layer:
    """Describe a decoder layer; mlp is None where it is anything but one gated MLP.

    adds: what attention and MLP give is added to the stream as it is, and one after the other.
    """

    path: str
    attention: Attention
    mlp: GatedMLP | None
    adds: bool = False

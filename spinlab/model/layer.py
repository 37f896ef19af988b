"""What a map says of a decoder layer, its parts, reach and widths, and of the widths of all."""

from dataclasses import dataclass
from typing import NamedTuple


class Cached(NamedTuple):
    """Say what a layer of the cache holds of a token: so many heads, each a key and a value."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Latent:
    """Describe the latent that keys and values of all heads are made of when they are read.

    The cache holds it in place of them, `width` numbers, as its value; and as its key the last
    `turned` numbers of every head's key, which RoPE turns and all heads share.
    """

    width: int
    turned: int


@dataclass(frozen=True)
class Attention:
    """Describe a layer's attention by the paths of its parts, heads that are queries', and reach.

    window: how far back a token looks at most, or None. query_norm, key_norm: norms of single
    heads, or with wide_norms of all heads of a token together. neighbours: RoPE turns numbers 2d
    and 2d + 1 of a head together. softcap: scores are softcap·tanh(score / softcap), or as they
    are. sinks: a learned score of each head, without a value, joins the softmax.
    key_bias: keys are what their linear gives, bias and all, with nothing behind it but RoPE, which
    turns number d of a head with number d + rotary_dim/2. own_value_dim: of a head's values, where
    it is not that of its keys. latent: what keys and values are made of, if it is cached.
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
    own_value_dim: int | None = None
    latent: Latent | None = None

    @property
    def value_dim(self) -> int:
        """Numbers of a head's values."""
        return self.own_value_dim or self.head_dim

    @property
    def turned_dim(self) -> int:
        """Numbers of a cached key, which R3 turns: a head's, or those that all heads share."""
        return self.head_dim if self.latent is None else self.latent.turned

    @property
    def cached(self) -> Cached:
        """Say what the cache holds of a token."""
        if self.latent is not None:
            return Cached(1, self.latent.turned, self.latent.width)
        return Cached(self.kv_heads, self.head_dim, self.value_dim)


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


@dataclass(frozen=True)
class Dimensions:
    """Hold a model's widths and counts; those in which layers differ are the largest.

    held: what the cache holds of a token, if not keys and values of `head_dim` for all `kv_heads`.
    """

    hidden: int
    head_dim: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    held: Cached | None = None

    @property
    def cached(self) -> Cached:
        """Say what the cache holds of a token."""
        return self.held or Cached(self.kv_heads, self.head_dim, self.head_dim)

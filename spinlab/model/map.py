"""The map of a model: its linears between the rotated spaces, its norms, widths and ends.

A family (`spinlab.model.families`) reads it once from the modules of a model, so that layers may
differ. It holds names and numbers, no tensors; `spinlab.model.modules` finds the modules by it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.layer import Cached, Dimensions, Latent, Layer


def input_key(layer: int, input: str) -> str:
    """Name an input of a layer, in settings of single inputs and in files."""
    return f"{layer}.{input}"


@dataclass(frozen=True)
class Site:
    """Place one linear of a decoder layer between the rotated spaces.

    `reads` says what rotates its input rows, `writes` what its output rows: reads="R1" means
    W ← W R1, writes="R1" means W ← R1ᵀ W; latents are spaces under the names of inputs. Linears of
    a layer with the same `input` read the very same tensor and share its quantizer. One that is not
    quantized, such as a router, is rotated like the others and keeps its weight and input in 16
    bits. Experts share their input out: the linears of one see its rows of it, on average the
    `share` of all, in some families times the scores of their tokens.
    """

    layer: int
    name: str  # seen from its layer
    path: str  # seen from the model
    input: str
    reads: str | None
    writes: str | None
    in_features: int
    out_features: int
    quantized: bool = True
    expert: int | None = None
    share: float = 1.0

    @property
    def key(self) -> str:
        """The key of its input."""
        return input_key(self.layer, self.input)

    @property
    def rows(self) -> tuple[str, int | None]:
        """Tell which tensor it is given: that of its input, or the rows that its expert gets."""
        return self.key, self.expert

    @property
    def numbers(self) -> int:
        """Numbers of its weight."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Input:
    """Describe the tensor that some linears of a layer read, (..., width).

    producer: the norm or linear whose gains or rows multiply it, channel by channel, so that a
    scale of it can move there; None where linears read the stream itself, or a norm that
    another input reads too. shared: how many of its channels one row of the producer feeds; with
    grouped queries a row of the values feeds one of every query head that shares the head, so that
    channels come in runs of a head, `shared` of them in a row from the same rows. offset: what the
    gain of a norm has beside its weight.
    """

    layer: int
    name: str
    width: int
    reads: str | None
    producer: str | None
    shared: int = 1
    run: int = 1
    offset: float = 0.0

    @property
    def key(self) -> str:
        return input_key(self.layer, self.name)

    @property
    def kind(self) -> str:
        """Its name, without the number of its expert."""
        return self.name.partition(".")[0]

    @property
    def folds(self) -> bool:
        """Tell whether any scale of its channels can move into the producer."""
        return self.producer is not None and self.shared == 1


@dataclass(frozen=True)
class Norm:
    """Describe an RMSNorm whose gain is `offset` + weight.

    readers: the linears behind it, into which its gain folds; none where there are none, as with
    norms of single heads or behind a block, and before a head that may stay tied. width: how many
    numbers of a token it norms.
    """

    path: str
    layer: int | None  # None: the final norm
    readers: tuple[str, ...]
    width: int
    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True)
class ModelMap:
    """Describe a model. Sites stand in the order in which they are computed.

    rope_kind: that of RoPE, or with commas all that there are. rope_once: its module gives cosines
    and sines of pairs of numbers, and not of both of them. cannot: by the name of a rotation
    (r1, r2, ...), why the family's function does not survive it. logit_divisor: logits are what the
    head gives, divided by it. logit_cap: logits are then logit_cap·tanh(logit / logit_cap).
    only: of a part of a model (`part`), the layers that are there; None: all, and the ends.
    """

    family: str
    hidden: int
    layers: tuple[Layer, ...]
    sites: tuple[Site, ...]
    inputs: tuple[Input, ...]
    norms: tuple[Norm, ...]
    decoder: str  # from embedded tokens to what the head reads
    embedding: str
    head: str
    final_norm: str
    rope: str
    rope_kind: str
    rope_once: bool = False
    cannot: dict[str, str] = field(default_factory=dict)
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    only: tuple[int, ...] | None = None

    def part(self, layer: int | None) -> "ModelMap":
        """Return the map of a part of the model: one of its layers, or its ends.

        Its sites and norms are those of the part. Layers and inputs are all of the model's: they
        are names and widths.
        """
        sites = tuple(site for site in self.sites if site.layer == layer)
        norms = tuple(norm for norm in self.norms if norm.layer == layer)
        return replace(self, sites=sites, norms=norms, only=() if layer is None else (layer,))

    @property
    def there(self) -> dict[int, Layer]:
        """The layers that are there, by their numbers."""
        numbers = range(len(self.layers)) if self.only is None else self.only
        return {number: self.layers[number] for number in numbers}

    @property
    def has_ends(self) -> bool:
        """Tell whether embedding and head are there."""
        return not self.only

    @cached_property
    def input_at(self) -> dict[str, Input]:
        """The inputs by their keys."""
        return {input.key: input for input in self.inputs}

    @cached_property
    def site_at(self) -> dict[str, Site]:
        """The sites by their paths."""
        return {site.path: site for site in self.sites}

    @cached_property
    def norm_at(self) -> dict[str, Norm]:
        """The norms by their paths."""
        return {norm.path: norm for norm in self.norms}

    @property
    def attentions(self) -> list[str]:
        """The paths of all attentions."""
        return [layer.attention.path for layer in self.layers]

    @property
    def moving_rope(self) -> bool:
        """Tell whether RoPE's frequencies depend on how long a text is."""
        return "dynamic" in self.rope_kind or "longrope" in self.rope_kind

    @cached_property
    def key_biases(self) -> frozenset[int]:
        """The layers whose keys have a bias that their positions alone tell."""
        layers = enumerate(self.layers)
        biased = frozenset(index for index, layer in layers if layer.attention.key_bias)
        return frozenset() if self.moving_rope else biased

    @cached_property
    def dimensions(self) -> Dimensions:
        attentions = [layer.attention for layer in self.layers]
        found = Dimensions(
            hidden=self.hidden,
            head_dim=max(a.head_dim for a in attentions),
            intermediate=max(self.gated_widths, default=0),
            layers=len(self.layers),
            heads=max(a.heads for a in attentions),
            kv_heads=max(a.kv_heads for a in attentions),
        )
        held = Cached(*map(max, zip(*(a.cached for a in attentions), strict=True)))
        return found if held == found.cached else replace(found, held=held)

    @property
    def latent(self) -> Latent | None:
        """What keys and values are made of, if it is cached in place of them."""
        return self.layers[0].attention.latent

    @property
    def coded_widths(self) -> dict[str, int]:
        """How many numbers of a token a codec is given at once, of a head or of what all share."""
        sizes, keys = self.dimensions, self.width("r3")
        return {"keys": keys, "values": sizes.cached.value_dim, "queries": sizes.head_dim}

    @cached_property
    def widths(self) -> dict[str, int]:
        """Widths that rotations act on, by their names, but for those in which layers differ."""
        attentions = [layer.attention for layer in self.layers]
        found = {"r1": {self.hidden}, "r2": {a.value_dim for a in attentions}}
        found["r3"] = {a.turned_dim for a in attentions}
        for name, space in (("r4", "R4"), ("cross_head", "R2")):
            found[name] = {input.width for input in self.inputs if input.reads == space}
        return {name: min(widths) for name, widths in found.items() if len(widths) == 1}

    @cached_property
    def latents(self) -> dict[str, int]:
        """The widths of latents that linears read, by the names of those inputs."""
        return {input.name: input.width for input in self.inputs if input.reads == input.name}

    @cached_property
    def gated_widths(self) -> tuple[int, ...]:
        """The widths of what gated MLPs multiply last, which R4 turns, ascending."""
        return tuple(sorted({input.width for input in self.inputs if input.reads == "R4"}))

    def width(self, rotation: str) -> int:
        """Return the width that a rotation (r1, r2, ...) acts on.

        Raises InputError where layers differ in it, or nothing reads that space.
        """
        if rotation not in self.widths:
            raise InputError(
                f"rotation.{rotation} has one width in all layers, which a {self.family} model "
                f"of this shape has not: set rotation.{rotation}=none"
            )
        return self.widths[rotation]

    def check(self, rotation: str) -> None:
        """Raise InputError where the family's function does not survive a rotation."""
        if rotation in self.cannot:
            raise InputError(
                f"rotation.{rotation} does not fit the model family {self.family!r}, because "
                f"{self.cannot[rotation]}: set rotation.{rotation}=none"
            )


def _as_it_is(model: PreTrainedModel) -> None:
    """Leave a stock model as it is."""


@dataclass(frozen=True)
class Family:
    """Say how models of a family are read, and what has to be changed before and after.

    prepare: bring a stock model, in place, to modules that a map can name; restore: undo it, so
    that the model saves as a stock checkpoint. no_stock: why that cannot be undone once rotated.
    own_attention: its scores have soft caps or sinks, which torch's does not know.
    """

    read: Callable[[PreTrainedModel], ModelMap]
    prepare: Callable[[PreTrainedModel], None] = _as_it_is
    restore: Callable[[PreTrainedModel], None] = _as_it_is
    no_stock: str | None = None
    own_attention: bool = False

"""Decoders whose layers are attention and a gated MLP, with norms around: most families are."""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spinlab.model.families.names import Names, read_mlps
from spinlab.model.layer import Attention, GatedMLP, Layer
from spinlab.model.map import Input, ModelMap, Norm, Site

# why a family with norms behind its blocks has no R1
POST_NORM = (
    "a norm with gains stands between its blocks' outputs and the residual stream, and R1 cannot "
    "pass those gains"
)


def read_decoder(
    model: PreTrainedModel, names: Names, offset: float = 0.0, cannot: dict[str, str] | None = None
) -> ModelMap:
    """Return the map of a model with these names, whose norms multiply by `offset` + weight.

    The values of its gated MLPs are R4's, the heads R2's and R3's, the stream between R1's.
    """
    layers: list[Layer] = []
    sites: list[Site] = []
    inputs: list[Input] = []
    norms: list[Norm] = []
    for index, block in enumerate(model.get_submodule(names.layers).children()):
        reader = _LayerReader(model, index, block, names, offset)
        layers.append(reader.layer())
        sites += reader.sites()
        inputs += reader.inputs()
        norms += reader.norms()
    final: Any = model.get_submodule(names.final_norm)
    hidden: int = final.weight.shape[0]
    cannot = cannot or {}
    head = () if "r1" in cannot else (names.head,)  # no R1 has to pass its gain: it stays
    last = Norm(names.final_norm, None, head, hidden, epsilon_of(final), offset)
    return ModelMap(
        family=model.config.model_type,
        hidden=hidden,
        layers=tuple(layers),
        sites=tuple(sites),
        inputs=tuple(inputs),
        norms=(*norms, last),
        decoder=names.layers.rpartition(".")[0],
        embedding=names.embedding,
        head=names.head,
        final_norm=names.final_norm,
        rope=names.rope,
        rope_kind=_rope_kind(model.get_submodule(names.rope)),
        cannot=cannot,
    )


class _LayerReader:
    """Read one layer."""

    def __init__(
        self, model: PreTrainedModel, index: int, block: nn.Module, names: Names, offset: float
    ) -> None:
        self.config, self.index, self.block, self.names = model.config, index, block, names
        self.path, self.offset = f"{names.layers}.{index}", offset
        self.attention: Any = block.get_submodule(names.attention)
        self.head_dim: int = getattr(self.attention, names.head_dim)
        self.routers, self.mlps = read_mlps(block, names, self.config)

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}"

    def _shape(self, name: str) -> tuple[int, int]:
        """Return the rows and columns of a linear."""
        linear: Any = self.block.get_submodule(name)
        return tuple(linear.weight.shape)

    def _has_bias(self, name: str) -> bool:
        linear: Any = self.block.get_submodule(name)
        return linear.bias is not None

    def sites(self) -> list[Site]:
        """Return the linears, in the order in which they are computed."""
        names = self.names
        found = [
            self._site(names.queries, "qkv", "R1", None),
            self._site(names.keys, "qkv", "R1", None),
            self._site(names.values, "qkv", "R1", "R2"),
            self._site(names.out, "o", "R2", "R1"),
        ]
        for name in self.routers:
            found.append(replace(self._site(name, "gate_up", "R1", None), quantized=False))
        for mlp in self.mlps:
            own = [
                self._site(mlp.gate, "gate_up", "R1", None),
                self._site(mlp.up, "gate_up", "R1", None),
                self._site(mlp.down, mlp.input, "R4", "R1"),
            ]
            found += [replace(site, expert=mlp.expert, share=mlp.share) for site in own]
        return found

    def _site(self, name: str, input: str, reads: str, writes: str | None) -> Site:
        out, width = self._shape(name)
        return Site(self.index, name, self._at(name), input, reads, writes, width, out)

    def inputs(self) -> list[Input]:
        """Return what the linears read; a row of values feeds every head that shares it."""
        names = self.names
        shared = self._shape(names.out)[1] // self._shape(names.values)[0]
        normed = 1, 1, self.offset
        places = [
            ("qkv", names.queries, "R1", names.attention_norm, normed),
            ("o", names.out, "R2", names.values, (shared, self.head_dim)),
            ("gate_up", self.mlps[0].gate, "R1", names.mlp_norm, normed),
            *((mlp.input, mlp.down, "R4", mlp.up, (1, 1)) for mlp in self.mlps),
        ]
        return [
            Input(self.index, name, self._shape(reader)[1], reads, at and self._at(at), *rest)
            for name, reader, reads, at, rest in places
        ]

    def norms(self) -> list[Norm]:
        """Return the norms of the stream, with the linears behind them, and what linears give."""
        names = self.names
        readers = [name for mlp in self.mlps for name in (mlp.gate, mlp.up)]
        return [
            *self._norm(names.attention_norm, names.queries, names.keys, names.values),
            *(self._norm_of(*pair) for pair in self._head_norms()),
            *self._behind(names.behind_attention, names.out),
            *self._norm(names.mlp_norm, *self.routers, *readers),
            *self._behind(names.behind_mlp, self.mlps[0].down),
        ]

    def _norm(self, name: str | None, *readers: str) -> list[Norm]:
        if name is None:
            return []
        norm, paths = self.block.get_submodule(name), tuple(self._at(r) for r in readers)
        width = self._shape(readers[0])[1]
        return [Norm(self._at(name), self.index, paths, width, epsilon_of(norm), self.offset)]

    def _behind(self, name: str | None, linear: str) -> list[Norm]:
        return [] if name is None else [self._norm_of(name, linear)]

    def _head_norms(self) -> list[tuple[str, str]]:
        """Return the names of norms of queries and keys, and of the linears before them."""
        names, there = self.names, {name for name, _ in self.block.named_modules()}
        pairs = [(names.query_norm, names.queries), (names.key_norm, names.keys)]
        return [(norm, linear) for norm, linear in pairs if norm in there]

    def _norm_of(self, name: str, linear: str) -> Norm:
        """Return the norm of what a linear gives: nothing that reads it is a linear."""
        width, epsilon = self._shape(linear)[0], epsilon_of(self.block.get_submodule(name))
        return Norm(self._at(name), self.index, (), width, epsilon, self.offset)

    def layer(self) -> Layer:
        names, at = self.names, self._at
        of_heads = dict(self._head_norms())
        attention = Attention(
            path=at(names.attention),
            queries=at(names.queries),
            keys=at(names.keys),
            values=at(names.values),
            out=at(names.out),
            heads=self._shape(names.queries)[0] // self.head_dim,
            kv_heads=self._shape(names.keys)[0] // self.head_dim,
            head_dim=self.head_dim,
            rope=bool(getattr(self.attention, "use_rope", True)),
            window=self._window(),
            query_norm=at(names.query_norm) if names.query_norm in of_heads else None,
            key_norm=at(names.key_norm) if names.key_norm in of_heads else None,
            wide_norms=any(self._width(name) > self.head_dim for name in of_heads),
            key_bias=self._has_bias(names.keys) and names.key_norm not in of_heads,
        )
        if self.routers:
            return Layer(self.path, attention, None)
        parts = at(names.mlp), at(names.gate), at(names.up), at(names.down)
        activation = getattr(self.config, "hidden_activation", None)  # Gemma's word
        mlp = GatedMLP(*parts, activation or self.config.hidden_act)
        return Layer(self.path, attention, mlp, self.names.adds)

    def _width(self, norm: str) -> int:
        """Return how many gains a norm has."""
        module: Any = self.block.get_submodule(norm)
        return module.weight.shape[0]

    def _window(self) -> int | None:
        """Return the window that the layer says, or else the config of layers that slide."""
        kinds = getattr(self.config, "layer_types", None)
        slides = kinds is None or kinds[self.index] == "sliding_attention"
        general = getattr(self.config, "sliding_window", None) if slides else None
        return getattr(self.attention, "sliding_window", general)


def _rope_kind(rope: nn.Module) -> str:
    """Return the kind of RoPE, or all kinds where layers that slide have another than the rest."""
    kind: Any = getattr(rope, "rope_type", "default")
    return ", ".join(sorted(set(kind.values()))) if isinstance(kind, dict) else kind


def epsilon_of(norm: Any) -> float:
    """Return what an RMSNorm, of transformers or torch, adds to the variance."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

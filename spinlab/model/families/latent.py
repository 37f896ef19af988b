"""DeepSeek-V2 and V3: queries, keys and values are made of latents (arXiv 2405.04434).

What reads the stream are the linears of the latents: q_a_proj, whose output is normed and read by
the linear of queries, and kv_a_proj_with_mqa, whose first rows give the latent that is normed and
read by those of keys and of values, and whose last rows give the numbers of a key that RoPE turns,
one for all heads. A checkpoint without a latent of queries has them from the stream. When a model
is loaded, rows that go different ways become linears of their own: of the latent and of the key
that is turned, of keys and of values, which kv_b_proj holds head by head.

So R1 is read by the first linears, R2 acts on the values of a head, which may have another width
than its keys, and the gains of both norms fold into what reads the latents. Without gains a norm
commutes with a rotation of its latent, which linears alone write and read: `rotation.latents` is
fused there, one for all layers. transformers caches the latent, and the key that is turned, in
place of keys and values: they are what codecs are given, and R3 turns that key, and of every query
what meets it. The rest of keys is in no cache.

A router stays as stock, but for its product. V2's RoPE computes in float32, whatever the dtype,
and here in float64 where the model is.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.decoder import epsilon_of, read_decoder
from spinlab.model.families.experts import check_groups, join_all, linear_of, split_all
from spinlab.model.families.llama import NAMES
from spinlab.model.families.names import Names
from spinlab.model.layer import Latent, Layer
from spinlab.model.map import Family, Input, ModelMap, Norm, Site
from spinlab.model.split import join, split

_KV_A, _KV_B = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"
_LATENT, _TURNED = f"{_KV_A}.latent_proj", f"{_KV_A}.turned_proj"
_Q_A, _Q_NORM, _KV_NORM = (
    f"self_attn.{n}" for n in ("q_a_proj", "q_a_layernorm", "kv_a_layernorm")
)
_NAMES = replace(
    NAMES,
    queries="self_attn.q_b_proj",
    keys=f"{_KV_B}.k_proj",
    values=f"{_KV_B}.v_proj",
    head_dim="qk_head_dim",
    router="mlp.gate.linear",
    experts="mlp.experts",
    shared="mlp.shared_experts",
)


class KeysAndValues(nn.Module):
    """Stand for a linear whose rows are keys and values of one head after the other."""

    def __init__(self, linear: nn.Linear, heads: int, key_dim: int) -> None:
        super().__init__()
        rows = linear.weight.detach().unflatten(0, (heads, -1))
        self.k_proj = linear_of(rows[:, :key_dim].flatten(0, 1))
        self.v_proj = linear_of(rows[:, key_dim:].flatten(0, 1))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., latent) to (..., heads·(key_dim + value_dim))."""
        parts = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.k_proj, self.v_proj))
        return torch.cat(tuple(parts), dim=-1).flatten(-2)

    def whole(self) -> nn.Linear:
        """Return the linear, with the weights as they stand."""
        weights = (part.weight.detach() for part in (self.k_proj, self.v_proj))
        rows = tuple(weight.unflatten(0, (self.heads, -1)) for weight in weights)
        return linear_of(torch.cat(rows, dim=1).flatten(0, 1))


@cache
def _exact(stock: type[nn.Module]) -> type[nn.Module]:
    """Return a class of attention whose RoPE turns heads of float64 in float64.

    Its forward is the stock one's, which finds another function under the name of RoPE's.
    """
    forward: Any = stock.forward
    names = forward.__globals__
    if (turn := names.get("apply_rotary_emb")) is None:
        return stock
    names = {**names, "apply_rotary_emb": _at_least_as_wide(turn)}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Exact{stock.__name__}", (stock,), {"forward": own, "stock": stock})


def _at_least_as_wide(turn: Callable[..., Any]) -> Callable[..., Any]:
    """Return what turns queries and keys as a stock function does, in float64 where they are."""

    def turned(queries: torch.Tensor, keys: torch.Tensor, waves: torch.Tensor) -> Any:
        if queries.dtype != torch.float64:
            return turn(queries, keys, waves)
        both = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (queries, keys))
        return tuple(torch.view_as_real(x * waves.unsqueeze(1)).flatten(3) for x in both)

    return turned


def _split(model: PreTrainedModel) -> None:
    """Replace what a map cannot name, in place."""
    _check(model.config)
    for layer in _layers(model):
        attention = layer.self_attn
        attention.__class__ = _exact(type(attention))
        rows = {"latent_proj": attention.kv_lora_rank, "turned_proj": attention.qk_rope_head_dim}
        split(layer, _KV_A, rows)
        heads, key_dim = attention.num_heads, attention.qk_nope_head_dim
        attention.kv_b_proj = KeysAndValues(attention.kv_b_proj, heads, key_dim)
    split_all(model, _NAMES)


def _join(model: PreTrainedModel) -> None:
    """Undo `_split`; of a stock model nothing is to be done."""
    for layer in _layers(model):
        if isinstance(layer.self_attn.kv_b_proj, KeysAndValues):
            join(layer, _KV_A)
            layer.self_attn.__class__ = getattr(layer.self_attn, "stock", type(layer.self_attn))
            layer.self_attn.kv_b_proj = layer.self_attn.kv_b_proj.whole()
    join_all(model, _NAMES)


def _layers(model: PreTrainedModel) -> list[Any]:
    return list(model.get_submodule(NAMES.layers).children())


def _check(config: Any) -> None:
    """Raise InputError for a config that describes no attention or no mixture that can be run."""
    widths = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    widths += ["q_lora_rank"] if config.q_lora_rank is not None else []
    mixed = config.first_k_dense_replace < config.num_hidden_layers
    widths += ["n_routed_experts", "n_shared_experts", "moe_intermediate_size"] if mixed else []
    for name in widths:
        if not (getattr(config, name) or 0) > 0:
            raise InputError(f"{name}={getattr(config, name)} must be positive")
    if config.qk_rope_head_dim % 2:
        raise InputError(f"qk_rope_head_dim={config.qk_rope_head_dim} is odd, and RoPE turns pairs")
    if config.head_dim != config.qk_rope_head_dim:
        raise InputError(
            f"head_dim={config.head_dim} is taken for what RoPE turns, which is qk_rope_head_dim="
            f"{config.qk_rope_head_dim}: leave head_dim out"
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise InputError(
            f"num_key_value_heads={config.num_key_value_heads}: every head has keys and values of "
            f"its own here, so it must be num_attention_heads={config.num_attention_heads}"
        )
    if mixed:
        _check_router(config)


def _check_router(config: Any) -> None:
    """Raise InputError where a stock router of this config could not choose."""
    top_k, count = config.num_experts_per_tok, config.n_routed_experts
    if not 1 <= (top_k or 0) <= count:
        raise InputError(f"num_experts_per_tok={top_k} is not in 1 … {count}, the experts")
    if config.model_type != "deepseek_v2":  # V3 has one method, whatever its config calls it
        check_groups(config, least=2)
    elif config.topk_method == "group_limited_greedy":
        check_groups(config)
    elif config.topk_method != "greedy":
        raise InputError(
            f"topk_method={config.topk_method} is none of greedy and group_limited_greedy"
        )


def _read(model: PreTrainedModel) -> ModelMap:
    names = _NAMES
    if model.config.q_lora_rank is None:
        names = replace(names, queries=NAMES.queries)
    found = read_decoder(model, names)
    parts = [_Reader(model, names, layer, found) for layer in found.layers]
    return replace(
        found,
        layers=tuple(part.layer() for part in parts),
        sites=tuple(site for part in parts for site in part.sites()),
        inputs=tuple(input for part in parts for input in part.inputs()),
        norms=(*(norm for part in parts for norm in part.norms()), found.norms[-1]),
    )


class _Reader:
    """Bring what was read of a layer as of one with linears of queries, keys and values to latents.

    Queries, keys and values are named already, but not what they read.
    """

    def __init__(self, model: PreTrainedModel, names: Names, layer: Layer, found: ModelMap) -> None:
        self.model, self.names, self.path, self.known = model, names, layer.path, layer
        self.index, self.hidden = found.layers.index(layer), found.hidden
        self.stock: Any = model.get_submodule(layer.attention.path)
        self.has_q_latent = self.stock.q_a_proj is not None
        self.of_layer = [site for site in found.sites if site.layer == self.index]
        self.known_inputs = [input for input in found.inputs if input.layer == self.index]
        self.known_norms = [norm for norm in found.norms if norm.layer == self.index]

    def layer(self) -> Layer:
        """Return the layer with its attention."""
        stock, config = self.stock, self.model.config
        attention = replace(
            self.known.attention,
            kv_heads=self.known.attention.heads,
            neighbours=bool(getattr(config, "rope_interleave", True)),
            own_value_dim=stock.v_head_dim,
            latent=Latent(stock.kv_lora_rank, stock.qk_rope_head_dim),
        )
        return replace(self.known, attention=attention)

    def sites(self) -> list[Site]:
        """Return the linears of the layer, in the order in which they are computed."""
        queries, keys, values, *rest = self.of_layer
        readers = [self._beside(keys, name) for name in (_LATENT, _TURNED)]
        readers[0] = replace(readers[0], writes="kv_latent")
        found = [queries, *readers]
        if self.has_q_latent:
            made = replace(self._beside(keys, _Q_A), writes="q_latent")
            found = [made, replace(queries, input="q_latent", reads="q_latent"), *readers]
        made = [replace(site, input="kv_latent", reads="kv_latent") for site in (keys, values)]
        return [*found, *made, *rest]

    def inputs(self) -> list[Input]:
        """Return what the linears of the layer read."""
        stream, out, *rest = self.known_inputs
        stream = replace(stream, width=self.hidden)
        latents = [("kv_latent", self.stock.kv_lora_rank, _KV_NORM)]
        if self.has_q_latent:
            latents = [("q_latent", self.stock.q_lora_rank, _Q_NORM), *latents]
        made = [Input(self.index, n, width, n, self._at(norm)) for n, width, norm in latents]
        return [stream, *made, replace(out, shared=1, run=self.stock.v_head_dim), *rest]

    def norms(self) -> list[Norm]:
        """Return the norms of the layer."""
        first, *rest = self.known_norms
        of_stream = [site.path for site in self.sites() if site.input == "qkv"]
        made = [
            self._norm(name, [site.path for site in self.sites() if site.input == input])
            for name, input in ((_Q_NORM, "q_latent"), (_KV_NORM, "kv_latent"))
            if self.has_q_latent or name == _KV_NORM
        ]
        return [replace(first, readers=tuple(of_stream), width=self.hidden), *made, *rest]

    def _norm(self, name: str, readers: list[str]) -> Norm:
        module: Any = self.model.get_submodule(self._at(name))
        width = module.weight.shape[0]
        return Norm(self._at(name), self.index, tuple(readers), width, epsilon_of(module))

    def _beside(self, site: Site, name: str) -> Site:
        """Return the site of another linear that reads the stream as `site` was said to."""
        linear: Any = self.model.get_submodule(self._at(name))
        rows, width = linear.weight.shape
        path = self._at(name)
        return replace(site, name=name, path=path, in_features=width, out_features=rows)

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}"


DEEPSEEK = Family(_read, prepare=_split, restore=_join)

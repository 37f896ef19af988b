"""The names of a decoder's parts, and the gated MLPs that a layer has by them: one, or experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Names:
    """Name the parts of such a model, and those of a layer as seen from it.

    A family without norms of queries and keys has no module at `query_norm` and `key_norm`. Norms
    before attention and MLP are read by their linears; those behind stand before the stream.
    experts: where a layer has them, each of which names its linears as the MLP of other layers
    does, and router: the linear that chooses among them. shared: a gated MLP beside them that every
    token goes to, and shared_gate: the linear that says how much of it. adds: as in `Layer`.
    """

    layers: str
    embedding: str
    final_norm: str
    head: str
    rope: str
    attention: str
    mlp: str
    attention_norm: str | None
    mlp_norm: str | None
    queries: str
    keys: str
    values: str
    out: str
    gate: str
    up: str
    down: str
    query_norm: str
    key_norm: str
    behind_attention: str | None = None
    behind_mlp: str | None = None
    experts: str | None = None
    router: str | None = None
    shared: str | None = None
    shared_gate: str | None = None
    adds: bool = False
    head_dim: str = "head_dim"  # of the attention: how many numbers its queries have


@dataclass(frozen=True)
class MLP:
    """Name the linears of a gated MLP, what its last one reads, and whose it is."""

    gate: str
    up: str
    down: str
    input: str = "down"
    expert: int | None = None
    share: float = 1.0


def read_mlps(block: nn.Module, names: Names, config: Any) -> tuple[list[str], list[MLP]]:
    """Return the gated MLPs of a layer, by their names there, and what reads their input beside.

    That are the linears that choose among them, or weigh them: none where there is one MLP.
    """
    parts = dict(block.named_modules())
    if names.experts not in parts:
        return [], [MLP(names.gate, names.up, names.down)]
    experts: Any = parts[names.experts]
    routers = [name for name in (names.router, names.shared_gate) if name is not None]
    return routers, list(_of_mixture(names, len(experts), config.num_experts_per_tok))


def _of_mixture(names: Names, count: int, chosen: int) -> Iterator[MLP]:
    """Yield the experts, to some of which a token goes, and the one that all tokens go to."""
    for index in range(count):
        linears = _linears(names, f"{names.experts}.{index}")
        yield MLP(*linears, f"down.{index}", index, chosen / count)
    if names.shared is not None:
        yield MLP(*_linears(names, names.shared), "down.shared")


def _linears(names: Names, mlp: str) -> tuple[str, str, str]:
    """Return the linears of a gated MLP, which are named as those of a layer with one."""
    own = (name.rpartition(".")[2] for name in (names.gate, names.up, names.down))
    gate, up, down = (f"{mlp}.{name}" for name in own)
    return gate, up, down

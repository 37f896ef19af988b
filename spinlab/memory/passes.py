"""Operations of what stages do in turn: tokens through layers, fusing, and making networks.

A product of (n, k) and (k, m) counts as 2·n·k·m. What runs online before linears, norms, gates and
rounding are left out, as are keys that a causal token does not see.
"""

from collections import Counter

from spinlab.memory.job import Job
from spinlab.model.layer import Attention
from spinlab.speed import MOVED

Operations = Counter[str]  # counts by kind (`spinlab.speed`)


def of_kind(kind: str, count: float) -> Operations:
    """Return so many operations of a kind."""
    return Counter({kind: round(count)})


def passing(
    job: Job, tokens: int, length: int, kind: str, *, levels: str = "", head: bool = True
) -> Operations:
    """Count what tokens of sequences of a length take on their way through a network.

    kind: of its numbers; levels: as which linears multiply integers, where they do.
    """
    found = of_kind(kind, tokens * attending(job, length))
    for site in job.map.sites:
        of_site = levels if levels and site.path in job.on_integers else kind
        found[of_site] += round(2 * tokens * site.numbers * site.share)
    if head:
        found[kind] += 2 * tokens * job.end
    return found


def attending(job: Job, length: int) -> float:
    """Return the operations of all attentions for a token of a sequence, on average."""
    return sum(_of_attention(layer.attention, length) for layer in job.map.layers)


def _of_attention(attention: Attention, length: int) -> float:
    """Queries meet the keys before them, as far as they look, and as many values are summed."""
    reach = min(attention.window or length, length)
    keys = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
    return 2 * attention.heads * (attention.head_dim + attention.value_dim) * keys


def fusing(job: Job, replaced: bool = False) -> Operations:
    """Count what fused rotations take, if they are drawn and in no file that may lack them.

    replaced: the linears that are quantized get other weights, and are left as they are.
    """
    config, count = job.config.rotation, 0
    drawn = [name for name in ("r1", "r2", "latents") if vars(config)[name] != "none"]
    drawn = [] if config.load or job.transformed else drawn
    latents = job.map.latents if "latents" in drawn else {}
    for site in job.map.sites:
        if replaced and site.path in job.linears:
            continue
        widths = {**latents, "R1": job.map.hidden * ("r1" in drawn)}
        widths["R2"] = job.map.layers[site.layer].attention.value_dim * ("r2" in drawn)
        sides = (site.reads or "", site.writes or "")
        count += 2 * site.numbers * sum(widths.get(side, 0) for side in sides)
    if "r1" in drawn:
        count += 2 * 2 * job.end * job.map.hidden
    return of_kind("float64", count)


def making(job: Job, size: int, networks: int = 1) -> Operations:
    """Count the bytes of networks, in numbers of so many bytes, on their way to a GPU."""
    return of_kind(MOVED, networks * job.numbers * size * (job.device.type != "cpu"))


def between(job: Job, tokens: int) -> Operations:
    """Count the bytes of tokens' states on their way back to a GPU where layers come one by one."""
    moves = job.offload and job.device.type != "cpu"
    return of_kind(MOVED, tokens * job.map.hidden * job.size * len(job.map.layers) * moves)

"""What is measured of a network's memory, where it is asked for: the KV cache at work.

All of it is named before `/<variant>`:

diverges/<text>              greedy tokens before the first that is not the original's, the mean
needle/<n>, needle_stderr/<n>, needle_nats/<n>
                             numbers found in n tokens of text (`spinlab.metrics.needle`)
attention_*/<text>           errors of attention with exact inputs (`spinlab.metrics.attention`)
bytes/kv/<n>                 bytes of a sequence of n tokens in the cache
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spinlab.config import EvalConfig
from spinlab.kv.bits import cache_bytes
from spinlab.kv.cache import kv_path_of
from spinlab.metrics.attention import attention_errors
from spinlab.metrics.continuation import PROMPTS, continuations, first_divergence
from spinlab.metrics.needle import found_needles
from spinlab.model.modules import map_of
from spinlab.model.network import Network
from spinlab.runtime.fused.convert import slot_layout
from spinlab.stages.original import Original
from spinlab.stages.run import Run
from spinlab.stages.variant import Variant
from spinlab.tensors import write_tensors

_WRITTEN = "continuations.safetensors"
_CONTEXTS = (4096, 32768)


def recall_settings(measured: EvalConfig, seed: int) -> list[object]:
    """Name the settings that these numbers depend on, for keys; none where nothing is asked.

    seed: the run's, which draws the texts of needles.
    """
    asked = [measured.continued, measured.needle, measured.attention]
    texts = [seed] if measured.needle else []
    return [*asked, measured.task_batch, *texts] if any(asked) else []


def recall(
    run: Run,
    original: Original,
    model: PreTrainedModel | Network,
    variant: Variant,
    windows: Mapping[str, torch.Tensor],
    folder: tuple[Path, Path | None],
) -> dict[str, float]:
    """Return the metrics that are asked for, of a network in parts no more than needles.

    folder: where the stage leaves what it makes, and where it left that of the original.
    """
    measured = run.config.eval
    found: dict[str, float] = {}
    for length in measured.needle:
        generator = run.generator(f"needle {length}")
        parts = original.tokenizer, length, measured.task_batch, generator
        found |= found_needles(model, *parts)
    if isinstance(model, Network):  # whose settings ask for nothing else (`check_offload`)
        return found
    found |= _continued(model, variant, windows, measured.continued, folder)
    if measured.attention and variant.is_emulated:
        for label, ids in windows.items():
            errors = attention_errors(model, ids[: measured.attention])
            found |= {f"{name}/{label}": value for name, value in errors.items()}
    return found


def bytes_of_cache(model: PreTrainedModel) -> dict[str, float]:
    """Return the bytes of long sequences, of a network whose cache is coded in torch."""
    if slot_layout(model) is not None:
        return {}
    path, sizes = kv_path_of(model), map_of(model).dimensions
    return {f"bytes/kv/{tokens}": cache_bytes(path, sizes, tokens) for tokens in _CONTEXTS}


def _continued(
    model: PreTrainedModel,
    variant: Variant,
    windows: Mapping[str, torch.Tensor],
    tokens: int,
    folder: tuple[Path, Path | None],
) -> dict[str, float]:
    out, reference = folder
    if not tokens or not (variant.is_original or reference):
        return {}
    written = {
        label: continuations(model, ids[:PROMPTS, : ids.shape[1] - tokens], tokens)
        for label, ids in windows.items()
    }
    if reference is None:
        write_tensors(out / _WRITTEN, written)
        return {}
    known = load_file(reference / _WRITTEN)
    return {f"diverges/{label}": first_divergence(known[label], written[label]) for label in known}

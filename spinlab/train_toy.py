"""Train the toy model: a tiny Llama over bytes, on the packaged texts, with outliers planted.

    python -m spinlab.train_toy [FOLDER]

What it wrote lies in `spinlab/model/toy`, so that every machine starts from the same weights. They
are float16, in files of less than 200 kB. It takes some minutes on two CPU cores.

A model this small grows no outliers of its own. Two channels of the residual stream are given a
constant offset before training, as trained models have, and the gains of the norms that read them
start as much smaller. Outliers of values, keys and the MLP are planted afterwards, by powers of two
that cancel: these leave the function as it is, bit for bit.
"""

import logging
import math
import sys
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spinlab.data.text import calibration_split, random_windows, tokenize
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.modules import embedding_of, linear_at, map_of, norm_at

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "model" / "toy"
_TEXTS = ("wiki", "c4")  # their calibration parts

_STEPS, _BATCH, _LENGTH = 4000, 24, 256
_LR, _WARMUP, _DECAY = 6e-3, 100, 0.1
_HEADS, _KV_HEADS, _HEAD_DIM = 6, 2, 16
_EMBEDDING_STD = 0.25
_STREAM = {17: 12.0, 63: -12.0}  # channel of the stream -> offset, in deviations of the embedding
_VALUE, _KEYS, _INTERMEDIATE = (5,), (3, 11), (40, 150)  # RoPE turns keys 3 and 11 as one pair
_VALUE_SCALE, _KEY_SCALE, _INTERMEDIATE_SCALE = 4.0, 4.0, 8.0


def untrained_toy() -> LlamaForCausalLM:
    """Return the toy with random weights and the offsets of its residual stream."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,  # 12·8: not a power of two, as in real models
        intermediate_size=192,  # 12·16
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=cast(int, byte_tokenizer().eos_token_id),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding = embedding_of(model).weight
        norms = [norm_at(model, norm.path).weight for norm in map_of(model).norms]
        embedding.normal_(0, _EMBEDDING_STD)
        for channel, offset in _STREAM.items():
            embedding[:, channel] = offset * (_EMBEDDING_STD + 0.05 * embedding[:, channel])
            for gain in norms:
                gain[channel] /= abs(offset)
    return model


def train(model: LlamaForCausalLM, tokens: torch.Tensor, generator: torch.Generator) -> None:
    """Train on random windows of tokens (N,) by AdamW with a cosine schedule, in place."""
    parameters, embedding = list(model.parameters()), embedding_of(model).weight
    linears = [p for p in parameters if p.dim() == 2 and p is not embedding]
    others = [p for p in parameters if p.dim() == 1 or p is embedding]
    groups = [{"params": linears}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=_DECAY)
    for step in range(_STEPS):
        rate = _LR * min(1, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / _STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = random_windows(tokens, _LENGTH, _BATCH, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            log.info("step %d: loss %.3f", step, loss.item())


@torch.no_grad()
def plant_outliers(model: LlamaForCausalLM) -> None:
    """Scale channels of values, keys and the MLP up where they are written, down where read."""
    heads, kv_heads, width = range(_HEADS), range(_KV_HEADS), _HEAD_DIM
    for layer in map_of(model).layers:
        attention, mlp = layer.attention, layer.mlp
        assert mlp is not None
        weights = [attention.queries, attention.keys, attention.values, attention.out]
        q, k, v, out = (linear_at(model, path).weight for path in weights)
        up, down = (linear_at(model, path).weight for path in (mlp.up, mlp.down))
        for channel in _VALUE:
            v[[h * width + channel for h in kv_heads]] *= _VALUE_SCALE
            out[:, [h * width + channel for h in heads]] /= _VALUE_SCALE
        for channel in _KEYS:
            k[[h * width + channel for h in kv_heads]] *= _KEY_SCALE
            q[[h * width + channel for h in heads]] /= _KEY_SCALE
        up[list(_INTERMEDIATE)] *= _INTERMEDIATE_SCALE
        down[:, list(_INTERMEDIATE)] /= _INTERMEDIATE_SCALE


def main() -> None:
    """Train, plant, and save in float16."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = untrained_toy()
    text = "\n\n".join(calibration_split(name) for name in _TEXTS)
    train(model, tokenize(text, tokenizer), torch.Generator().manual_seed(0))
    plant_outliers(model)
    model.half().save_pretrained(folder, max_shard_size="190KB")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()

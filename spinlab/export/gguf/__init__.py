"""A GGUF file of the rotated model, for llama.cpp: float16, or blocks of spinlab's own levels.

R1 and R2 are in the weights, and nothing of spinlab's runs. `f16` is the original's function:
rotated weights that are not quantized. `q4_0` and `q8_0` hold the levels of the variant `fake`,
with scales in float16. Settings that blocks cannot hold are refused (`settings`), and so is what
llama.cpp computes otherwise (`architecture`) or cuts into other tokens (`tokens`).
"""

import json
import logging
import os
from pathlib import Path

import gguf

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.gguf.architecture import describe
from spinlab.export.gguf.layout import tensors_of
from spinlab.export.gguf.settings import FORM, ONLINE, check_settings
from spinlab.export.gguf.tokens import vocabulary_of
from spinlab.export.gguf.writer import MARK, Writer, is_export
from spinlab.export.listing import about_export
from spinlab.export.parts import check_made
from spinlab.export.targets import place_of, sole_writer, try_to_write
from spinlab.files import sync, writing
from spinlab.model.load import check_model, load_tokenizer, meta_model
from spinlab.model.modules import embedding_of, map_of

log = logging.getLogger(__name__)

_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for a place that holds something else, and for what no such file can hold.

    What a packaged GGUF has for a tokenizer is known once it is converted; `write` looks at it.
    """
    if target.is_dir():
        raise InputError(f"{setting} is a folder: name a file in it")
    _check_replaceable(setting, target)
    try_to_write(target.parent)
    check_model(config.model)
    model = meta_model(config.model, None)
    describe(setting, model)
    check_settings(setting, config, map_of(model))
    if not config.model.is_gguf:
        rows = embedding_of(model).num_embeddings
        vocabulary_of(setting, load_tokenizer(config.model, None), rows)


def write(subject: Subject, path: str) -> None:
    """Write the file, in place of what an earlier export wrote there."""
    config, setting = subject.config, f"export.gguf={path}"
    kind = config.export.gguf_type
    check_made(setting, FORM, ONLINE, subject.rotations)
    weights = {} if kind == "f16" else dict(subject.weights())
    model = subject.fused(weights) if weights else subject.rotated()
    if config.quant.tied.quantizes:  # rounded before it was rotated: what it became is in the model
        weights.pop(map_of(model).embedding, None)
    described = describe(setting, model)
    vocabulary = vocabulary_of(setting, subject.tokenizer(), embedding_of(model).num_embeddings)
    writer = Writer(described.architecture.name)
    record = subject.record()
    writer.add_string(MARK, json.dumps(about_export("gguf", record), sort_keys=True))
    writer.add_type("model")
    writer.add_name(config.model.name)
    for name, value in record.get("model", {}).get("license", {}).items():
        writer.add_string(f"general.{name.replace('_', '.')}", value)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    described.add(writer)
    vocabulary.add(writer)
    target = place_of(path)
    with writing(target.parent, "export.gguf"), sole_writer(target) as partial:
        file = partial / target.name
        writer.write(file, tensors_of(described.architecture, model, weights))
        sync(file)
        _check_replaceable(setting, target)
        os.replace(file, target)
        sync(target.parent)
    what = "weights that are not quantized" if kind == "f16" else f"rounded weights ({kind})"
    log.info("%-12s %s for llama.cpp in %s", "export", what, path)


def _check_replaceable(setting: str, target: Path) -> None:
    if target.exists() and target.stat().st_size and not is_export(target):
        raise InputError(f"{setting} is there and no earlier export: name another")

"""What leaves a run: the files that its settings ask for, beside the record."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.export.base import Subject, write_exports
from spinlab.model.license import with_license
from spinlab.model.load import file_dtype
from spinlab.model.network import Load, as_it_is
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.weights import weights_of
from spinlab.weights.quantized import QuantizedWeight


def export(pipeline: Pipeline, record: Mapping[str, Any] | None = None) -> None:
    """Write the files that the settings ask for. record: what they tell of the run.

    Of several processes the first one writes, once all have done the stages that it needs.
    """
    config = pipeline.config
    rounds = config.export.rounded and config.quant.rounds_weights
    made = pipeline.weights("fake") if rounds else None
    if not config.export.targets or not parallel.is_main():
        return
    weights = {} if made is None else weights_of(pipeline.run, made)
    with parallel.alone():
        write_exports(config, _subject(pipeline, weights, record or {}))


def _subject(
    pipeline: Pipeline, weights: Mapping[str, QuantizedWeight], record: Mapping[str, Any]
) -> Subject:
    """Return what is exported of a run. weights: the rounded ones."""
    config, original = pipeline.config, pipeline.original
    rotations = pipeline.rotations("fake")
    networks = QuantizedNetworks(original.load, config.quant, config.kv, config.seed)

    def in_parts(replaced: Mapping[str, QuantizedWeight]) -> Iterator[PreTrainedModel]:
        def fused(load: Load) -> PreTrainedModel:
            return replace(networks, original=load).fused(rotations, replaced)

        return original.network(fused).pieces()

    return Subject(
        config,
        rotations,
        lambda: with_license(record, config.model, original.converted),
        original=original.network(as_it_is).base,
        rotated=lambda: networks.stream_rotated(rotations),
        fused=lambda replaced: networks.fused(rotations, replaced),
        tokenizer=lambda: original.tokenizer,
        weights=lambda: weights,
        dtype=lambda: file_dtype(config.model, original.converted),
        in_parts=in_parts if config.runtime.offload else None,
    )

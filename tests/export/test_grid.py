"""Every method goes to every target, or is refused with a sentence whose settings then go there."""

import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from spinlab.compose import composed, options_of
from spinlab.config import Config, ExportConfig
from spinlab.errors import InputError
from spinlab.experiment import export
from spinlab.export.base import check_exports
from spinlab.export.listing import read_listing
from spinlab.export.profiles import PROFILES
from spinlab.rotation.exchange import is_rotations
from spinlab.stages.pipeline import Pipeline

BLOCKS = {"f16": ("F16", "F32"), "q4_0": ("Q4_0", "F16", "F32"), "q8_0": ("Q8_0", "F16", "F32")}
ANY = ("artefact", "R.safetensors")  # targets that hold whatever a run makes


@dataclass(frozen=True)
class Target:
    """Say by which settings a target is asked for, where, and how a test looks at it."""

    kind: str
    settings: tuple[str, ...]
    look: Callable[[Path], object]


def folder(kind: str, *settings: str) -> Target:
    return Target(kind, settings, lambda place: read_listing(str(place), place, kind))


def blocks(kind: str) -> Target:
    def look(place: Path) -> None:
        kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(place).tensors}
        assert kinds == set(BLOCKS[kind])

    return Target("gguf", (f"export.gguf_type={kind}",), look)


def rotations(place: Path) -> None:
    assert is_rotations(place)


TARGETS = {
    "artefact": folder("artefact"),
    "checkpoint": folder("checkpoint"),
    "R.safetensors": Target("rotations", (), rotations),
    "R.bin": Target("rotations", (), rotations),
    **{
        name: folder("compressed_tensors", f"quant={profile.preset}", f"export.profile={name}")
        for name, profile in PROFILES.items()
    },
    **{f"{kind}.gguf": blocks(kind) for kind in BLOCKS},
}
WINDOWS = (
    *(f"weights.{method}" for method in ("gptq", "gptaq", "qronos", "lwc")),
    *("rotation.statistics", "quant.calibration"),
)
TINY = [
    *("+experiment=toy", "model=random", "kv=kv16", "quant.weights.group_size=32"),
    *(f"{part}.samples=2" for part in WINDOWS),
    *(f"{part}.sequence_length=16" for part in WINDOWS),
    *("weights.lwc.epochs=1", "rotation.duquant.steps=1", "rotation.duquant.block_size=8"),
    *("learn.micro_batch=1", "learn.batch=1", "learn.sequence_length=16"),
    *("learn.optimizer.warmup=0", "eval.variants=[fp,fake]"),
]
SHAPE = {
    **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}
CURE = re.compile(r": set ([\w.]+=\S+(?: [\w.]+=\S+)*)")
# transforms that are learned are the method itself: no setting takes their place
NOWHERE = dict.fromkeys(("learned_inputs", "learned_blocks"), TARGETS.keys() - ANY)
NOWHERE["learned_fused"] = {"R.bin"}


@cache
def composed_for(method: str, presets: tuple[str, ...], tmp_path: Path) -> Config:
    """Compose what takes the longest once: a method with presets, on a tiny model."""
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    text = [f"data.calibration={file}", f"data.evaluation=[{file}]", f"paths.cache={tmp_path}/k"]
    config = composed(*TINY, f"+method={method}", *text, *presets)
    learn = replace(config.learn, steps=min(config.learn.steps, 1))
    return replace(config, learn=learn, model=replace(config.model, architecture=SHAPE))


def config_of(method: str, words: Iterable[str], tmp_path: Path) -> Config:
    """Return the settings of a method with words of a command line, which Hydra reads.

    Presets are composed, and so is what they may need at once: how weights are learned for.
    """
    presets: list[str] = []
    changes: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        *parts, name = override.key_or_group.split(".")
        if not parts or parts[0] == "learn":
            presets.append(str(override.input_line))
            continue
        place = changes
        for part in parts:
            place = place.setdefault(part, {})
        place[name] = override.value()
    return changed(composed_for(method, tuple(presets), tmp_path), changes)


def changed(settings: Any, changes: dict[str, Any]) -> Any:
    inner = {n: changed(getattr(settings, n), v) for n, v in changes.items() if type(v) is dict}
    return replace(settings, **{**changes, **inner})


def fitting(method: str, words: list[str], tmp_path: Path) -> Config | None:
    """Return settings that can be exported, with what sentences say; None where they do not."""
    for _ in range(5):
        try:
            config = config_of(method, words, tmp_path)
            check_exports(config)
        except InputError as error:
            cure = CURE.search(str(error))
            if cure is None:
                return None
            words = [*words, *shlex.split(cure[1])]
        else:
            return config
    raise AssertionError(f"{words} are not enough")


def together(configs: Iterable[Config]) -> list[Config]:
    """Return settings that differ in their exports alone as one that asks for all of them."""
    found: list[tuple[Config, dict[str, Any]]] = []
    for config in configs:
        asked = {n: v for n, v in vars(config.export).items() if v != getattr(ExportConfig, n)}
        plain = replace(config, export=ExportConfig())
        for other, others in found:
            if other == plain and not asked.keys() & others.keys():
                others |= asked
                break
        else:
            found.append((plain, asked))
    return [replace(config, export=ExportConfig(**asked)) for config, asked in found]


@pytest.mark.parametrize("method", options_of("method"))
def test_every_method_goes_to_every_target_or_says_what_does(method, tmp_path):
    configs = {}
    for name, target in TARGETS.items():
        place = f"export.{target.kind}={tmp_path}/{name}"
        configs[name] = fitting(method, [*target.settings, place], tmp_path)
    none = NOWHERE.get(method, set())
    assert {name for name, config in configs.items() if config is None} == none
    if "/" in method:  # published ones differ in formats alone
        return
    for config in together(filter(None, configs.values())):
        export(Pipeline(config))
    for name in TARGETS.keys() - none:
        TARGETS[name].look(tmp_path / name)


@pytest.mark.parametrize(
    ("method", "cure"),
    {
        "spinquant_had": "rotation.r3=none",
        "quarot": "rotation.r3=none rotation.cross_head=none",
        "duquant": "rotation.r3=none rotation.inputs=none rotation.smooth_groups=[qkv,gate_up]",
        "rtn": "",
        "smoothquant": "",
        "learned_ranges": "rotation.r3=none",
    }.items(),
)
def test_what_served_methods_leave_out_is_said_at_once(method, cure, tmp_path):
    settings = [*TARGETS["vllm_w4a8"].settings, f"export.compressed_tensors={tmp_path}/c"]
    config = config_of(method, settings, tmp_path)
    if not cure:
        return check_exports(config)
    with pytest.raises(InputError, match=re.escape(f": set {cure} (quant=w4a8_vllm")):
        check_exports(config)

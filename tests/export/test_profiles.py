"""Every method goes to every target, or is refused with a sentence whose settings then go there."""

import re
from dataclasses import replace

import pytest

from spinlab.compose import composed, options_of
from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.experiment import export
from spinlab.export.base import check_exports
from spinlab.export.listing import read_listing
from spinlab.export.profiles import PROFILES
from spinlab.stages.pipeline import Pipeline

TARGETS = {name: (f"quant={p.preset}", f"export.profile={name}") for name, p in PROFILES.items()}
TARGETS["checkpoint"] = ()
TINY = [
    *("+experiment=toy", "model=random", "kv=kv16", "quant.weights.group_size=32"),
    *(f"{part}.samples=2" for part in ("weights.gptq", "weights.lwc", "rotation.statistics")),
    *(f"{p}.sequence_length=16" for p in ("weights.gptq", "weights.lwc", "rotation.statistics")),
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
NOWHERE = "learned_inputs"


def config_of(method: str, settings: list[str], tmp_path) -> Config:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    text = [f"data.calibration={file}", f"data.evaluation=[{file}]", f"paths.cache={tmp_path}/k"]
    config = composed(*TINY, f"+method={method}", *text, *settings)
    learn = replace(config.learn, steps=min(config.learn.steps, 1))
    return replace(config, learn=learn, model=replace(config.model, architecture=SHAPE))


def fitting(method: str, settings: list[str], tmp_path) -> Config | None:
    """Return settings that can be exported, with what sentences say; None where they do not."""
    for _ in range(3):
        try:
            config = config_of(method, settings, tmp_path)
            check_exports(config)
        except InputError as error:
            cure = CURE.search(str(error))
            if cure is None:
                return None
            settings = [*settings, *cure[1].split()]
        else:
            return config
    raise AssertionError(f"{settings} are not enough")


@pytest.mark.parametrize("method", options_of("method"))
def test_every_method_goes_to_every_target_or_says_what_does(method, tmp_path, monkeypatch):
    monkeypatch.setattr("spinlab.cache._give_back_memory", lambda: None)  # which takes the longest
    for target, settings in TARGETS.items():
        kind = "checkpoint" if target == "checkpoint" else "compressed_tensors"
        place = f"export.{kind}={tmp_path}/{target}"
        config = fitting(method, [*settings, place], tmp_path)
        assert (config is None) == (method == NOWHERE)
        if config is not None and "/" not in method:  # published ones differ in formats alone
            export(Pipeline(config))
            read_listing(target, tmp_path / target, kind)


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
    settings = [*TARGETS["vllm_w4a8"], f"export.compressed_tensors={tmp_path}/c"]
    config = config_of(method, settings, tmp_path)
    if not cure:
        return check_exports(config)
    with pytest.raises(InputError, match=re.escape(f": set {cure} (quant=w4a8_vllm")):
        check_exports(config)

"""The largest inputs are found once for each variant, where a format asks for them."""

import pytest
import torch

import spinlab
from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.experiment import export
from spinlab.fakequant.peaks import input_peaks
from spinlab.rotation.rotations import AS_IT_IS
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.rotations import networks_of

SMALL = ["learn=none", "model=random", "eval.tasks=[]", "weights.clip.search=false"]
SMALL += ["quant=nvfp4_calibrated", "quant.calibration.samples=3", "model.dtype=float32"]
SMALL += ["quant.calibration.sequence_length=48", "eval.variants=[fp,rtn,fake]"]


@pytest.fixture
def fixed(tmp_path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    return [f"data.calibration={text}", f"data.evaluation=[{text}]", f"paths.cache={tmp_path}/c"]


def test_every_variant_has_those_of_its_own_rotations(fixed):
    run = Pipeline(composed("+experiment=toy", *SMALL, *fixed))
    windows = run.calibration.windows("peaks", 3, 48)
    networks = networks_of(run.run, run.original)
    for name, rotations in {"rtn": AS_IT_IS, "fake": run.rotations("fake")}.items():
        wanted = input_peaks(networks.rotated(rotations), windows, run.config.quant)
        assert run.rotations(name).peaks == wanted
    assert run.rotations("rtn").peaks != run.rotations("fake").peaks
    assert run.rotations("rtn").r1 is None and run.rotations("fake").r1 is not None


def test_they_are_found_again_where_text_or_rotations_are_others_and_only_there(fixed):
    def key(*overrides: str) -> str:
        made = Pipeline(composed("+experiment=toy", *SMALL, *fixed, *overrides)).rotated("fake")
        assert made is not None
        return made.key

    plain = key()
    assert key("kv.keys.bits=8") == key("weights=gptq") == plain
    others = ("quant.calibration.samples=2", "rotation.r4=none", "seed=1")
    assert len({plain, *(key(other) for other in others)}) == 4
    pipeline = Pipeline(composed("+experiment=toy", *SMALL, *fixed, "quant=nvfp4"))
    assert not pipeline.rotations("fake").peaks and pipeline.rotated("rtn") is None


def test_an_artefact_keeps_them(fixed, tmp_path):
    words = [*SMALL, *fixed, f"export.artefact={tmp_path}/a", "kv=kv16"]
    run = Pipeline(composed("+experiment=toy", *words))
    export(run)
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted, _ = run.network("fake")
    assert torch.equal(spinlab.load(tmp_path / "a")(ids).logits, wanted(ids).logits)
    changed = composed("+experiment=toy", *words, "quant.calibration.sequence_length=8")
    other, _ = Pipeline(changed).network("fake")
    assert not torch.equal(other(ids).logits, wanted(ids).logits)


def test_a_text_that_is_too_short_for_their_windows_is_said_at_once(fixed):
    config = composed("+experiment=toy", *SMALL, *fixed)
    assert config.calibration_windows["quant.calibration.sequence_length"] == 48
    with pytest.raises(InputError, match=r"quant\.calibration\.samples=0"):
        composed("+experiment=toy", *SMALL, "quant.calibration.samples=0")

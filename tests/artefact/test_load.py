"""An artefact is the very network that was exported, and nothing that was tampered with."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spinlab
from spinlab.artefact.read import tokenizer_of
from spinlab.artefact.weights import StoredWeights
from spinlab.config import (
    CodecConfig,
    FormatChange,
    KVConfig,
    ModelConfig,
    Override,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.errors import InputError
from spinlab.export.identity import digest_of
from spinlab.files import file_digest, write_json
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.files import LISTING
from spinlab.model.load import check_model
from spinlab.model.modules import map_of
from spinlab.rotation.blocks import InvertibleBlocks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.exchange import read_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import slot_layout
from spinlab.runtime.fused.operations import REFERENCE
from spinlab.weights.quantized import QuantizedWeight
from tests.artefact.conftest import ENDS

FLOATS = QuantConfig(
    weights=TensorQuant(8, True, 8, format="fp8"),
    activations=TensorQuant(8, True, format="fp8"),
    o_proj_per_head=False,
)
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
MIXED = QuantConfig(
    weights=TensorQuant(bits=3, group_size=8),
    activations=TensorQuant(group_size=8),
    overrides=[
        Override("*.0.*.down_proj", FormatChange(bits=8), FormatChange(bits=8)),
        Override("*.1.*.o_proj", FormatChange(bits=16)),
    ],
    head=ENDS,
    embedding=replace(ENDS, symmetric=False, group_size=16),
)


def with_inputs(rotations: RotationSet) -> RotationSet:
    """Add learned ranges, a scale that runs online with a dual transform, and maps in blocks."""
    generator = torch.Generator().manual_seed(5)
    blocks = [torch.stack([random_orthogonal(8, generator) for _ in range(4)]) for _ in range(2)]
    dual = DualTransform(blocks[0], torch.randperm(32, generator=generator), blocks[1])
    scale = torch.rand(32, generator=generator, dtype=torch.float64) + 0.5
    maps = torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    inputs = {"0.qkv": ScaledDual(scale, False, dual)}
    inputs["1.gate_up"] = ScaledDual(dual=InvertibleBlocks(maps))
    return replace(rotations, inputs=inputs, clips={"1.down": 0.9})


CASES = {
    "llama": {},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "phi3": {"family": "phi3"},
    "mixtral": {"family": "mixtral"},
    **{family: {"family": family} for family in ("qwen2_moe", "llama4_text", "gpt_oss", "phimoe")},
    "glm4_moe": {"family": "glm4_moe", "dtype": "bfloat16"},
    "granite": {"family": "granite"},
    "stablelm": {"family": "stablelm"},
    "cohere": {"family": "cohere"},
    "olmo2": {"family": "olmo2", "rotation": RotationConfig(r1="none")},
    "olmo3": {"family": "olmo3", "rotation": RotationConfig(r1="none")},
    "gemma": {"family": "gemma"},
    "gemma2": {"family": "gemma2", "rotation": RotationConfig(r1="none")},
    "gemma3": {"family": "gemma3_text", "rotation": RotationConfig(r1="none")},
    "gemma2 in bfloat16, tied": {
        "quant": QuantConfig(tied=ENDS),
        "dtype": "bfloat16",
        "family": "gemma2",
        "rotation": RotationConfig(r1="none"),
    },
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "mixed formats": {"quant": MIXED},
    "tied": {"quant": QuantConfig(tied=ENDS)},
    "tied in bfloat16": {"quant": QuantConfig(tied=ENDS), "dtype": "bfloat16", "family": "qwen2"},
    "tied and nothing rotated": {
        "quant": QuantConfig(tied=ENDS),
        "change": lambda rotations: RotationSet(),
    },
    "cache": {"kv": KVConfig(CodecConfig(bits=2, group_size=4), CodecConfig(bits=8))},
    "first and newest tokens in floats": {"kv": KVConfig(sinks=2, window=5)},
    "inputs": {"change": with_inputs},
    "an R3 for each layer": {"rotation": RotationConfig(r3="random", r3_per_layer=True)},
    "floats": {"quant": FLOATS},
    "no rotations": {"change": lambda rotations: RotationSet()},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_computes_the_same_bits(export, case):
    folder, meant = export(**CASES[case])
    found = spinlab.load(folder, device="cpu")
    assert torch.equal(found(IDS).logits, meant(IDS).logits)
    told = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(found.generate(IDS, **told), meant.generate(IDS, **told))
    assert not any(p.requires_grad for p in found.parameters()) and not found.training


def test_a_fresh_process_loads_it_with_no_network(export):
    folder, meant = export()
    code = (
        "import sys, socket\n"
        "socket.socket.connect = lambda *a: sys.exit('a connection was asked for')\n"
        "import spinlab; assert 'torch' not in sys.modules, 'torch came with the package'\n"
        "import torch; model = spinlab.load(sys.argv[1], device='cpu')\n"
        "from safetensors.torch import save_file\n"
        "save_file({'logits': model(torch.arange(20)[None]).logits}, sys.argv[2])\n"
    )
    out = folder.parent / "logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(out)["logits"], meant(torch.arange(20)[None]).logits)


@pytest.mark.parametrize("kv", [None, KVConfig(sinks=2, window=5)], ids=["all coded", "window"])
def test_the_runtime_of_fused_kernels_takes_it_too(export, monkeypatch, kv):
    """Their operations' definitions stand for the kernels, which need a GPU."""
    monkeypatch.setattr("spinlab.runtime.choice.triton_operations", lambda: REFERENCE)
    monkeypatch.setattr("spinlab.artefact.read.choose_backend", lambda name, device: "triton")
    folder, meant = export(quant=QuantConfig(head=ENDS), backend="triton", kv=kv)
    assert slot_layout(meant) is not None
    found = spinlab.load(folder, device="cpu")
    assert torch.equal(found(IDS).logits, meant(IDS).logits)


def test_no_linear_is_ever_there_in_floats(export, monkeypatch):
    folder, _ = export()
    asked: list[str] = []
    read = StoredWeights.__getitem__

    def refuse(self, dtype):
        raise AssertionError("a weight was written out in floats")

    def counted(self, name):
        asked.append(name)
        return read(self, name)

    monkeypatch.setattr(QuantizedWeight, "dequantize", refuse)
    monkeypatch.setattr(StoredWeights, "__getitem__", counted)
    model = spinlab.load(folder, device="cpu")
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 14  # each is unpacked once
    floats = {n for n, p in model.named_parameters() if p.is_floating_point() and p.dim() > 1}
    assert floats == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_artefact_says_what_it_is_and_where_it_comes_from(export):
    folder, _ = export(quant=MIXED)
    listing = json.loads((folder / LISTING).read_text())
    about = listing["spinlab"]
    assert about["record"]["metrics"] == {"ppl/text/integer": 9.5}
    assert "stages" not in about["record"]
    assert (about["export"], about["network"]["seed"]) == ("artefact", 3)
    files = {p.name for p in folder.iterdir()} - {LISTING}
    assert files == set(listing["files"])
    assert all(not name.endswith((".bin", ".pt", ".pkl", ".py")) for name in files)
    with safe_open(folder / "rotations.safetensors", framework="pt") as file:
        assert not {"r1", "r2"} & set(file.keys())
    assert tokenizer_of(folder)("abc").input_ids == byte_tokenizer()("abc").input_ids


@pytest.mark.parametrize("tied", [False, True])
def test_levels_take_their_bits_and_nothing_is_there_twice(export, tied):
    quant = QuantConfig(tied=ENDS) if tied else QuantConfig(head=ENDS, embedding=ENDS)
    folder, _ = export(quant=quant)
    found = {
        name: tensor.numel() * tensor.element_size()
        for file in ("weights", "rest")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }
    linears = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 40)
    rows = 2 * (32 + 16 + 16 + 32 + 40 + 40 + 32)
    ends, norms = (1 if tied else 2), 5 * 32
    assert sum(found.values()) == linears // 2 + ends * 260 * 32 + 4 * (rows + ends * 260 + norms)
    with safe_open(folder / "rotations.safetensors", framework="pt") as file:
        assert ("r1" in set(file.keys())) == tied


def test_others_say_that_it_is_no_checkpoint(export):
    folder, _ = export()
    with pytest.raises(InputError, match=r"load it with spinlab\.load"):
        check_model(ModelConfig(path=str(folder)))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def reword(folder: Path, change) -> None:
    """Change a manifest and nothing else."""
    listing = json.loads((folder / LISTING).read_text())
    change(listing)
    write_json(folder / LISTING, listing)


def forged(folder: Path, file: str, change) -> None:
    """Change the tensors of a file, and let the manifest agree."""
    with safe_open(folder / file, framework="pt") as stored:
        words = stored.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, words)
    reword(folder, lambda listing: listing["files"].update({file: file_digest(folder / file)}))


def rewritten(folder: Path, file: str, change) -> None:
    """Change a file of JSON, and let the manifest agree."""
    write_json(folder / file, change(json.loads((folder / file).read_text())))
    reword(folder, lambda listing: listing["files"].update({file: digest_of(folder / file)}))


def retold(folder: Path, formats) -> None:
    """Change what a file says of the formats of its weights, and let the manifest agree."""
    file = folder / "weights.safetensors"
    save_file(load_file(file), file, {"formats": json.dumps(formats)})
    reword(folder, lambda listing: listing["files"].update({file.name: file_digest(file)}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


LEVELS, SCALE = (f"model.layers.1.mlp.up_proj.{part}" for part in ("levels", "scale"))
WRONG = {
    "no folder": (shutil.rmtree, "is no folder: name one that export.artefact wrote"),
    "no manifest": (lambda f: (f / LISTING).unlink(), "holds no manifest.json"),
    "manifest of others": (lambda f: write_json(f / LISTING, {"x": 1}), "is none of spinlab's"),
    "manifest cut": (lambda f: cut(f / LISTING), "is no JSON"),
    "another export": (
        lambda f: reword(f, lambda m: m["spinlab"].update(export="checkpoint")),
        "was written by export.checkpoint, not export.artefact",
    ),
    "a later version": (
        lambda f: reword(f, lambda m: m["spinlab"].update(version=2)),
        "has the form 2, and this version of spinlab reads 1",
    ),
    "weights cut": (lambda f: cut(f / "weights.safetensors"), "weights.safetensors changed since"),
    "a level": (lambda f: flip(f / "weights.safetensors"), "weights.safetensors changed since"),
    "a norm": (lambda f: flip(f / "rest.safetensors"), "rest.safetensors changed since"),
    "a rotation": (lambda f: flip(f / "rotations.safetensors"), "rotations.safetensors changed"),
    "a file gone": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "a path out": (
        lambda f: reword(f, lambda m: m["files"].update({"../x": "0"})),
        "names ../x, which is not in the folder",
    ),
    "a path from the root": (
        lambda f: reword(f, lambda m: m["files"].update({"/etc/passwd": "0"})),
        "names /etc/passwd, which is not in the folder",
    ),
    "another family": (
        lambda f: rewritten(f, "config.json", lambda c: {**c, "model_type": "qwen2"}),
        "is missing in rest.safetensors, or has no place there",
    ),
    "an unknown family": (
        lambda f: rewritten(f, "config.json", lambda c: {"model_type": "mamba"}),
        "mamba",
    ),
    "an unknown dtype": (
        lambda f: reword(f, lambda m: m["spinlab"]["network"].update(dtype="int8")),
        "the network in its manifest cannot be read: dtype=int8 is unknown",
    ),
    "a reference": (
        lambda f: reword(f, lambda m: m["spinlab"]["network"].update(dtype="${oc.env:HOME}")),
        "refers to what lies elsewhere",
    ),
    "an unknown setting": (
        lambda f: reword(f, lambda m: m["spinlab"]["network"]["kv"].update(magic=1)),
        "Key 'magic' not in 'KVConfig'",
    ),
    "a forged scale": (
        lambda f: forged(f, "weights.safetensors", lambda t: t.update({SCALE: t[SCALE][:-1]})),
        "up_proj.scale is .*, which does not fit",
    ),
    "forged levels": (
        lambda f: forged(f, "weights.safetensors", lambda t: t.update({LEVELS: t[LEVELS].short()})),
        "up_proj.levels is .*, which does not fit",
    ),
    "a weight gone": (
        lambda f: forged(f, "weights.safetensors", lambda t: t.pop(SCALE)),
        "up_proj.scale is missing among its weights",
    ),
    "a foreign tensor": (
        lambda f: forged(f, "rest.safetensors", lambda t: t.update(x=torch.ones(2))),
        "x is missing in rest.safetensors, or has no place there",
    ),
    "a wider norm": (
        lambda f: forged(
            f, "rest.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(33)})
        ),
        r"model.norm.weight is \(33,\) torch.float32, and the model has \(32,\)",
    ),
    "a norm that is none": (
        lambda f: forged(
            f, "rest.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan"))
        ),
        "model.norm.weight holds numbers that are not finite",
    ),
    "a scale that is none": (
        lambda f: forged(f, "weights.safetensors", lambda t: t[SCALE].fill_(float("inf"))),
        "up_proj.scale holds what is no scale",
    ),
    "formats of no kind": (lambda f: retold(f, {"x": ["integer", 99, True, 8]}), "99 bits"),
    "formats as a list": (lambda f: retold(f, [1]), "cannot be read: AttributeError"),
    "another way to generate": (
        lambda f: rewritten(f, "generation_config.json", lambda c: [c]),
        "holds a list, not settings by name",
    ),
    "no way to generate": (
        lambda f: (
            (f / "generation_config.json").unlink(),
            reword(f, lambda m: m["files"].pop("generation_config.json")),
        ),
        "does not list generation_config.json",
    ),
    "an empty list": (
        lambda f: reword(f, lambda m: m.update(files={})),
        "does not list config.json",
    ),
    "another's template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 1 }}"),
        "holds chat_template.jinja, which is not of the export",
    ),
    "no record": (
        lambda f: reword(f, lambda m: m["spinlab"].update(record=[1])),
        "does not say what was exported, of which run",
    ),
    "a norm of another dtype": (
        lambda f: forged(
            f, "rest.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(32).half()})
        ),
        "model.norm.weight is .* torch.float16, and the model has",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_whole_and_its_own_is_refused_in_a_sentence(export, wrong):
    folder, _ = export()
    alter, message = WRONG[wrong]
    alter(folder)
    with pytest.raises(InputError, match=message) as caught:
        spinlab.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_an_artefact_that_says_nothing_of_key_biases_has_them_coded(export):
    """It is of a version that knew nothing else."""
    folder, meant = export("qwen2", kv=KVConfig(key_bias="coded"))
    _, apart = export("qwen2", name="apart")
    reword(folder, lambda m: m["spinlab"]["network"]["kv"].pop("key_bias"))
    found = spinlab.load(folder, device="cpu")(IDS).logits
    assert torch.equal(found, meant(IDS).logits)
    assert not torch.equal(found, apart(IDS).logits)


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(export):
    folder, _ = export()
    (folder / "notes.txt").write_text("mine")
    _, meant = export("qwen2")
    assert torch.equal(spinlab.load(folder, device="cpu")(IDS).logits, meant(IDS).logits)
    assert (folder / "notes.txt").read_text() == "mine"
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (folder / "sub").symlink_to(outside)
    reword(folder, lambda listing: listing["files"].update({"sub/mine.txt": "0"}))
    with pytest.raises(InputError, match="holds a link in the place of sub"):
        export()
    assert (outside / "mine.txt").read_text() == "mine"
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(InputError, match="is there and no earlier export"):
        export(name="other")


def test_an_export_over_another_that_is_cut_off_can_be_repeated(export, monkeypatch):
    folder, _ = export()
    replaced, left = os.replace, iter(range(3))

    def killed(source, target):
        if Path(target).parent == folder and Path(source).parent != folder:
            next(left)  # StopIteration stands for a kill behind the third file
        replaced(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(RuntimeError, match="StopIteration"):
        export("qwen2")
    monkeypatch.undo()
    with pytest.raises(InputError, match="was being written over when that was cut off"):
        spinlab.load(folder)
    _, meant = export("qwen2")
    assert torch.equal(spinlab.load(folder, device="cpu")(IDS).logits, meant(IDS).logits)


def test_its_rotations_are_not_taken_for_all_there_are(export):
    folder, model = export(quant=QuantConfig(tied=ENDS))
    for file in (folder / "rotations.safetensors",):
        with pytest.raises(InputError, match="belongs to an exported model, which has r1, r2"):
            read_rotations(file, map_of(model))

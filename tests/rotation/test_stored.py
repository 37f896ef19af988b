"""Files that are no rotations of a model, or no longer: each is one sentence, and no work."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.load import meta_model
from spinlab.model.map import ModelMap
from spinlab.model.modules import linears_of, map_of
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.stored import read_stored, rules_of

SHAPE = {
    "hidden_size": 24,
    "head_dim": 8,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
NAN, INF = float("nan"), float("inf")


def everything() -> RotationSet:
    """Return a set that has every kind of part."""
    g = torch.Generator().manual_seed(0)
    turns = [random_orthogonal(n, g) for n in (24, 8, 8, 4)]
    dual = DualTransform(turns[3][None], torch.randperm(24, generator=g), turns[3].mT[None])
    across = OnlineRotation(random_orthogonal(4, g), torch.eye(8))
    return RotationSet(
        turns[0],
        torch.stack(turns[1:3]),
        hadamard_rotation(8),
        hadamard_rotation(40, 8),
        across,
        {"0.qkv": ScaledDual(torch.full((24,), 0.5, dtype=torch.float64), False, dual)},
        {"1.down": 0.75},
        {"0.keys": 0.9, "1.values": 0.85},
        {UP: torch.full((40, 1, 1), 0.9), DOWN: torch.full((24, 5, 1), 0.8)},
        {"family": "llama", "seed": 3, "learn": {"steps": 2}},
        {"0.qkv": 3.5, "1.o": 0.0},
    )


Change = Callable[[dict[str, torch.Tensor], dict[str, str]], None]


def altered(path: Path, change: Change) -> Path:
    """Save everything, and once more with its tensors or metadata changed."""
    everything().save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def described(**changes) -> ModelMap:
    return map_of(meta_model(ModelConfig(architecture={**SHAPE, **changes}), None))


def read(path: Path, **changes) -> RotationSet:
    return read_stored(path, described(**changes))


def words(**changes) -> Change:
    """Return a change of what the file says of itself."""

    def change(tensors, metadata):
        found = json.loads(metadata["rotations"])
        metadata["rotations"] = json.dumps({**found, **changes})

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, metadata: tensors.update({name: make(tensors[name])})


def entry(name: str, value: float) -> Change:
    """Return a change of a tensor's first entry."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[0] = value
        return x

    return tensor(name, change)


def gone(name: str) -> Change:
    return lambda tensors, metadata: tensors.__delitem__(name)


def more(name: str, found: torch.Tensor) -> Change:
    return lambda tensors, metadata: tensors.update({name: found})


def test_a_file_with_every_part_comes_back(tmp_path):
    saved = everything()
    saved.save(tmp_path / "r.safetensors")
    loaded = read(tmp_path / "r.safetensors")
    assert loaded.about == saved.about
    assert (loaded.clips, loaded.kv_clips) == (saved.clips, saved.kv_clips)
    expected = saved.tensors()
    assert loaded.tensors().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.tensors().items())


def test_files_of_an_earlier_version_are_read(tmp_path):
    """They had two entries of metadata, and no weight ranges."""

    def change(tensors, metadata):
        found = json.loads(metadata.pop("rotations"))
        metadata |= {name: json.dumps(found[name]) for name in ("about", "blocks")}
        for name in [n for n in tensors if n.startswith("weight_clip.")]:
            del tensors[name]

    loaded, saved = read(altered(tmp_path / "r.safetensors", change)), everything()
    assert loaded.about == saved.about
    assert torch.equal(loaded.r4.dense(), saved.r4.dense())
    assert loaded.weight_clips == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # transforms of inputs
        (
            more("inputs.1.o.folded_scale", torch.arange(1.0, 33)),
            r"inputs\.1\.o\.folded_scale differs between heads that share values",
        ),
        (
            more("inputs.1.down.first", torch.eye(8)[None]),
            r"inputs\.1\.down\.first is \(1, 8, 8\): alone it has a block of its own for every 8",
        ),
        # names
        (more("foo", torch.eye(2)), "foo has no place among the rotations of this model"),
        (more("clip.9.o", torch.tensor(0.5)), r"clip\.9\.o has no place"),
        (more("clip.01.o", torch.tensor(0.5)), r"clip\.01\.o has no place"),
        (more("kv_clip.2.keys", torch.tensor(0.5)), r"kv_clip\.2\.keys has no place"),
        (more("kv_clip.1.queries", torch.tensor(0.5)), r"kv_clip\.1\.queries has no place"),
        (more("kv_clip.1.values", torch.tensor(1.5)), r"has the clip ratio 1\.5, not in"),
        (more("weight_clip.lm_head", torch.ones(64, 1, 1)), "weight_clip.lm_head has no place"),
        (more("inputs.0.k.scale", torch.ones(24)), r"inputs\.0\.k\.scale has no place"),
        (gone("r4.left"), "r4 has one of its two factors only"),
        (gone("inputs.0.qkv.permutation"), r"inputs\.0\.qkv is no transform"),
        (more("inputs.0.qkv.folded_scale", torch.ones(24)), "there is at most one scale"),
        # shapes
        (tensor("r1", lambda x: torch.eye(12)), r"r1 is \(12, 12\), the model has \(24, 24\)"),
        (tensor("r1", lambda x: torch.zeros(0, 0)), r"r1 is \(0, 0\), the model has \(24, 24\)"),
        (tensor("r1", lambda x: torch.ones(())), r"r1 is \(\), the model has \(24, 24\)"),
        (tensor("r2", lambda x: x[:1].clone()), r"r2 is \(1, 8, 8\), the model has \(2, 8, 8\)"),
        (tensor("r3.right", lambda x: x[:4].clone()), "the model has a square whose order divides"),
        (tensor("r3.right", lambda x: torch.eye(4)), "r3 has width 4, the model has 8"),
        (tensor("r3.right", lambda x: x.repeat(3, 1, 1)), "order divides 8, or 2 of them"),
        (tensor("r3.right", lambda x: x.repeat(2, 1, 1)), "one factor for all layers and one for"),
        (tensor("r4.right", lambda x: x.repeat(2, 1, 1)), "the model has a square whose order"),
        (tensor("r4.left", lambda x: torch.zeros(0, 0)), "the model has a square"),
        (tensor("inputs.0.qkv.first", lambda x: torch.eye(5)[None]), "square blocks that tile 24"),
        (tensor("inputs.0.qkv.first", lambda x: torch.eye(4)), "square blocks that tile 24"),
        (tensor("inputs.0.qkv.first", lambda x: x.repeat(3, 1, 1)), "square blocks that tile 24"),
        (tensor("clip.1.down", lambda x: x.repeat(2)), r"clip\.1\.down is \(2,\)"),
        (tensor(f"weight_clip.{UP}", lambda x: x[:3].clone()), r"is \(3, 1, 1\), the model has"),
        (tensor(f"weight_clip.{DOWN}", lambda x: torch.ones(24, 3, 1)), "groups of 40 inputs"),
        # dtypes
        (tensor("r1", lambda x: x.to(torch.complex64)), "r1 is C64, not F64 or F32"),
        (tensor("r1", lambda x: x.round().to(torch.int64)), "r1 is I64, not F64"),
        (tensor("r2", lambda x: x.to(torch.float8_e4m3fn)), "r2 is F8_E4M3, not F64"),
        (tensor("inputs.0.qkv.permutation", lambda x: x.float()), "is F32, not I64"),
        # numbers
        (entry("r1", NAN), "r1 holds numbers that are not finite"),
        (entry("r2", INF), "r2 holds numbers that are not finite"),
        (entry("r1", 1e200), r"r1 is not orthogonal: max\|RRᵀ-I\| = inf"),
        (tensor("r1", lambda x: x * 1.1), r"r1 is not orthogonal: max\|RRᵀ-I\| = 2\.1e-01"),
        (entry("r3.right", 0.5), r"r3\.right is not orthogonal"),
        (entry("cross_head.left", NAN), r"cross_head\.left holds numbers that are not finite"),
        (entry("inputs.0.qkv.second", 7.0), r"inputs\.0\.qkv\.second is not orthogonal"),
        (entry("inputs.0.qkv.scale", 0.0), r"has the scale 0, not in \[1e-18, 1e18\]"),
        (entry("inputs.0.qkv.scale", -1.0), "has the scale -1, not in"),
        (entry("inputs.0.qkv.scale", 1e300), r"has the scale 1e\+300, not in"),
        (entry("inputs.0.qkv.scale", NAN), "has the scale nan, not in"),
        (tensor("inputs.0.qkv.permutation", lambda x: x * 0), "is no permutation of 24 channels"),
        (entry("inputs.0.qkv.permutation", -1), "is no permutation of 24 channels"),
        (entry("inputs.0.qkv.permutation", 2**62), "is no permutation of 24 channels"),
        (entry("clip.1.down", 0.0), r"has the clip ratio 0, not in \(0, 1\]"),
        (entry("clip.1.down", 1.5), r"has the clip ratio 1\.5, not in"),
        (entry(f"weight_clip.{UP}", NAN), "has the clip ratio nan, not in"),
        (entry(f"weight_clip.{DOWN}", -0.5), r"has the clip ratio -0\.5, not in"),
        # what it says of itself
        (lambda tensors, metadata: metadata.clear(), "spinlab did not write it"),
        (lambda t, metadata: metadata.update(rotations="{"), "its metadata is no JSON"),
        (words(rounded_inputs=1), "rounded_inputs in its metadata is 1, not true or false"),
        (lambda t, metadata: metadata.update(rotations="[" * 9**5), "its metadata is no JSON"),
        (lambda t, metadata: metadata.update(rotations="[]"), "must be two JSON objects"),
        (lambda t, metadata: metadata.update(rotations="9" * 5000), "its metadata is no JSON"),
        (words(about=None), "must be two JSON objects"),
        (words(about=["family"]), "must be two JSON objects"),
        (words(about={"family": ["llama"]}), r"about\.family is \['llama'\], not a str"),
        (words(about={"trained": 4}), r"about\.trained is 4, not a dict"),
        (words(about={"trained": {"weights_bits": "4"}}), r"weights_bits is '4', not a int"),
        (words(about={"trained": {"formats": []}}), r"trained\.formats is \[\], not a dict"),
        (words(about={"learn": [1]}), r"about\.learn is \[1\], not a dict"),
        (words(about={"fused": [1]}), "hold names and digests"),
        (words(about={"files": {"x": 1}}), "hold names and digests"),
        (words(blocks={"r4": 0}), "blocks of r4 are 0"),
        (words(blocks={"r4": 5.0}), r"blocks of r4 are 5\.0"),
        (words(blocks={"r4": True}), "blocks of r4 are True"),
        (words(blocks={"r1": 1}), "blocks of r1 are 1"),
        (words(blocks={"r4": 10**30}), r"r4 has width 8\d+, the model has 40"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_model_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read(altered(tmp_path / "r.safetensors", change))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 12},
        {"num_hidden_layers": 3},
        {"intermediate_size": 20},
        {"head_dim": 4},
        {"num_attention_heads": 2},
    ],
    ids=str,
)
def test_rotations_of_another_model_are_refused(tmp_path, changes):
    everything().save(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="the model has"):
        read(tmp_path / "r.safetensors", **changes)


def test_numbers_are_not_read_before_their_shapes(tmp_path):
    """A matrix far too large is refused by the header, however long the file is."""
    header = {
        "__metadata__": {"rotations": json.dumps({"about": {}, "blocks": {}})},
        "r1": {"dtype": "F64", "shape": [50_000, 50_000], "data_offsets": [0, 50_000**2 * 8]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "r.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 50_000**2 * 8)  # a hole: it takes no place on the disk
    with pytest.raises(InputError, match=r"r1 is \(50000, 50000\), the model has \(24, 24\)"):
        read(tmp_path / "r.safetensors")


def test_thousands_of_names_are_refused_at_the_first(tmp_path):
    def change(tensors, metadata):
        tensors |= {f"clip.{n}.o": torch.tensor(0.5) for n in range(5000)}

    with pytest.raises(InputError, match=r"clip\.10\.o has no place"):
        read(altered(tmp_path / "r.safetensors", change))


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_cut_file_is_refused(tmp_path, length):
    everything().save(tmp_path / "r.safetensors")
    whole = (tmp_path / "r.safetensors").read_bytes()
    (tmp_path / "r.safetensors").write_bytes(whole[:length])
    with pytest.raises(InputError, match="is no file of rotations"):
        read(tmp_path / "r.safetensors")


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3", "mixtral"])
def test_every_linear_has_a_rule_of_its_own_shape(make_family_model, model_type):
    model = make_family_model(model_type)
    rules = rules_of(map_of(model))
    ranged = {name for name in rules if name.startswith("weight_clip.")}
    rounded = {site.path: linear for site, linear in linears_of(model) if site.quantized}
    assert ranged == {f"weight_clip.{name}" for name in rounded}
    for path, linear in rounded.items():
        site = map_of(model).site_at[path]
        rows, width = linear.weight.shape
        fits = rules[f"weight_clip.{site.path}"].fits
        assert fits((rows, 1, 1))
        assert fits((rows, width // 2, 1))
        assert not fits((rows, width + 1, 1))
        assert not fits((rows + 1, 1, 1))

"""A model's map is read once, stays with it, and nothing else knows a module's name."""

import ast
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spinlab
from spinlab.errors import InputError
from spinlab.model.modules import linear_at, linears_of, map_of

ROOT = Path(spinlab.__file__).parent
NAMES = re.compile(
    r"\b(?:[qkvo]_proj|qkv_proj|(?:gate|up|down|gate_up)_proj|self_attn|mlp\.\w+|(?:input|post_\w+)"
    r"_layernorm|embed_tokens|lm_head|rotary_emb|[qk]_norm)\b"
)
# settings that are called so, as users write them, and SpinQuant's keys of an R.bin
SETTINGS = ("o_proj_per_head",)
FORMATS = ("rotation/exchange.py",)


def words(tree: ast.AST) -> Iterator[str]:
    """Yield names, attributes and strings of a module, but for docstrings."""
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name | ast.arg):
            yield node.id if isinstance(node, ast.Name) else node.arg


def test_no_module_is_named_outside_its_family():
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith("model/families/") or place in FORMATS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = [w for w in words(tree) if NAMES.search(w) and w not in SETTINGS]
        named = [w for w in named if not any(f"quant.{setting}" in w for setting in SETTINGS)]
        if named:
            found[place] = named
    assert found == {}


def test_the_scan_finds_strings_and_attributes_and_skips_what_explains():
    tree = ast.parse('"""Of q_proj."""\nlayer.self_attn(f"{x}.lm_head", path="mlp.up_proj")')
    assert {w for w in words(tree) if NAMES.search(w)} == {"self_attn", "mlp.up_proj", ".lm_head"}


def test_a_map_is_read_once_and_goes_where_the_model_goes(make_model):
    model = make_model()
    found = map_of(model)
    model.register_forward_hook(lambda *_: None)
    assert map_of(model.to(torch.float32)) is found
    copied = deepcopy(model)
    assert map_of(copied) == found
    model.model.layers[0].mlp = torch.nn.Identity()
    assert map_of(model) is found


def test_a_linear_is_asked_for_and_nothing_else_is_given(make_model):
    model = make_model()
    assert linear_at(model, "model.layers.0.mlp.up_proj").weight.shape == (40, 24)
    for path in ("model.norm", "model.embed_tokens"):
        with pytest.raises(TypeError, match=f"{path} is a .*, no linear"):
            linear_at(model, path)


def test_layers_may_differ_and_what_needs_one_width_then_says_so(make_model):
    model = make_model()
    mlp = model.model.layers[1].mlp
    for name, shape in (("gate_proj", (24, 16)), ("up_proj", (24, 16)), ("down_proj", (16, 24))):
        setattr(mlp, name, torch.nn.Linear(*shape, bias=False, dtype=torch.float64))
    del model.model_map
    found = map_of(model)
    assert [input.width for input in found.inputs if input.name == "down"] == [40, 16]
    assert found.widths.keys() == {"r1", "r2", "r3", "cross_head"}
    assert found.dimensions.intermediate == 40
    with pytest.raises(InputError, match=r"rotation\.r4 has one width in all layers"):
        found.width("r4")


def test_what_a_family_cannot_do_is_its_own_sentence(make_model):
    found = replace(map_of(make_model()), cannot={"r1": "its norms stand behind the blocks"})
    found.check("r2")
    with pytest.raises(InputError, match=r"its norms stand behind .*: set rotation\.r1=none"):
        found.check("r1")


def test_sites_name_their_inputs_and_their_norms_readers(make_model):
    model = make_model()
    found = map_of(model)
    assert all(site.key in found.input_at for site, _ in linears_of(model))
    for norm in found.norms:
        behind = {s.path for s in found.sites if found.input_at[s.key].producer == norm.path}
        assert set(norm.readers) == (behind or {"lm_head"})

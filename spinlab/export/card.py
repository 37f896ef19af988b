"""The README.md of an export: what the hub shows of it, made of the run's record and nothing else.

Its head tells the hub the base model, the license and the library; numbers come with the protocol
that they were measured in, and what was not measured is said.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from spinlab.export.words import formats, precision, protocol, rotations
from spinlab.report.cells import cells_of
from spinlab.report.commands import words_of_command
from spinlab.report.formats import MISSING, markdown

_NO_METRICS = "Nothing was measured of this network."
_ELSEWHERE = ("tracker", "hydra", "sweep")  # words of a command that change no number


@dataclass(frozen=True)
class _Kind:
    """What is said of an export by its kind. variants: whose numbers are its own, the first first.

    caveat: what its numbers, or their lack, do not say.
    """

    what: str
    library: str
    load: str
    tags: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    caveat: str = ""
    quantized: bool = True


_STOCK = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""
_NO_R4 = (
    "transformers leaves out R4, which runs online here: what it computes without is another "
    "network, and a wrong one."
)
_OTHER = _Kind("An export of one run.", "spinlab", "As spinlab's documentation of it says.")
_KINDS: Mapping[str, _Kind] = {
    "artefact": _Kind(
        "The quantized network itself: packed integer weights, every other number in the dtype "
        "that the run had, and the rotations that run online. Other tools do not read it.",
        "spinlab",
        """```python
import spinlab
from spinlab.artefact.read import tokenizer_of

model = spinlab.load("FOLDER")  # a transformers model on integer kernels
tokenizer = tokenizer_of("FOLDER")
```

```sh
python -m spinlab.generate FOLDER "Once upon a time"
python -m spinlab.evaluate FOLDER  # measures again, and compares with the numbers above
```""",
        variants=("integer", "fake"),
    ),
    "checkpoint": _Kind(
        "The rotated model in 16 bits, for any tool that reads transformers checkpoints and "
        "quantizes by itself. It is not quantized: the formats below are those that its rotations "
        "were made for.",
        "transformers",
        _STOCK,
        caveat="These are the original's numbers. Without quantization the rotated model computes "
        "the same function up to rounding; what another tool makes of it was not measured.",
        quantized=False,
    ),
    "compressed_tensors": _Kind(
        "The quantized network in the format of compressed-tensors, which vLLM and transformers "
        "read.",
        "transformers",
        "```sh\nvllm serve FOLDER --tensor-parallel-size 1\n```",
        tags=("compressed-tensors", "vllm"),
        variants=("integer", "fake"),
        caveat="They were measured with these weights and formats on spinlab's own runtime; what "
        "another runtime computes was not measured.",
    ),
}


def card(kind: str, record: Mapping[str, Any], told: Mapping[str, Any] | None = None) -> str:
    """Return the text of an export's README.md.

    kind, told: as `spinlab.export.listing.write_listing` has them. record: of the run, whose
    `model` may have a `license` (`spinlab.model.license`).
    """
    about = _KINDS.get(kind, _OTHER)
    config, model = record.get("config", {}), record.get("model", {})
    name = config.get("model", {}).get("name", "a model")
    bits = precision(config) if config else ""
    title = f"{name}, {bits if about.quantized else 'rotated'}".rstrip(", ")
    parts = [
        f"---\n{_head(about, model, bits)}\n---",
        f"# {title}",
        f"{about.what} Made from {_origin(model)} by spinlab, which learns rotations for the "
        "quantization of language models.",
    ]
    if profile := (told or {}).get("profile"):
        parts.append(f"Its profile is `{profile}`.")
    if config:
        sentences = "\n".join(f"- {line}" for line in (*formats(config), rotations(record)))
        parts += ["## Formats", sentences]
    parts += ["## Numbers", *_numbers(about, record)]
    if record.get("overrides") is not None:
        parts += ["## Made by", *_made_by(kind, record)]
    parts += ["## Load", about.load]
    if kind == "compressed_tensors":
        parts.append(_NO_R4 if _turns_online(record) else _STOCK)
    parts += ["## License", _license(model)]
    return "\n\n".join(parts) + "\n"


def _turns_online(record: Mapping[str, Any]) -> bool:
    """Tell whether R4 may be in the network, whose half of inputs a reader has to apply."""
    rotation = record.get("config", {}).get("rotation", {})
    from_file = bool(record.get("identity", {}).get("rotations"))
    return from_file or (rotation.get("online") and rotation["r4"] != "none")


def _head(about: _Kind, model: Mapping[str, Any], bits: str) -> str:
    hub = model.get("source", {}).get("hub")
    quantized = [bits.lower(), "quantized"] if about.quantized and bits else []
    data = ModelCardData(
        base_model=hub,
        base_model_relation="quantized" if hub and about.quantized else None,
        library_name=about.library,
        pipeline_tag="text-generation",
        tags=["spinlab", "rotation", *quantized, *about.tags],
        **model.get("license", {}),
    )
    return data.to_yaml()


def _origin(model: Mapping[str, Any]) -> str:
    source = model.get("source", {})
    if "hub" in source:
        at = source.get("commit", "main")
        return f"[{source['hub']}](https://huggingface.co/{source['hub']}) at `{at[:12]}`"
    if "package" in source:
        return f"`{source['file']}` of the package `{source['package']}`"
    if "folder" in source:
        return f"a local checkpoint called `{source['folder']}`"
    return "random weights" if "random" in source else "a model that the record does not name"


def _numbers(about: _Kind, record: Mapping[str, Any]) -> Iterator[str]:
    metrics = record.get("metrics", {}) if "config" in record else {}
    own = next((v for v in about.variants if any(n.endswith(f"/{v}") for n in metrics)), None)
    columns = {"original (`fp`)": "fp"}
    if own:
        columns[f"this network (`{own}`)"] = own
    cells = [cells_of(record, variant) for variant in columns.values()] if metrics else []
    rows = [[title, *(column[title] for column in cells)] for title in (cells[0] if cells else ())]
    rows = [row for row in rows if set(row[1:]) != {MISSING}]
    if not rows or (about.variants and not own):
        yield _NO_METRICS
        return
    yield markdown([["metric", *columns], *rows])
    if about.caveat:
        yield about.caveat
    seed = record["config"].get("seed")
    spread = (
        f"One run, with seed {seed}: how far another seed or another processor moves these "
        "numbers was not measured."
    )
    yield "\n".join(f"- {line}" for line in (*protocol(record, columns.values()), spread))


def _made_by(kind: str, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the command without places of this machine, and what it ran on."""
    words = [w for w in words_of_command(record) if not w.lstrip("+~").startswith(_ELSEWHERE)]
    command = shlex.join(["spinlab", *words, f"export.{kind}=FOLDER"])
    yield f"```sh\n{command}\n```"
    facts = record.get("environment", {})
    packages = (f"{n} {v}" for n, v in facts.get("packages", {}).items() if v)
    git = facts.get("git") or {}
    changed = " with changes that are not in it" if git.get("dirty") else ""
    told = [
        *([f"key of the record {record['key']}"] if "key" in record else []),
        *packages,
        *([f"commit {git['commit'][:12]}{changed}"] if git.get("commit") else []),
        *([f"back end {facts['backend']}"] if facts.get("backend") else []),
        facts.get("gpu") or facts.get("cpu") or "",
    ]
    yield f"{', '.join(part for part in told if part)}."


def _license(model: Mapping[str, Any]) -> str:
    """Say under which license the original is, or that it is not known."""
    told = model.get("license", {})
    name = told.get("license_name") or told.get("license")
    if not name:
        return (
            "What license the original has is not known here: look where it comes from before "
            "this is passed on."
        )
    link = f" ({told['license_link']})" if "license_link" in told else ""
    return f"The original says that its license is {name}{link}, which holds for this too."

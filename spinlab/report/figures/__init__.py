"""Figures of runs and records, by kind: `python -m spinlab.report figure=KIND out=FILE ...`.

A kind is a function of words, each `name=value` on the command line, to a drawing; its signature
says which there are and what they are by default.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spinlab.errors import InputError, did_you_mean
from spinlab.files import writing
from spinlab.report.figures.ablation import ablation
from spinlab.report.figures.bars import ratios, shares
from spinlab.report.figures.curves import curves
from spinlab.report.figures.layers import layers
from spinlab.report.figures.outliers import outliers, surface
from spinlab.report.figures.pareto import pareto
from spinlab.report.figures.spread import seed_variance
from spinlab.report.figures.steps import duquant
from spinlab.report.figures.style import Drawing
from spinlab.report.figures.tradeoff import bits, speed

KINDS: Mapping[str, Callable[..., Drawing]] = {
    "outliers": outliers,
    "surface": surface,
    "duquant": duquant,
    "seed_variance": seed_variance,
    "curves": curves,
    "layers": layers,
    "bits": bits,
    "speed": speed,
    "pareto": pareto,
    "ablation": ablation,
    "ratios": ratios,
    "shares": shares,
}


def read_words(words: Sequence[str]) -> dict[str, str]:
    """Return words `name=value` by name; raise InputError for one that is none, or comes twice."""
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise InputError(f"{word!r} is no key=value: write one like {name or 'key'}=…")
        if name in given:
            raise InputError(f"{name}= is given twice: once is enough")
        given[name] = value
    return given


def make_figure(words: Sequence[str]) -> Path:
    """Draw what the words `name=value` ask for and return the file.

    `figure` is the kind, `out` the .png or .pdf, the others are those of the kind. Raises
    InputError for a word that it does not have, or that is missing.
    """
    given = read_words(words)
    kind, out = (given.pop(name, "") for name in ("figure", "out"))
    if kind not in KINDS:
        raise InputError(f"figure={kind} is unknown: {did_you_mean(kind, [*KINDS])}")
    known = inspect.signature(KINDS[kind]).parameters
    for name in given:
        if name not in known:
            near = did_you_mean(name, [*known, "out"])
            raise InputError(f"figure={kind} does not read {name}=: {near}")
    needed = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing := needed + ["out"] * (not out):
        raise InputError(f"figure={kind} needs {missing[0]}=")
    path = Path(out).expanduser()
    with writing(path.parent, "out"):
        return KINDS[kind](**given).save(path)


def figure_file(source: Path, kind: str, name: str, *words: str) -> Path:
    """Draw a kind of figure for a page and return its file: `name`, beside what it is drawn from.

    source: the run, record or folder that the kind reads. words: more of the kind's own.
    """
    if kind not in KINDS:
        raise InputError(f"there is no figure {kind}: {did_you_mean(kind, [*KINDS])}")
    first = next(iter(inspect.signature(KINDS[kind]).parameters), None)
    if first is None:
        raise InputError(f"the figure {kind} is made of no record: draw it with figure={kind}")
    out = source.parent / name
    return make_figure([f"figure={kind}", f"{first}={source}", f"out={out}", *words])


def described() -> str:
    """Return the kinds with their words, a line for each."""
    lines = []
    for name, kind in KINDS.items():
        words = inspect.signature(kind).parameters.values()
        told = [f"{w.name}={'...' if w.default is w.empty else w.default}" for w in words]
        lines.append(" ".join([f"figure={name}", *told, "out=FILE"]))
    return "\n".join(lines)

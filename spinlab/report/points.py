"""The points of a sweep side by side: where they differ, how they ended, what they measured."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from spinlab.config import VARIANTS
from spinlab.config.values import words_of
from spinlab.report.formats import markdown, number

Metrics = Mapping[str, float]


def own_of_each(points: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """Return of every point's words (`key=value`) those that are not the same in all of them."""
    split = [words_of(words) for words in points]
    keys = dict.fromkeys(key for words in split for key in words)
    told = [key for key in keys if len({words.get(key) for words in split}) > 1]
    return [{key: words[key] for key in told if key in words} for words in split]


def metric_names(measured: Sequence[Metrics], wanted: Sequence[str] = ()) -> list[str]:
    """Return the names that follow patterns, in their order; without any, perplexities at the end.

    Those are of each text, of the last variant that all have measured that measured any.
    """
    names = sorted({name for metrics in measured for name in metrics})
    if wanted:
        following = (name for pattern in wanted for name in names if fnmatchcase(name, pattern))
        return list(dict.fromkeys(following))
    perplexities = [{n for n in metrics if n.startswith("ppl/")} for metrics in measured if metrics]
    for variant in reversed(VARIANTS):
        of_variant = [name for name in names if name.startswith("ppl/") and name.endswith(variant)]
        if of_variant and all(names & set(of_variant) for names in perplexities):
            return of_variant
    return []


def points_table(points: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> str:
    """Return a table with a row for every point, of its `words`, `state` and `metrics`."""
    own = own_of_each([point["words"] for point in points])
    keys = list(dict.fromkeys(key for words in own for key in words))
    names = metric_names([point["metrics"] for point in points], wanted)
    rows = [[*keys, "state", *names]]
    for point, words in zip(points, own, strict=True):
        cells = [words.get(key, "") for key in keys]
        rows.append([*cells, point["state"], *(number(point["metrics"].get(n)) for n in names)])
    return markdown(rows)

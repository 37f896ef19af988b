"""Numbers of a record beside those measured now, and whether they agree.

The same network on the same machine, back end and packages gives the same bits. Elsewhere sums are
added in another order, which flips levels here and there, and every flip makes more of them: two
such networks are two drawings of the rounding noise. Their log-probabilities of a token differ by
2·sqrt(KL) or less in standard deviation, where KL is the record's, from the original: it is half
the variance that one drawing has around the original, and the two add up. So log-perplexities over
n tokens agree within two standard errors, 4·sqrt(KL/n), within twice the record's own gap between
emulation and kernels, or within 0.005, whichever is most. (SmolLM2 at W4A4KV4 on 4092 tokens, on a
processor's widest instructions and on its plainest: 0.004 and 0.033 apart, where 0.08 are allowed.)
An accuracy, of the same questions, agrees within two of its standard errors, or one question.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spinlab.report.formats import MISSING, markdown, number

VARIANTS = ("integer", "fake")  # what an artefact is; the first that was measured counts
_LEAST, _UNKNOWN = 0.005, 0.05  # of a log-perplexity; where the record has no KL
# what of the environment makes sums
_MEANS = ("backend", "cpu", "cpu_capability", "gpu", "cuda", "threads", "processes")
_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Compared:
    """A metric of the record and of now. tolerance: how far they may differ; None: not compared."""

    metric: str
    record: float | None
    now: float
    tolerance: float | None

    @property
    def agrees(self) -> bool | None:
        """Whether they agree; None for what is not compared."""
        if self.record is None or self.tolerance is None:
            return None
        return abs(self.now - self.record) <= self.tolerance

    @property
    def verdict(self) -> str:
        if self.record is None:
            return "not in the record"
        if self.tolerance is None:
            return "of other questions"
        if self.record == self.now:
            return "the same bits"
        told = "agrees" if self.agrees else "differs"
        within = f"within {number(self.tolerance)}" if self.tolerance else "must have the same bits"
        return f"{told} ({within})" if self.agrees else f"{told} ({within} expected)"


def recorded(metrics: Mapping[str, float], metric: str) -> float | None:
    """Return what a record has of an artefact's network for a metric without its variant."""
    found = (metrics.get(f"{metric}/{variant}") for variant in VARIANTS)
    return next((value for value in found if value is not None), None)


def differing(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what two environments differ in, of all that the bits of a sum depend on."""
    pairs = {name: (record.get(name), now.get(name)) for name in _MEANS}
    versions = [facts.get("packages", {}) for facts in (record, now)]
    pairs |= {name: (versions[0].get(name), versions[1].get(name)) for name in _PACKAGES}
    return [f"{name} {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]


def compared(
    record: Mapping[str, Any],
    now: Mapping[str, float],
    tokens: Mapping[str, int],
    same: bool,
    limit: int | None,
) -> Iterator[Compared]:
    """Yield every metric that was measured now, beside the record's.

    tokens: that were predicted of each text. same: the bits must be those of the record. limit:
    questions that were asked of each task.
    """
    metrics, asked = record["metrics"], record["config"]["eval"]
    for name, value in now.items():
        before = recorded(metrics, name)
        tolerance: float | None = 0.0
        if name.startswith("zeroshot") and limit != asked["limit"]:
            tolerance = None
        elif not same and before is not None:
            tolerance = _tolerance(metrics, name, before, tokens)
        yield Compared(name, before, value, tolerance)


def _tolerance(
    metrics: Mapping[str, float], name: str, before: float, tokens: Mapping[str, int]
) -> float:
    kind, _, text = name.partition("/")
    if kind == "ppl":
        divergence, gap = recorded(metrics, f"kl/{text}"), abs(metrics.get(f"gap/{text}", 0.0))
        noise = _UNKNOWN if divergence is None else 4 * math.sqrt(divergence / tokens[text])
        return before * math.expm1(max(_LEAST, noise, 2 * gap))
    if kind == "zeroshot_mean":
        return 2 * (recorded(metrics, "zeroshot_mean/stderr") or 0.0)
    one = 1 / (recorded(metrics, f"{kind}/{text.partition('/')[0]}/n") or 1)
    return max(one, 2 * (recorded(metrics, f"{name}_stderr") or 0.0))


def shown(rows: list[Compared]) -> str:
    """Return a Markdown table of metrics, the record's and now's, and verdicts."""
    cells = [[r.metric, number(r.record) or MISSING, number(r.now), r.verdict] for r in rows]
    return markdown([["metric", "record", "now", "verdict"], *cells])


def as_json(rows: list[Compared], others: list[str]) -> dict[str, Any]:
    """Return the same ready for JSON. others: in what the machine is not the record's."""
    metrics = {r.metric: {**asdict(r), "agrees": r.agrees} for r in rows}
    for row in metrics.values():
        del row["metric"]
    return {"agrees": agree(rows), "metrics": metrics, "differs": others}


def agree(rows: list[Compared]) -> bool | None:
    """Tell whether all that is compared agrees; None where nothing is."""
    verdicts = [row.agrees for row in rows if row.agrees is not None]
    return all(verdicts) if verdicts else None

"""What a record says of its networks, as the cells of tables: a title for each thing measured."""

from collections.abc import Mapping

from spinlab.report.formats import MISSING, percent
from spinlab.report.records import Record, accuracy_in, texts_of


def cells_of(record: Record, variant: str) -> dict[str, str]:
    """Return what was measured of a variant by title, the titles being those of all variants.

    KL per token in nats, flips and accuracies in percent, these with standard errors; the
    difference of their mean from the original's has the error of question by question. A task's
    accuracy is the one that enters the mean.
    """
    metrics = record["metrics"]
    chosen = record["config"].get("eval", {}).get("task_metrics", {})
    names = _names(metrics)
    return {title: _cell(metrics, name, chosen, variant) for title, name in names.items()}


def _names(metrics: Mapping[str, float]) -> dict[str, str]:
    """Map titles to metrics: perplexity, what is compared, zero-shot, sizes."""
    texts, has = texts_of(metrics), {name.split("/")[0] for name in metrics}
    tasks = sorted({k.split("/")[1] for k in metrics if k.startswith("zeroshot/")})
    names = {f"{text} ppl": f"ppl/{text}" for text in texts}
    for kind, title in {"kl": "KL", "flips": "flips"}.items():
        names |= {f"{text} {title}": f"{kind}/{text}" for text in texts if kind in has}
    names |= {task: f"zeroshot/{task}" for task in tasks}
    if "zeroshot_mean" in has:
        names |= {"mean": "zeroshot_mean/accuracy"}
    if "paired" in has:
        names |= {"difference": "zeroshot_mean/difference"}
    return {**names, "MiB": "bytes", "bits": "bits/weights"}


def _cell(metrics: Mapping[str, float], name: str, chosen: Mapping[str, str], variant: str) -> str:
    if name.startswith("zeroshot/"):
        kind = accuracy_in(metrics, name.removeprefix("zeroshot/"), chosen, variant)
        return _percent(metrics, f"{name}/{kind}/{variant}", f"{name}/{kind}_stderr/{variant}")
    if name.startswith("zeroshot_mean/"):
        error = "stderr" if name.endswith("accuracy") else "difference_stderr"
        return _percent(metrics, f"{name}/{variant}", f"zeroshot_mean/{error}/{variant}")
    value = metrics.get(f"{name}/{variant}")
    if value is None:
        return MISSING
    kind = name.split("/")[0]
    if kind == "flips":
        return f"{100 * value:.1f}"
    return f"{value / 2**20:.0f}" if kind == "bytes" else f"{value:.{3 if kind == 'kl' else 2}f}"


def _percent(metrics: Mapping[str, float], name: str, error: str) -> str:
    return percent(metrics[name], metrics.get(error, 0.0)) if name in metrics else MISSING

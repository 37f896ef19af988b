"""What a record says of its networks, as the cells of tables: a title for each thing measured."""

from collections.abc import Mapping

from spinlab.report.formats import MISSING, percent
from spinlab.report.records import Record, accuracy_in, texts_of

# kinds of metrics of a text, and how they are shown: title, scale, digits
OF_TEXTS = {
    "ppl": ("ppl", 1, 2),
    "kl": ("KL", 1, 3),
    "flips": ("flips", 100, 1),
    "diverges": ("diverges", 1, 1),
    "attention_score": ("score error", 1, 3),
    "attention_kl": ("attention KL", 1, 4),
    "attention_output": ("output error", 1, 4),
}
# of a network as a whole
_OF_NETWORKS = {
    "bytes": ("MiB", 2**-20, 0),
    "bits/weights": ("bits", 1, 2),
    "bits/kv": ("KV bits", 1, 2),
    "coded/kv": ("KV coded", 100, 1),
}


def cells_of(record: Record, variant: str) -> dict[str, str]:
    """Return what was measured of a variant by title, the titles being those of all variants.

    KL per token in nats; flips, accuracies and needles found in percent, the latter two with
    standard errors; the difference of the accuracies' mean from the original's has the error of
    question by question. A task's accuracy is the one that enters the mean. Which share of the
    cache is coded in the windows, in percent, is told where it is not all of it.
    """
    metrics = record["metrics"]
    chosen = record["config"].get("eval", {}).get("task_metrics", {})
    names = _names(metrics)
    return {title: _cell(metrics, name, chosen, variant) for title, name in names.items()}


def _names(metrics: Mapping[str, float]) -> dict[str, str]:
    """Map titles to metrics: those of texts, what is found in them, zero-shot, sizes."""
    texts, has = texts_of(metrics), {name.split("/")[0] for name in metrics}
    tasks = sorted({k.split("/")[1] for k in metrics if k.startswith("zeroshot/")})
    names = {}
    for kind, (title, *_) in OF_TEXTS.items():
        names |= {f"{text} {title}": f"{kind}/{text}" for text in texts if kind in has}
    lengths = sorted({int(k.split("/")[1]) for k in metrics if k.startswith("needle/")})
    names |= {f"needle {length}": f"needle/{length}" for length in lengths}
    names |= {task: f"zeroshot/{task}" for task in tasks}
    if "zeroshot_mean" in has:
        names |= {"mean": "zeroshot_mean/accuracy"}
    if "paired" in has:
        names |= {"difference": "zeroshot_mean/difference"}
    own = ["bytes", "bits/weights"]
    own += ["bits/kv"] if any(name.startswith("bits/kv/") for name in metrics) else []
    coded = [
        value
        for name, value in metrics.items()
        if name.startswith("coded/kv/") and metrics.get(name.replace("coded", "bits")) != 16
    ]
    own += ["coded/kv"] if round(min(coded, default=1), 3) < 1 else []
    return names | {_OF_NETWORKS[name][0]: name for name in own}


def _cell(metrics: Mapping[str, float], name: str, chosen: Mapping[str, str], variant: str) -> str:
    if name.startswith("zeroshot/"):
        kind = accuracy_in(metrics, name.removeprefix("zeroshot/"), chosen, variant)
        return _percent(metrics, f"{name}/{kind}/{variant}", f"{name}/{kind}_stderr/{variant}")
    if name.startswith("zeroshot_mean/"):
        error = "stderr" if name.endswith("accuracy") else "difference_stderr"
        return _percent(metrics, f"{name}/{variant}", f"zeroshot_mean/{error}/{variant}")
    if name.startswith("needle/"):
        length = name.removeprefix("needle/")
        return _percent(metrics, f"{name}/{variant}", f"needle_stderr/{length}/{variant}")
    value = metrics.get(f"{name}/{variant}")
    if value is None:
        return MISSING
    _, scale, digits = _OF_NETWORKS.get(name) or OF_TEXTS[name.split("/")[0]]
    return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # a KL of noise is no -0.000


def _percent(metrics: Mapping[str, float], name: str, error: str) -> str:
    """Format a share with its error; without one where it is not known, or says nothing (0)."""
    if name not in metrics:
        return MISSING
    known = metrics.get(error, 0.0)
    return percent(metrics[name], known) if known else f"{100 * metrics[name]:.1f}"

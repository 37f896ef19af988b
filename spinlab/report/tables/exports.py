"""Exports, and what the programs that read them compute (`python -m spinlab.bench exports`)."""

from collections.abc import Iterator
from pathlib import Path

from spinlab.errors import InputError
from spinlab.report.formats import MISSING, markdown
from spinlab.report.records import Record, read_benchmark

_HEAD = ["model and settings", "export", "MB", "of 16 bits", "reader"]
_MANY = 1e-2  # of logits: below it a difference is written as a power of ten


def exports_table(folder: Path, pattern: str = "*") -> str:
    """Return a table of the records in a folder, a row for each export and reader.

    pattern: of the names of the files. Of each text it has the perplexity of the network that an
    export stands for, as its run measured it, and that of what the reader makes of it.
    """
    files = sorted(folder.glob(f"{pattern}.json"))
    records = [read_benchmark("exports", str(file)) for file in files]
    if not records:
        raise InputError(f"{folder} holds no record of exports named {pattern}.json")
    texts = sorted({t for r in records for t in _texts(r["metrics"])}, reverse=True)
    head = [*_HEAD, *(cell for t in texts for cell in (f"{t} ppl", "read")), "logits differ by"]
    return markdown([head, *(row for record in records for row in _rows(record, texts))])


def _texts(metrics: dict[str, float]) -> Iterator[str]:
    return (name.split("/")[1] for name in metrics if name.startswith("ppl/"))


def _rows(record: Record, texts: list[str]) -> Iterator[list[str]]:
    metrics: dict[str, float] = record["metrics"]
    words = (word for word in record["overrides"] if not word.startswith("eval."))
    settings = " ".join(f"`{word}`" for word in words)
    for name in (name for name in metrics if name.startswith("logits_error/")):
        export, reader = name.split("/")[1:]
        cells = (f"ppl/{text}/{export}/{of}" for text in texts for of in ("network", reader))
        yield [
            settings,
            export,
            f"{metrics[f'bytes/{export}'] / 1e6:.1f}",
            f"{metrics[f'ratio/bytes/{export}']:.3f}",
            reader,
            *(f"{metrics[cell]:.2f}" if cell in metrics else MISSING for cell in cells),
            _difference(metrics[name], metrics[f"same_bits/{export}/{reader}"]),
        ]


def _difference(error: float, same_bits: float) -> str:
    if same_bits:
        return "no bit"
    return f"{error:.1%} of their spread" if error >= _MANY else f"{error:.0e} of their spread"

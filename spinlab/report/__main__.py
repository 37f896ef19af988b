"""Rebuild every table and summary under experiments/ from the records: `make tables`."""

import argparse
import json
from pathlib import Path

from spinlab.report.ablations import ablation_table, read_ablation
from spinlab.report.figures import draw_shares
from spinlab.report.gap import summarize_best
from spinlab.report.methods import methods_table, read_records

_EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"


def rebuilt(text: str, table: str, name: str = "table") -> str:
    """Return a page with a named table between its marks replaced; the words around it stay."""
    mark = f"<!-- {name} -->\n"
    start = text.index(mark) + len(mark)
    end = text.index("<!-- end -->", start)
    return f"{text[:start]}{table}\n{text[end:]}"


def tables(experiments: Path) -> dict[Path, dict[str, str]]:
    """Return all tables by page and name."""
    ablations = experiments / "ablations"
    return {
        experiments / "methods_smollm2.md": {
            "table": methods_table(read_records(experiments / "methods_smollm2"))
        },
        experiments / "best_smollm2.md": {
            kind: ablation_table(kind, read_ablation(ablations, kind))
            for kind in ("optimizer", "objective")
        },
    }


def main(words: list[str] | None = None) -> None:
    """Write every table into its page, and the summary of the best method."""
    argparse.ArgumentParser(prog="python -m spinlab.report", description=__doc__).parse_args(words)
    for page, found in tables(_EXPERIMENTS).items():
        text = page.read_text(encoding="utf-8")
        for name, table in found.items():
            text = rebuilt(text, table, name)
            print(f"{table}\n")
        page.write_text(text, encoding="utf-8")
        print(page)
    summarize_best(_EXPERIMENTS)
    _draw_profile(_EXPERIMENTS / "bench" / "learn_llama2_7b_h100.json")


def _draw_profile(path: Path) -> None:
    """Draw where a learning step's GPU time goes, beside its record."""
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    shares = {k.removeprefix("share/learn/"): v for k, v in metrics.items() if k[:6] == "share/"}
    step = metrics["speed/learn/seconds/step"]
    title = f"{path.stem}: {step:.2f} s a step, share of GPU time"
    draw_shares(shares, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Rebuild every table and summary of the pages from the records: `make tables`."""

import argparse
import json
from pathlib import Path

from spinlab.files import write_json
from spinlab.report.figures import draw_shares
from spinlab.report.pages import pages, rebuilt
from spinlab.report.tables.gap import summary

_ROOT = Path(__file__).parent.parent.parent


def main(words: list[str] | None = None) -> None:
    """Write every table into its page, the summary of the best method, and its figure."""
    argparse.ArgumentParser(prog="python -m spinlab.report", description=__doc__).parse_args(words)
    for page in pages(_ROOT):
        page.write_text(rebuilt(page.read_text(encoding="utf-8"), _ROOT), encoding="utf-8")
        print(page.relative_to(_ROOT))
    experiments = _ROOT / "experiments"
    best = summary(experiments / "methods_smollm2", "quarot", "learned_inputs")
    write_json(experiments / "best_smollm2.json", best)
    _draw_profile(experiments / "bench" / "learn_llama2_7b_h100.json")


def _draw_profile(path: Path) -> None:
    """Draw where a learning step's GPU time goes, beside its record."""
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    shares = {k.removeprefix("share/learn/"): v for k, v in metrics.items() if k[:6] == "share/"}
    step = metrics["speed/learn/seconds/step"]
    title = f"{path.stem}: {step:.2f} s a step, share of GPU time"
    draw_shares(shares, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

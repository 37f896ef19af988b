"""Weights are rounded anew where what they depend on changes, and only there."""

from dataclasses import replace

from spinlab.compose import composed
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.weights import METHODS

SMALL = ["learn=none", "model=random", "rotation=identity", "eval.tasks=[]"]


def test_formats_of_inputs_and_cache_matter_to_methods_that_see_them(tmp_path, monkeypatch):
    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, replace(method, work=lambda _: {}))
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    fixed = [f"data.calibration={text}", f"data.evaluation=[{text}]", f"paths.cache={tmp_path}"]

    def key(*overrides: str) -> str:
        return Pipeline(composed("+experiment=toy", *SMALL, *fixed, *overrides)).weights("fake").key

    seen = {}
    for name in METHODS:
        plain = key(f"weights={name}")
        changes = ("quant.activations.clip_ratio=0.9", "kv.queries.bits=4")
        seen[name] = [key(f"weights={name}", change) != plain for change in changes]
    both, none, inputs = [True, True], [False, False], [True, False]
    assert seen == {"rtn": none, "gptq": none, "gptaq": both, "qronos": both, "lwc": inputs}

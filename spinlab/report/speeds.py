"""Measured speeds of whole networks, found for a record by what its own network runs online."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spinlab.errors import InputError, did_you_mean
from spinlab.report.online import Settings, defaults, online_form, online_settings
from spinlab.report.records import Record, read_benchmark
from spinlab.report.settings import settings_of


@dataclass(frozen=True)
class Case:
    """Say what is compared with the stock model in bfloat16: a metric, and which is better."""

    metric: str
    is_time: bool  # how many times as fast; else as a part of the stock model's bytes


CASES: Mapping[str, Case] = {
    "decode, batch 1": Case("speedup/e2e/decode/b1", True),
    "decode, batch 16": Case("speedup/e2e/decode/b16", True),
    "prefill": Case("speedup/e2e/prefill/b1", True),
    "memory, batch 16": Case("ratio/e2e/memory/b16", False),
}
_PHASES = ("decode", "prefill")
_SAME = ("model", "operations", "gpu")  # of all records
_SAME_IN_PHASE = ("prompt", "tokens")


@dataclass(frozen=True)
class Speeds:
    """Hold what was timed, each with its phase and the form of its network."""

    timed: Sequence[tuple[str, Mapping[str, Any], Record]]

    def of(self, record: Record) -> dict[str, float]:
        """Return what was measured, by case, of networks that run online what a record's does."""
        form = online_form(settings_of(record), record["model"]["heads"])
        metrics = {n: v for _, f, r in self.timed if f == form for n, v in r["metrics"].items()}
        return {t: metrics[case.metric] for t, case in CASES.items() if case.metric in metrics}

    @property
    def note(self) -> str:
        """Say of which network the speeds are, on what, and how they were taken."""
        settings = {phase: record["config"] for phase, _, record in self.timed}
        told = {
            "decode": "decode is {tokens} steps behind prompts of {prompt} tokens",
            "prefill": "prefill one prompt of {prompt} tokens",
        }
        parts = [told[phase].format(**settings[phase]) for phase in _PHASES if phase in settings]
        first = self.timed[0][2]
        return (
            f"Speeds and memory are those of the shape of {first['config']['model']} against "
            f"bfloat16 on one {first['environment']['gpu']}: {'; '.join(parts)}."
        )


def read_speeds(files: Sequence[str]) -> Speeds:
    """Read records of `python -m spinlab.bench decode|prefill`, with --method or without.

    Raises InputError for none, for other records, for such as do not belong together, and for two
    of one phase that run the same online.
    """
    if not files:
        raise InputError("speeds= names no record: give those of python -m spinlab.bench decode")
    timed: list[tuple[str, Mapping[str, Any], Record]] = []
    for file in files:
        record = read_benchmark("speeds", file)
        phase, form = _phase(file, record), _form(record["config"])
        for other_phase, other_form, other in timed:
            _check_together(file, record, other, _SAME)
            if phase == other_phase:
                _check_together(file, record, other, _SAME_IN_PHASE)
                if form == other_form:
                    raise InputError(f"speeds={file} is a second {phase} of what runs {form}")
        timed.append((phase, form, record))
    return Speeds(timed)


def _phase(file: str, record: Record) -> str:
    """Return what was timed. Raises InputError for what is no whole network."""
    of_bench, _, rest = record["experiment"].partition("/")
    phase, config = rest.partition("/")[0], record.get("config") or {}
    whole = "model" in config and config.get("layers") is None
    if of_bench != "bench" or phase not in _PHASES or not whole:
        raise InputError(
            f"speeds={file} does not time a whole network: name a record of python -m "
            "spinlab.bench decode or prefill, with all layers"
        )
    return phase


def _check_together(file: str, record: Record, other: Record, names: Sequence[str]) -> None:
    for name in names:
        found, first = (
            {**r["config"], "gpu": r["environment"].get("gpu")}.get(name) for r in (record, other)
        )
        if found != first:
            raise InputError(
                f"speeds={file} has {name}={found}, and another has {first}: speeds must be taken "
                "in one way"
            )


def _form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the form of what a benchmark timed: R3 and R4 alone, or a method's rotations."""
    from spinlab.compose import composed, options_of  # Hydra loads here, and not to draw bars

    method, model = config.get("method"), config["model"]
    for group, name in {"method": method, "model": model}.items():
        if name is not None and name not in (known := options_of(group)):
            raise InputError(f"no {group} is called {name!r}: {did_you_mean(name, known)}")
    heads = composed(f"model={model}").model.architecture.get("num_attention_heads")
    if heads is None:
        raise InputError(f"conf/model/{model}.yaml has no num_attention_heads: speeds need it")
    return online_form(defaults() if method is None else _timed(config), heads)


def _timed(config: Mapping[str, Any]) -> Settings:
    """Return a method's settings with the number formats that benchmarks have, the default ones.

    Records without settings are of methods as they still are.
    """
    from spinlab.compose import composed

    known = config.get("settings") or online_settings(composed(f"+method={config['method']}"))
    return {**defaults(), **known}

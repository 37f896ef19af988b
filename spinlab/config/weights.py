"""Settings of how weights are rounded: the clip search that methods share, and one part for each.

A method without settings of its own is a name alone. The code behind the names is in
`spinlab.weights.methods`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from spinlab.config.checks import at_least, count, positive
from spinlab.config.data import WindowsConfig
from spinlab.errors import InputError


@dataclass(frozen=True)
class ClipSearch:
    """Say which shrink ratios are tried: 1, 1-1/grid, … down to 1-max_shrink (exclusive).

    The error of a candidate is the sum of |rounding error|^norm over a channel or group. The
    published recipe is norm 2.4, grid 100, max_shrink 0.8, that is 80 candidates (GPTQ, SpinQuant).
    """

    search: bool = True  # false: the whole range, times the format's clip_ratio
    norm: float = 2.4
    grid: int = 100
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        positive("weights.clip.norm", self.norm)
        count("weights.clip.grid", self.grid)
        at_least("weights.clip.grid*max_shrink", self.grid * self.max_shrink, 1)
        if not 0 < self.max_shrink < 1:
            raise InputError(f"weights.clip.max_shrink={self.max_shrink} must lie in (0, 1)")

    def ratios(self) -> list[float]:
        return [1 - i / self.grid for i in range(int(self.max_shrink * self.grid))]


@dataclass(frozen=True)
class GPTQConfig(WindowsConfig):
    """Set GPTQ (Frantar et al. 2022): its windows, damping, and the order of columns."""

    place: ClassVar[str] = "weights.gptq"
    block_size: int = 128  # columns whose errors are spread over the later ones at once
    percdamp: float = 0.01
    act_order: bool = False
    static_groups: bool = False  # group ranges from the start, not as columns stand when reached

    def __post_init__(self) -> None:
        super().__post_init__()
        count(f"{self.place}.block_size", self.block_size)
        positive(f"{self.place}.percdamp", self.percdamp)


@dataclass(frozen=True)
class GPTAQConfig(GPTQConfig):
    """Set GPTAQ (Li et al. 2025): GPTQ's settings, and how far it goes.

    The paper makes up for all of the mismatch of inputs; its published code, and so presumably its
    figures, for a quarter (`alpha`). With all of it W4A4 networks come out worse than by GPTQ, with
    a quarter better (experiments/methods_smollm2.md).
    """

    place: ClassVar[str] = "weights.gptaq"
    strength: float = 0.25  # share of the mismatch that is made up for; 0: GPTQ, inputs rounded

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise InputError(f"{self.place}.strength={self.strength} must lie in [0, 1]")


@dataclass(frozen=True)
class QronosConfig(GPTAQConfig):
    """Set Qronos (Zhang et al. 2025), which has what GPTAQ has.

    Its paper takes a strength of 1 too; a quarter is best on the development split.
    """

    place: ClassVar[str] = "weights.qronos"


@dataclass(frozen=True)
class LWCConfig(WindowsConfig):
    """Set learnable weight clipping: RTN in ranges that are learned layer by layer."""

    place: ClassVar[str] = "weights.lwc"
    epochs: int = 20
    lr: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        count("weights.lwc.epochs", self.epochs)
        positive("weights.lwc.lr", self.lr)


# methods that round in ranges learned with the rotations; others find their own
KEEP_RANGES = ("rtn", "gptaq", "qronos")


def method_title(method: str) -> str:
    """Return how texts write the name of a method: abbreviations in capitals, others as names."""
    return method.upper() if method in ("rtn", "gptq", "gptaq", "lwc") else method.capitalize()


@dataclass(frozen=True)
class WeightsConfig:
    """Choose the method that rounds weights; of the parts below, its own is read."""

    method: str = "rtn"  # by its name in spinlab.weights.methods
    clip: ClipSearch = field(default_factory=ClipSearch)
    gptq: GPTQConfig = field(default_factory=GPTQConfig)
    gptaq: GPTAQConfig = field(default_factory=GPTAQConfig)
    qronos: QronosConfig = field(default_factory=QronosConfig)
    lwc: LWCConfig = field(default_factory=LWCConfig)

    @property
    def own(self) -> Any:
        """The settings of the chosen method; None where it has none."""
        return vars(self).get(self.method)

    @property
    def keeps_ranges(self) -> bool:
        """Tell whether the chosen method rounds in learned ranges where there are some."""
        return self.method in KEEP_RANGES

    @property
    def by_columns(self) -> GPTQConfig | None:
        """The settings of a method that rounds one column after another; None for others."""
        return self.own if isinstance(self.own, GPTQConfig) else None

    @property
    def windows(self) -> WindowsConfig | None:
        """The calibration windows that the chosen method looks at, if it does."""
        return self.own if isinstance(self.own, WindowsConfig) else None

"""Settings of the rotations: how they start."""

from dataclasses import dataclass, field
from typing import ClassVar

from spinlab.config.checks import at_least, choice, count, positive
from spinlab.config.data import WindowsConfig
from spinlab.errors import InputError

# kinds of transforms of inputs that run online, and the rotations that they leave no room for
_REPLACED = {
    "duquant": ("r1", "r2", "r4", "cross_head", "latents"),
    "blocks": ("cross_head",),
    "wush": ("cross_head",),
}
_SCALED = ("scales", "blocks")  # whose scales, to be learned, move into norms
SAME = ("identity", "hadamard", "exact_hadamard")  # online, kinds that are not drawn
SEARCHED = ("duquant",)  # kinds made from activations; drawn ones: spinlab.rotation.kinds


@dataclass(frozen=True)
class DuQuantConfig:
    """Set DuQuant's search (Lin et al. 2024, sec. 3): block-diagonal rotations around a zigzag."""

    block_size: int = 128  # a width that it does not divide gets its largest divisor below
    steps: int = 256  # greedy steps of each of the two rotations
    legacy_index: bool = False  # swap the channel that the public code swaps, not the outlier's

    def __post_init__(self) -> None:
        at_least("rotation.duquant.block_size", self.block_size, 2)
        count("rotation.duquant.steps", self.steps)


@dataclass(frozen=True)
class BlocksConfig:
    """Set what rotation.inputs=blocks starts from: rotations in blocks before inputs without R4."""

    size: int = 64  # a width that it does not divide gets its largest power of two below
    kind: str = "hadamard"  # in spinlab.rotation.kinds

    def __post_init__(self) -> None:
        _power("rotation.blocks.size", self.size)


@dataclass(frozen=True)
class WushConfig:
    """Set rotation.inputs=wush: in every block what best suits inputs and weights (WUSH)."""

    size: int = 32  # of blocks: a scale's group or a multiple of it; else as rotation.blocks.size
    percdamp: float = 0.01  # added to diagonals of second moments, as a part of their mean

    def __post_init__(self) -> None:
        _power("rotation.wush.size", self.size)
        positive("rotation.wush.percdamp", self.percdamp)


def _power(name: str, size: int) -> None:
    if size < 2 or size & (size - 1):
        raise InputError(f"{name}={size} must be a power of two from 2 on")


@dataclass(frozen=True)
class StatisticsConfig(WindowsConfig):
    """Set the calibration windows that smoothing, DuQuant and WUSH look at."""

    place: ClassVar[str] = "rotation.statistics"


def keeps_gains(gains: str, r1: str, latents: str, smooth: float | None, inputs: str) -> bool:
    """Tell whether norms keep their gains, for settings of `rotation`.

    `auto` folds them where R1 or latents turn what norms give, which needs it, and where scales
    move into norms: these are exact in 16 bits then. To smoothing it is the same. Elsewhere a
    channel that a gain holds down would be an outlier of what is quantized, or of the weights
    behind it.
    """
    scaled = smooth is not None or inputs in _SCALED
    needed = r1 != "none" or latents != "none" or scaled
    return gains == "kept" or (gains == "auto" and not needed)


@dataclass(frozen=True)
class RotationConfig:
    """Say how each rotation starts; `none` leaves it out, `identity` only matters if learned."""

    r1: str = "hadamard"
    r2: str = "hadamard"
    r3: str = "hadamard"
    r4: str = "hadamard"
    cross_head: str = "none"  # across heads, online (QuaRot); R2 acts inside them
    latents: str = "none"  # of queries, and of keys and values, where heads are made of them; fused
    online: bool = True  # false leaves out whatever runs online: R3, R4, cross_head
    r1_block: int = 0  # R1 as blocks of this order, each drawn for itself; learning fills it
    r3_per_layer: bool = False  # an R3 for each layer, drawn and learned for itself; or one for all
    r4_block: int = 0  # R4 as equal blocks of this power of two; 0: over the full width
    # a transform of its own for every input of linears. duquant, blocks, wush: online, the last two
    # but where R4 is; scales: of 1, to be learned, and folded as those of blocks into what produces
    # the input
    inputs: str = "none"
    # what such a map multiplies by online: exact, in products of several parts on GPUs, or rounded
    # to bfloat16, whose inverse weights then get; what is learned of them takes them as they are.
    # null: exact, or as a file says
    factors: str | None = None
    smooth: float | None = None  # alpha of SmoothQuant's scales, folded into norms and weights
    smooth_groups: list[str] = field(default_factory=lambda: ["qkv", "gate_up"])
    # of norms: folded into the linears that read them, or kept; see `keeps_gains` for auto. The
    # variant rtn, which is the original rounded, keeps them always
    gains: str = "auto"
    load: str | None = None  # a RotationSet (.safetensors) or SpinQuant's R.bin, instead of r1, r2
    duquant: DuQuantConfig = field(default_factory=DuQuantConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    wush: WushConfig = field(default_factory=WushConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def __post_init__(self) -> None:
        choice("rotation.cross_head", self.cross_head, ("none", "hadamard"))
        choice("rotation.inputs", self.inputs, ("none", "scales", *_REPLACED))
        if self.factors is not None:
            choice("rotation.factors", self.factors, ("exact", "bfloat16"))
        choice("rotation.gains", self.gains, ("auto", "folded", "kept"))
        turned = [name for name in ("r1", "latents") if getattr(self, name) != "none"]
        if self.gains == "kept" and turned:
            raise InputError(
                f"rotation.gains=kept leaves norms their gains, and rotation.{turned[0]}="
                f"{getattr(self, turned[0])} turns what they give, which needs them folded: set "
                f"rotation.{turned[0]}=none, or rotation.gains=auto"
            )
        at_least("rotation.r1_block", self.r1_block, 0)
        if self.r1_block and self.r1 in SEARCHED:
            raise InputError(
                f"rotation.r1={self.r1} has blocks of its own: set rotation.r1_block=0"
            )
        if self.r4_block and (self.r4_block < 2 or self.r4_block & (self.r4_block - 1)):
            raise InputError(f"rotation.r4_block={self.r4_block} must be a power of two, or 0")
        if self.r4_block and self.r4 not in ("hadamard", "exact_hadamard", "none"):
            raise InputError(
                f"rotation.r4_block cuts a Hadamard R4: rotation.r4={self.r4} has none"
            )
        if not self.online and self.turns_inputs:
            raise InputError(
                f"rotation.inputs={self.inputs} runs online: set none, or rotation.online=true"
            )
        if self.load and not self.load.endswith((".safetensors", ".bin")):
            raise InputError(f"rotation.load={self.load} must end in .safetensors or .bin")
        if self.load and self.gains != "auto":
            raise InputError(
                f"rotation.load={self.load} says itself where gains are: leave out "
                f"rotation.gains={self.gains}"
            )
        usual = {"inputs": "none", "smooth": None, "online": True}
        if self.load and (others := [n for n, value in usual.items() if vars(self)[n] != value]):
            found = ", ".join(f"rotation.{name}={vars(self)[name]}" for name in others)
            raise InputError(
                f"rotation.load={self.load} brings its rotations, and {found} would make others: "
                "leave out the method or the rotation preset that sets them, and name what else "
                "of it is to stay, as weights=gptq"
            )
        replaced = _REPLACED.get(self.inputs, ())
        if used := sorted(name for name in replaced if getattr(self, name) != "none"):
            raise InputError(
                f"rotation.inputs={self.inputs} takes the place of "
                f"{', '.join(name.upper() for name in used)}: set "
                f"{', '.join(f'rotation.{name}=none' for name in used)}"
            )
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise InputError(f"rotation.smooth={self.smooth} must lie in [0, 1]")
        if self.inputs == "wush":
            self._check_wush()

    def _check_wush(self) -> None:
        """Refuse what stands before a transform that is made from what it stands behind."""
        if searched := [name for name in ("r1", "r2") if getattr(self, name) in SEARCHED]:
            name = f"rotation.{searched[0]}"
            raise InputError(
                f"{name}={getattr(self, searched[0])} is made from activations, and so is "
                f"rotation.inputs=wush, from those that {searched[0].upper()} gives: set "
                f"{name}=hadamard or none"
            )
        if self.smooth is not None:
            raise InputError(
                f"rotation.smooth={self.smooth} scales channels, and rotation.inputs=wush would "
                "undo it for the best of all scales and rotations in blocks: set "
                "rotation.smooth=null"
            )

    @property
    def used(self) -> list[str]:
        """The rotations that are on."""
        names = ["r1", "r2", *(("r3", "r4", "cross_head") if self.online else ())]
        return [name for name in names if getattr(self, name) != "none"]

    @property
    def keeps_gains(self) -> bool:
        """Tell whether norms keep their gains; a file says that of the rotations that it brings."""
        return keeps_gains(self.gains, self.r1, self.latents, self.smooth, self.inputs)

    @property
    def rounds_factors(self) -> bool | None:
        """Tell whether what turns inputs is rounded; None where nothing says it."""
        return None if self.factors is None else self.factors == "bfloat16"

    @property
    def turns_inputs(self) -> bool:
        """Tell whether single inputs have maps of their own, which run online."""
        return self.inputs in _REPLACED

    @property
    def scales_inputs(self) -> bool:
        """Tell whether every input has a scale to be learned."""
        return self.inputs in _SCALED

    @property
    def needs_statistics(self) -> bool:
        """Tell whether anything here is made from activations."""
        return self.smooth is not None or self.searches or self.inputs == "wush"

    @property
    def searches(self) -> bool:
        """Tell whether DuQuant's search is used, which looks at whole activations."""
        return not {self.r1, self.r2, self.inputs}.isdisjoint(SEARCHED)

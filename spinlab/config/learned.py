"""What learned rotations of heads and of inputs ask of other settings."""

from spinlab.config.kv import KVConfig
from spinlab.config.learn import LearnConfig
from spinlab.config.rotation import RotationConfig
from spinlab.errors import InputError


def check_learned_heads(rotation: RotationConfig, learn: LearnConfig, kv: KVConfig) -> None:
    """Refuse to learn an R3 that is not there, or that no codec would notice."""
    if "r3" not in learn.rotations:
        return
    brought = rotation.load is not None and rotation.load.endswith(".safetensors")
    if not brought and "r3" not in rotation.used:
        raise InputError(
            "r3 in learn.rotations is the rotation of queries and keys, which is off: set "
            "rotation.r3=hadamard rotation.online=true, or leave r3 out"
        )
    if not kv.codes("keys", "queries"):
        raise InputError(
            "with keys and queries of 16 bits nothing depends on R3: leave r3 out of "
            "learn.rotations, or set kv.keys.bits"
        )


def check_maps(rotation: RotationConfig, learn: LearnConfig) -> None:
    """Refuse to learn WUSH's maps, or R1 and R2 in front of maps of inputs that stay."""
    learned = "inputs" in learn.rotations
    wush = rotation.inputs == "wush"
    if wush and learned:
        raise InputError(
            "rotation.inputs=wush makes maps that are no rotations, in closed form, and "
            "inputs in learn.rotations are learned as rotations: use learn=none, "
            "'learn.rotations=[]' learn.lr.scale=0 for ranges alone, or rotation.inputs=blocks"
        )
    before = [name for name in ("r1", "r2") if getattr(rotation, name) != "none"]
    if rotation.turns_inputs and before and not learned:
        alone = " ".join(f"rotation.{name}=none" for name in before)
        cure = "use learn=none" if wush else "add inputs to learn.rotations, use learn=none"
        raise InputError(
            f"rotation.inputs={rotation.inputs} turns what {' and '.join(before).upper()} "
            f"give, and is not learned along with them: {cure}, or set {alone}"
        )

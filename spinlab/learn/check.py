"""What a learning run cannot do, known before it starts."""

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.learn.learned import check_inputs
from spinlab.learn.objectives import check_objective
from spinlab.learn.optim import check_optimizer
from spinlab.learn.spaces import space_of
from spinlab.rotation.rotations import RotationSet


def check_learning(config: Config, brought: RotationSet | None) -> None:
    """Raise InputError for names that no table has, and for what the space cannot learn.

    brought: the rotations that a file brings, if any.
    """
    learn = config.learn
    check_optimizer(learn.optimizer)
    check_objective(learn.objective)
    if learn.steps:
        space_of(learn, config.quant).check(learn)
        load = config.rotation.load or ""
        if brought is not None and "r3" in learn.rotations and load.endswith(".safetensors"):
            _check_heads(brought, load)
        if brought is not None and "inputs" in learn.rotations:
            check_inputs(brought.inputs, learn.lr.scale)
        elif brought is not None and brought.inputs and _turns_stream(brought):
            raise InputError(
                f"rotation.load={config.rotation.load} brings transforms of inputs behind its R1 "
                "and R2, which cannot be learned without them: add inputs to learn.rotations, or "
                "use learn=none"
            )


def _turns_stream(rotations: RotationSet) -> bool:
    return rotations.r1 is not None or rotations.r2 is not None


def _check_heads(brought: RotationSet, load: str) -> None:
    if brought.r3 is None:
        raise InputError(
            f"r3 in learn.rotations is the rotation of queries and keys, and rotation.load={load} "
            "brings none: leave r3 out"
        )

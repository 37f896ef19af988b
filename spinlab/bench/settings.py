"""Settings by the words of a command of spinlab, for benchmarks that take some."""

from collections.abc import Sequence

from spinlab.config import Config
from spinlab.errors import InputError


def settings_of(words: Sequence[str]) -> Config:
    """Return the settings of a command; raise InputError for words that make none."""
    from hydra.errors import HydraException  # Hydra loads here: a GPU node may lack it
    from omegaconf.errors import OmegaConfBaseException

    from spinlab.arguments import prepared
    from spinlab.compose import composed
    from spinlab.sentences import sentence

    try:
        return composed(*prepared(list(words)))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(sentence(error)) from error

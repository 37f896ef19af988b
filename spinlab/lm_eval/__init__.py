"""Artefacts as a model of lm-eval, called `spinlab`.

lm-eval finds models in a registry that it fills itself and reads no entry points, so whoever starts
it has to register first: `python -m spinlab.lm_eval` is its command line with that done, and a
script calls `register` before `lm_eval.simple_evaluate(model="spinlab", ...)`.
"""

from importlib import import_module

NAME = "spinlab"


def register() -> None:
    """Make `--model spinlab` known to lm-eval in this process; the class is imported when used."""
    from lm_eval.api.registry import model_registry

    import_module("lm_eval.models")  # registers its own, which it does not where others came first
    if NAME not in model_registry:
        model_registry.register(NAME, target="spinlab.lm_eval.model:ArtefactLM")

"""Model families: each says how its modules are read. The only place that knows module names."""

from spinlab.errors import InputError
from spinlab.model.families.blocked import BLOCKED
from spinlab.model.families.cohere import COHERE
from spinlab.model.families.exaone4 import EXAONE4
from spinlab.model.families.gemma import GEMMA, GEMMA2, GEMMA3
from spinlab.model.families.glm import GLM, GLM4
from spinlab.model.families.gpt_oss import GPT_OSS
from spinlab.model.families.granite import GRANITE
from spinlab.model.families.latent import DEEPSEEK
from spinlab.model.families.llama import LLAMA
from spinlab.model.families.llama4 import LLAMA4
from spinlab.model.families.olmo2 import OLMO2
from spinlab.model.families.phi3 import PHI3
from spinlab.model.families.phimoe import PHIMOE
from spinlab.model.families.sparse import (
    GLM4_MOE,
    GRANITEMOE,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
)
from spinlab.model.families.stablelm import STABLELM
from spinlab.model.map import Family

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "seed_oss": LLAMA,
    "ministral": LLAMA,
    "phi3": PHI3,
    "glm": GLM,
    "glm4": GLM4,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "exaone4": EXAONE4,
    "stablelm": STABLELM,
    "cohere": COHERE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "mixtral": MIXTRAL,
    "granitemoe": GRANITEMOE,
    "glm4_moe": GLM4_MOE,
    "llama4_text": LLAMA4,
    "gpt_oss": GPT_OSS,
    "phimoe": PHIMOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}


def family_of(model_type: str | None) -> Family:
    """Return the family of a transformers model type; raise InputError for one that is none."""
    if model_type not in FAMILIES:
        reason = "is not known"
        if model_type in BLOCKED:
            reason = f"cannot be rotated, because {BLOCKED[model_type]}"
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"model family {model_type!r} {reason}: supported are {known}")
    return FAMILIES[model_type]

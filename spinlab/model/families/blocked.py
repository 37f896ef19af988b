"""Model families that rotations do not fit, and what stands in the way of each."""

_MEAN = "its LayerNorm subtracts the mean, which does not commute with a rotation of the stream"
_EXPERTS = (
    "it is a mixture of experts whose routing or expert modules are those of no family that is read"
)
_TOWER = (
    "its text model lies beside a vision tower, and transformers loads no model of text alone from "
    "its checkpoints (a text model saved by itself, as gemma3_text, is taken)"
)
_BESIDE = (
    "its checkpoints hold a vision model beside the text model, which is taken by itself: save it "
    "by Llama4ForCausalLM.from_pretrained(...).save_pretrained(...), as a llama4_text model"
)
_SCAN = "it mixes tokens by a recurrent scan over channels, which no map describes"

_GROUPS = {
    _MEAN: (
        *("bloom", "codegen", "cohere2", "falcon", "gpt2", "gpt_bigcode", "gpt_neo"),
        *("gpt_neox", "gptj", "mpt", "nemotron", "olmo", "opt", "persimmon", "phi"),
        "starcoder2",
    ),
    _EXPERTS: ("qwen3_next",),
    _TOWER: ("gemma3",),
    _BESIDE: ("llama4",),
    _SCAN: ("bamba", "falcon_mamba", "jamba", "mamba", "mamba2", "recurrent_gemma", "rwkv"),
}

BLOCKED = {family: reason for reason, families in _GROUPS.items() for family in families}

"""A tokenizer whose tokens are the 256 bytes, for models with random weights."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per byte: ids follow the byte-level alphabet's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    newline = "Ċ"  # how the byte-level alphabet writes a line feed; text holds it, models end on it
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=newline, pad_token=newline)

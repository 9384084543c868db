"""A corpus's tokenizer as transformers has it, for `save_pretrained` beside a model."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` with the control tokens of `stackpkg.data.tokenizer`; it gives ids and the mask of padding, for no
    model here has types of tokens."""
    known = {"eos_token": "<eos>", "pad_token": "<pad>", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)

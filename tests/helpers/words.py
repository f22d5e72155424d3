"""A tokenizer of the small models' vocabulary: w0, w1, ..., w49."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(end: str | None = None) -> PreTrainedTokenizerFast:
    """Token i is the word `w<i>`; w0 pads, `end` ends a text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token=end)

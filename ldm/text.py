"""CLIP's tokenizer from the vocabulary inside open-clip-torch: no network, no files of our own."""

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # CLIP uses the first of the file's merges: 256 bytes, twice, and 2 special tokens beside them


@lru_cache
def clip_tokenizer():
    """Returns: transformers' CLIPTokenizer over CLIP's 49408 tokens, 77 a prompt, padded with the end token."""
    # find_spec does not import open_clip, which takes seconds.
    folder = Path(find_spec("open_clip").submodule_search_locations[0])
    with gzip.open(folder / VOCABULARY, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : MERGES + 1]]
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=77)


def tokenize(tokenizer, prompts, pad=None):
    """Returns: (B, 77) token ids of a list of prompts, cut and padded to length, by `pad` or by the end token."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return tokens.input_ids if pad is None else tokens.input_ids.masked_fill(tokens.attention_mask == 0, pad)

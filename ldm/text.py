"""Prompts as CLIP's tokens, by open-clip-torch's tokenizer, which cleans a text as the original CLIP does."""

from functools import cache, lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

LENGTH = 77  # tokens of a prompt, including those that begin and end it


@cache
def clip_tokenizer():
    """Returns: open-clip's SimpleTokenizer over CLIP's 49408 tokens."""
    # Only this file is loaded: `import open_clip` takes seconds, for it imports every model.
    file = Path(find_spec("open_clip").submodule_search_locations[0]) / "tokenizer.py"
    spec = spec_from_file_location("open_clip_tokenizer", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@lru_cache(10_000)
def encode(prompt):
    """Returns: the token ids of a prompt, at most LENGTH. What is cut from a longer one is printed, once."""
    tokenizer = clip_tokenizer()
    tokens = tokenizer.encode(prompt)
    room = LENGTH - 2
    if len(tokens) > room:
        lost = tokenizer.decode(tokens[room:]).strip()
        print(f'prompt "{prompt[:40]}…": {len(tokens)} tokens, and the text encoder takes {room}; cut off is "{lost}"')
    return [tokenizer.sot_token_id, *tokens[:room], tokenizer.eot_token_id]


def tokenize(prompts, pad=None):
    """Returns: (B, 77) token ids of a list of prompts, cut, or padded with `pad`; None: with the end token."""
    rows = [encode(prompt) for prompt in prompts]
    pad = clip_tokenizer().eot_token_id if pad is None else pad
    return torch.tensor([row + [pad] * (LENGTH - len(row)) for row in rows])

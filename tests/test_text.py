"""The tokens of a prompt: those of open-clip's own tokenizer, and of transformers' for plain texts."""

import pytest
import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ldm.text import LENGTH, clip_tokenizer, encode, tokenize

END = 49407
PLAIN = [
    "",
    "a photo of an astronaut in an orange suit",
    "best quality, extremely detailed",
    "It's 2 o'clock: ROTATED by +3.5 degrees!?",
    "a  photo\n of   a cup ",
    "café über naïve 東京 🚀",
    "supercalifragilistic-hyphen_underscore/slash",
]
ODD = [
    "a cup &amp; a saucer &lt;3 &amp;amp; &#8217;s",
    "“a cup” — it’s ‘old’ …",
    "a\x00cup\x07with\x1bcontrol\u200bcharacters\ufeff",
    "ﬁne ＦＵＬＬ ｗｉｄｔｈ ①",
    "Ã©tÃ© mojibake",
    "👩‍🚀👍🏽 🇩🇪",
    "\u202eright to left\u202c e\u0301",
    "<end_of_text> <|endoftext|>",
    "\t \n",
    "a \udcff cup",
    " ".join(["word"] * 100),
    "!" * 300,
]


@pytest.mark.parametrize("prompt", PLAIN + ODD, ids=ascii)
def test_tokens_are_open_clips_then_padding(prompt):
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer(context_length=LENGTH)([prompt])
    assert torch.equal(tokenize([prompt], 0), theirs)
    length = len(encode(prompt))
    (ours,) = tokenize([prompt])
    assert torch.equal(ours[:length], theirs[0, :length]) and (ours[length:] == END).all() and len(ours) == LENGTH


@pytest.fixture(scope="module")
def transformers_tokenizer():
    """Stable Diffusion 1's own, from the same vocabulary."""
    ranks = clip_tokenizer().bpe_ranks
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in ranks]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, list(ranks), model_max_length=LENGTH)


def test_tokens_of_plain_texts_are_those_of_transformers(transformers_tokenizer):
    theirs = transformers_tokenizer(PLAIN, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokenize(PLAIN), theirs)


def test_what_a_long_prompt_loses_is_said_once(base, capsys):
    prompt = " ".join(["red"] * 75) + " and a blue cup"
    assert torch.equal(base.embed([prompt]), base.embed([prompt.replace("blue", "green")]))
    told = capsys.readouterr().out
    assert '79 tokens, and the text encoder takes 75; cut off is "and a blue cup"' in told
    assert told.count("\n") == 2 and "green cup" in told
    base.embed([prompt, " ".join(["red"] * 75)])
    assert not capsys.readouterr().out


def test_embeddings_of_a_prompt_do_not_depend_on_the_others(base):
    together, alone = base.embed(["a cup", "a cat"]), base.embed(["a cat"])
    assert together.shape == (2, LENGTH, 16)
    torch.testing.assert_close(together[1:], alone)
    assert not torch.equal(together[0], together[1])

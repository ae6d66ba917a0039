"""The tokenizer that we build from open-clip's vocabulary: the same tokens as open-clip's own."""

import pytest
import torch

from ldm.text import clip_tokenizer, tokenize

END, LENGTH = 49407, 77
PROMPTS = [
    "",
    "a photo of an astronaut in an orange suit",
    "best quality, extremely detailed",
    "It's 2 o'clock: ROTATED by +3.5 degrees!?",
    "a  photo\n of   a cup ",
    "café über naïve 東京 🚀",
    "supercalifragilistic-hyphen_underscore/slash",
    " ".join(["word"] * 100),
]


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=LENGTH)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p[:20].strip() or "empty")
def test_tokens_are_open_clips_then_padding(open_clip_tokenizer, prompt):
    (ours,), (theirs,) = tokenize(clip_tokenizer(), [prompt]), open_clip_tokenizer([prompt])
    length = theirs.tolist().index(END) + 1
    assert ours.shape == (LENGTH,)
    assert ours[:length].tolist() == theirs[:length].tolist()
    assert (ours[length:] == END).all()


def test_embeddings_of_a_prompt_do_not_depend_on_the_others(base):
    together, alone = base.embed(["a cup", "a cat"]), base.embed(["a cat"])
    assert together.shape == (2, LENGTH, 16)
    torch.testing.assert_close(together[1:], alone)
    assert not torch.equal(together[0], together[1])

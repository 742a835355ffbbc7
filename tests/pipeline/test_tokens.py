from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import tokens
from pipeline.tokens import WordTokenizer, speed_up

ODD = [
    "",
    "   ",
    "a photo of a dog",
    "It's I'M DON'T o'clock '' \"q\" i.e.",
    "salt & pepper",
    "salt &amp; pepper &lt;br&gt;",
    "<start_of_text> in the middle <end_of_text>",
    "tab\tand\nnew line\r\n",
    "  spaced   out  ",
    "naïve café — “quotes” 猫が座っている 🙂",
    "schÃ¶n",
    "ﬁne Ａ１ \x1b[31mred\x1b[0m \x00\x7f",
    "1234567890 3.14 x2",
    "%$#@!~^_`{|}()[]<>/\\",
    "word " * 200,
    "x" * 500,
    "é " * 100,
]


def tokenizers() -> tuple[open_clip.SimpleTokenizer, WordTokenizer]:
    fast = speed_up(open_clip.get_tokenizer("ViT-B-32"))
    assert isinstance(fast, WordTokenizer)
    return open_clip.get_tokenizer("ViT-B-32"), fast


def test_odd_captions_have_open_clips_ids() -> None:
    slow, fast = tokenizers()
    for _ in range(2):
        found = fast(ODD)
        assert found.dtype == torch.int64 and torch.equal(found, slow(ODD))
    assert torch.equal(fast([]), slow([]))


@pytest.mark.real
@pytest.mark.parametrize("name", ["url_text", "multi30k_captions"])
def test_real_captions_have_open_clips_ids(real_data: Path, name: str) -> None:
    slow, fast = tokenizers()
    texts = pq.read_table(real_data / "text" / f"{name}.parquet")["text"].drop_null().to_pylist()[::17][:4000]
    assert torch.equal(fast(texts), slow(texts))


def test_short_contexts_are_cut_alike() -> None:
    slow = open_clip.SimpleTokenizer(context_length=5)
    fast = speed_up(open_clip.SimpleTokenizer(context_length=5))
    texts = ["a b", "a b c", "a b c d", "extraordinarily unabbreviated phraseology"]
    assert torch.equal(fast(texts), slow(texts))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_WORDS", 50)
    slow, fast = tokenizers()
    texts = [f"qz{number:x}w flibber{number}" for number in range(300)]
    for text in texts:
        assert torch.equal(fast([text]), slow([text]))
        assert len(fast.words) <= 60 and len(fast.tokenizer.cache) <= 60


def test_other_tokenizers_are_left_alone() -> None:
    for tokenizer in (
        open_clip.SimpleTokenizer(clean="canonicalize"),
        open_clip.SimpleTokenizer(reduction_mask="simple"),
        str.split,
    ):
        assert speed_up(tokenizer) is tokenizer

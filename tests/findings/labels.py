"""Clean pairs -> one folder per class, to fine-tune on: a caption's class is that of the one class word in it.

The words are found in the captions whose class the pool's truth knows; captions with none or several are left out.
"""

from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.pool import list_parts
from pipeline.tars import read_rows

SURE = 0.98
"""Share of a word's captions that must be of one class."""


def find_class_words(pool: str, truth: str) -> dict[str, str]:
    """Return word -> class, of words that stand in 20 captions of the kind `clean` or more and tell the class."""
    known = {row["uid"]: row["cls"] for row in pq.read_table(truth).to_pylist() if row["kind"] == "clean"}
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for part in list_parts(pool):
        for row in pq.read_table(str(part.table), columns=["uid", "text"]).to_pylist():
            if row["uid"] in known:
                for word in set(row["text"].lower().split()):
                    counts[word][known[row["uid"]]] += 1
    best = {word: (of_class.most_common(1)[0], of_class.total()) for word, of_class in counts.items()}
    return {word: name for word, ((name, most), num) in best.items() if num >= 20 and most >= SURE * num}


def write_class_folders(clean: str, words: dict[str, str], out: Path) -> int:
    """Write OUT/<class>/<key>.jpg for every clean row whose caption tells its class; return how many."""
    written = 0
    for part in list_parts(clean):
        for row in read_rows(str(part.tar)):
            members = {member.extension: member for member in row.members}
            found = {words[word] for word in members["txt"].content.decode().lower().split() if word in words}
            if len(found) == 1:
                folder = out / found.pop()
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{part.name}-{row.key}.jpg").write_bytes(members["jpg"].content)
                written += 1
    return written

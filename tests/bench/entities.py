"""caption_entities against DataComp's text rule on the same captions: `python -m tests.bench.entities --text PARQUET
--peer DATACOMP --wordnet DICT --python PYTHON`, a minute or two.

In turn, three times: DataComp's own does_contain_text_entity with its list of ids over --rows captions (default 2,000,
evenly over the `text` column), under PYTHON, which has nltk 3.8.1; and this filter, both columns, in the pipeline's
batches over the same captions with nothing remembered, then over all.  DICT is the folder corpora/wordnet of nltk's
data.  One process, one thread each; CPU time, without what opens the words.  Prints us a row, the ratios and the rows
on which the two differ; asserts nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filters.caption_entities import load
from filters.wordnet.build import read_ids
from pipeline.batches import PLAIN_ROWS
from pipeline.schemas import TEXT

PEER = """
import json, sys, time, types
from unittest.mock import MagicMock
import nltk  # first: what it imports asks torch what it is
for name in ("fasttext", "gcld3", "torch", "pandas", "fsspec", "tqdm"):  # imported at its head, unused by this rule
    sys.modules[name] = MagicMock()
work, datacomp, nltk_data = sys.argv[1:]
sys.path.insert(0, datacomp)
nltk.data.path[:] = [nltk_data]
from baselines.apply_filter import does_contain_text_entity, wordnet
captions, ids = json.load(open(work))
wordnet.synsets("dog")
start = time.process_time()
kept = [does_contain_text_entity(caption, ids) for caption in captions]
seconds = time.process_time() - start
print(json.dumps([seconds, kept]))
"""


def time_peer(arguments: argparse.Namespace, captions: list[str], ids: list[int]) -> tuple[float, list[bool]]:
    """Return CPU seconds and what DataComp keeps, whatever the language."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.json"
        work.write_text(json.dumps([captions, ids]))
        nltk_data = str(Path(arguments.wordnet).parent.parent)
        command = [arguments.python, "-c", PEER, str(work), arguments.peer, nltk_data]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds, kept = json.loads(done.stdout.decode().splitlines()[-1])
    return seconds, kept


def time_ours(captions: list[str]) -> tuple[float, list[bool]]:
    """Return CPU seconds of the whole filter, nothing remembered before, and the rows that its compat rule keeps."""
    score, table = load(), pa.table({TEXT: pa.array(captions, pa.string())})
    start = time.process_time()
    columns = [score(batch).columns[0] for batch in table.to_batches(PLAIN_ROWS)]
    return time.process_time() - start, [n > 0 for column in columns for n in column.to_pylist()]


def main() -> None:
    """Print the lines that the head promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--text", "--peer", "--wordnet", "--python"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rows", type=int, default=2_000)
    arguments = parser.parse_args()
    every = [t for t in pq.read_table(arguments.text, columns=[TEXT])[TEXT].to_pylist() if t is not None]
    captions = [every[i] for i in np.linspace(0, len(every) - 1, arguments.rows).astype(int)]
    ids, cold, warm = sorted(read_ids()), [], []
    for _ in range(3):
        peer, want = time_peer(arguments, captions, ids)
        ours, found = time_ours(captions)
        steady, _ = time_ours(every)
        peer, ours, steady = (s * 1e6 / n for s, n in ((peer, len(want)), (ours, len(found)), (steady, len(every))))
        print(f"us a row: DataComp {peer:.0f}, winnow {ours:.1f}, over all {len(every)} rows {steady:.1f}")
        cold.append(peer / ours)
        warm.append(peer / steady)
    differ = sum(w != f for w, f in zip(want, found, strict=True))
    print(f"{len(captions)} rows, {differ} differ")
    print(f"median {statistics.median(cold):.0f} x on the same rows, {statistics.median(warm):.0f} x against all rows")


if __name__ == "__main__":
    main()

"""The DFN paper's findings in small, on real images: which filter makes the best training set, and what tells it?

python -m tests.findings --pool pools/cifar-web --truth pools/cifar-web-truth.parquet --clean pools/cifar-hq \\
    --eval-data eval --out DIR

Trains filter networks, scores the pool with each, keeps subsets, and trains a small model on each for the same number
of samples seen, with several seeds; CIFAR-10's zero-shot accuracy is what counts.  Every piece is skipped when it is
done, so a stopped run goes on.  Prints the tables of docs/FINDINGS.md and writes them to DIR/findings.md.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.recipes import Network
from jobs.stage_fit import run_fit
from jobs.stage_networks import run_network
from jobs.stage_score import run_score
from jobs.stage_select import run_select
from jobs.stage_shards import run_shards
from pipeline.config import read_config
from pipeline.manifest import Manifest, read_manifest
from pipeline.schemas import TABLE
from pipeline.select import Step
from pipeline.semdedup import DedupConfig
from pipeline.shards import ShardConfig
from pipeline.spark_session import open_session
from pipeline.subset import read_subset
from pipeline.uid import format_uids
from tests.findings.labels import find_class_words, write_class_folders
from tests.findings.plan import (
    CLEAN,
    FINETUNE_RATE,
    FINETUNE_SAMPLES,
    LATER,
    MODEL,
    NETS,
    RIGHT_KINDS,
    Net,
    Subset,
    list_subsets,
)
from tests.findings.tables import format_tables
from tests.findings.work import in_processes, judge, read_accuracy
from training.captioned import TrainSet
from training.config import FineTune, SetConfig, TrainConfig
from training.index import list_tars
from training.run import train


class Places(NamedTuple):
    """Where everything lies."""

    pool: str
    truth: str
    clean: str
    eval_data: str
    out: Path


class Work(NamedTuple):
    """One model to train and judge."""

    name: str
    data: str
    samples: int
    seed: int

    @property
    def run(self) -> str:
        """Its folder's name."""
        return f"{self.name}-{self.samples}-{self.seed}"


def train_network(name: str, places: Places) -> None:
    """Train one filter network and judge it, unless that is done."""
    net, out = NETS[name], str(places.out / "networks" / name)
    config = TrainConfig(model=net.model, samples=net.samples)
    if net.finetune:
        sets = [SetConfig(classes=str(places.out / "classes"), templates=["a photo of a {c}.", "a {c}.", "my {c}"])]
        tuning = FineTune(sets=sets, train={"samples": FINETUNE_SAMPLES, "learning_rate": FINETUNE_RATE})
        run_network(Network(data="clean", train=config, finetune=tuning), data=places.clean, out=out, quiet=True)
    else:
        train(config, data=open_net_sets(net, places), out=out, quiet=True)
    judge(out, eval_data=places.eval_data, out=place_eval(places, f"network-{name}"))


def open_net_sets(net: Net, places: Places) -> list[TrainSet]:
    """Return a network's sets; a share of 1 is every row once an epoch."""
    urls = {name: tuple(list_tars(places.clean if name == CLEAN else places.pool)) for name in net.sets}
    return [TrainSet(name, urls[name], None if share == 1 else share) for name, share in net.sets.items()]


def place_eval(places: Places, name: str) -> Path:
    """Return the folder of what a model reached."""
    return places.out / "eval" / name


def train_induced(work: Work, places: Places) -> None:
    """Train a model on a subset's shards and judge it, unless that is done."""
    out = str(places.out / "runs" / work.run)
    config = TrainConfig(model=MODEL, samples=work.samples, seed=work.seed)
    made = read_manifest(work.data)
    train(config, data=work.data, out=out, parents={"shards": made.identity if made else ""}, quiet=True)
    judge(out, eval_data=places.eval_data, out=place_eval(places, work.run))


def curate(places: Places, subsets: dict[str, Subset]) -> None:
    """Score the pool with every network, and write each subset and its shards."""
    entries: list[dict[str, Any]] = [{"filter": f} for f in ("caption_length", "caption_language", "image_size")]
    entries += [
        {"filter": "clip_score", "name": name, "model": str(places.out / "networks" / name), "device": "cpu"}
        for name in NETS
    ]
    scores, folder = str(places.out / "scores"), str(places.out / "subsets")
    with open_session("local[2]", name="findings") as session:
        start = lambda: session  # noqa: E731
        run_score(start, places.pool, entries, scores)
        run_score(start, places.pool, entries + fit_later(start, places, entries), scores)
        for name, subset in subsets.items():
            steps = [read_config(Step, step, where=name) for step in subset.steps]
            run_select(start, scores, name, steps, folder, tables=[places.truth])
            shards = str(places.out / "shards" / name)
            run_shards(start, places.pool, f"{folder}/{name}.npy", ShardConfig(), shards, scores=scores, quiet=True)


def fit_later(start: Callable[[], Any], places: Places, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of finding e, with the clean images as targets and the near duplicates found."""
    clean, fit = str(places.out / "clean-scores"), str(places.out / "fits" / "near")
    run_score(start, places.clean, [entry for entry in entries if entry.get("name") == "dfn"], clean)
    config = DedupConfig(embedding="dfn_img", clusters=100)
    run_fit(start, config, fit, pool=places.pool, scores=str(places.out / "scores"))
    files = {"norm_sim": {"targets": clean, "column": "dfn_img"}, "semdedup": {"table": f"{fit}/{TABLE}"}}
    return [entry | files.get(entry["filter"], {}) for entry in LATER]


def measure(places: Places, subsets: dict[str, Subset], seeds: range) -> dict[str, Any]:
    """Return the accuracies of networks and induced models, and each subset's rows and purity."""
    own = {name: read_accuracy(place_eval(places, f"network-{name}")) for name in NETS}
    rows = {name: _require(places.out / "subsets", f"{name}.json").facts["rows"] for name in subsets}
    induced = {
        name: {
            samples: [read_accuracy(place_eval(places, Work(name, "", samples, seed).run)) for seed in seeds]
            for samples in subset.samples
        }
        for name, subset in subsets.items()
    }
    return {"own": own, "rows": rows, "right": measure_right(places, subsets), "induced": induced}


def measure_right(places: Places, subsets: Iterable[str]) -> dict[str, float]:
    """Return the share of each subset's uids whose caption is right."""
    truth = pq.read_table(places.truth, filters=pc.field("kind").isin(RIGHT_KINDS))
    right = set(truth["uid"].to_pylist())
    uids = {name: format_uids(read_subset(str(places.out / "subsets" / f"{name}.npy"))) for name in subsets}
    return {name: sum(uid in right for uid in kept.to_pylist()) / len(kept) for name, kept in uids.items()}


def _require(folder: Path, name: str) -> Manifest:
    made = read_manifest(str(folder), name=name)
    assert made
    return made


def main() -> None:
    """Parse, train, curate, train again, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pool", "truth", "clean", "eval-data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    places, seeds = Places(args.pool, args.truth, args.clean, args.eval_data, args.out.absolute()), range(args.seeds)
    if not (places.out / "classes").exists():
        words = find_class_words(places.pool, places.truth)
        print(write_class_folders(places.clean, words, places.out / "classes"), "clean images have a class")
    subsets = list_subsets()
    plain = [name for name, net in NETS.items() if not net.finetune]
    in_processes(partial(train_network, places=places), plain)
    in_processes(partial(train_network, places=places), [name for name in NETS if name not in plain])
    curate(places, subsets)
    work = [
        Work(name, str(places.out / "shards" / name), samples, seed)
        for seed in seeds
        for name, subset in subsets.items()
        for samples in subset.samples
    ]
    in_processes(partial(train_induced, places=places), work)
    text = format_tables(measure(places, subsets, seeds), subsets)
    (places.out / "findings.md").write_text(text)
    print(text)

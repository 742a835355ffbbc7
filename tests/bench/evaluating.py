"""`winnow eval` against clip_benchmark, same sets and model: `python -m tests.bench.evaluating PART --peer PYTHON`.

Parts, each in float32 on the CPU with as many threads and workers on both sides:

    sets    whole commands, model loading included, over the sets under --data and, with --classes, three more with
            ImageNet's templates and first class names: one command of each for all sets
    family  the same over those three alone, each with as many images to a prompt as ImageNet-1k, -V2 and -Sketch have
    text    class vectors of three sets with ImageNet's 80 templates and first --classes names
    cached  winnow alone: metrics and intervals from vectors that are there, at the tasks' real sizes

The peer is clip_benchmark 1.6.2 in an environment of its own (PYTHON; numpy < 2.3).  Prints seconds of processor time
(children included) and of the clock; ratios are of processor time, as the clock depends on who else is there.  `bare`
is the model's image tower alone on as many images.  Asserts nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch.nn.functional import normalize

from eval38 import classify, fairness, retrieve, statistics, wilds
from eval38.embed import Embedder, Encoder
from eval38.metadata import Tagged
from eval38.tasks import Metric, folder_of, own_task
from pipeline.clip_model import open_model
from pipeline.schemas import CLASS_EXTENSION, IMAGE_EXTENSIONS
from pipeline.storage import expand
from pipeline.tars import read_rows
from tests.made_evalsets import write_tars

ROOT = Path(__file__).resolve().parents[2]
FAMILY = {"family-1k": 50_000, "family-v2": 10_000, "family-sketch": 50_889}
"""Images of ImageNet-1k's validation set, -V2 and -Sketch, of 1,000 classes each."""
CALTECH = "wds_vtab-caltech101_test"
TEMPLATES = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
BATCH = 256
PEER_COMMAND = f"""
import sys
import open_clip
open_clip.add_model_config({str(ROOT / "pipeline" / "clip_models")!r})
from clip_benchmark.cli import main
if __name__ == "__main__":
    main()
"""
PEER_TEXT = f"""
import json, sys, time
import numpy as np, open_clip
open_clip.add_model_config({str(ROOT / "pipeline" / "clip_models")!r})
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
name, checkpoint, words, out = sys.argv[1:]
classes, templates = json.load(open(words))
model, _, _ = open_clip.create_model_and_transforms(name, pretrained=checkpoint)
model.eval()
tokenize = open_clip.get_tokenizer(name)
start, clock = time.process_time(), time.perf_counter()
for _ in range(3):
    class_DC = zero_shot_classifier(model, tokenize, classes, templates, "cpu", amp=False)
print(json.dumps([time.process_time() - start, time.perf_counter() - clock]))
np.save(out, class_DC.T.numpy())
"""


def run(command: Sequence[str], *, threads: int) -> tuple[float, float]:
    """Run a command to its end; return its seconds of processor time, children included, and of the clock."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout.decode(errors="replace")[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - clock


def save_weights(model: str, folder: Path) -> tuple[str, str]:
    """Return (architecture, checkpoint) of a model string; fresh weights are written, so that both sides have them."""
    architecture, _, checkpoint = model.partition("@")
    if not checkpoint:
        checkpoint = str(folder / "fresh.pt")
        torch.manual_seed(0)
        torch.save(open_model(architecture).model.state_dict(), checkpoint)
    return architecture, checkpoint


def copy_set(source: Path, folder: Path, images: int, *, classes: int | None = None) -> None:
    """Write the first images of a set of labelled tars, with its words; labels from `classes` on begin again at 0."""
    rows = []
    for tar in expand(str(source / "test" / "*.tar")):
        for row in islice(read_rows(tar), images - len(rows)):
            picture, label = row.find(IMAGE_EXTENSIONS) or b"", int(row.find([CLASS_EXTENSION]) or b"0")
            rows.append({"jpg": picture, CLASS_EXTENSION: b"%d" % (label % classes if classes else label)})
    write_tars(folder, rows, per_tar=max(1, len(rows) // 4))
    for words in source.glob("*.txt"):
        (folder / words.name).write_bytes(words.read_bytes())


def make_family(data: Path, pictures: Path, *, classes: int, images: Mapping[str, int]) -> None:
    """Write sets with ImageNet's templates and first class names, and pictures of another set; `images` of each."""
    for name, number in images.items():
        folder = data / folder_of(own_task(name))
        copy_set(pictures, folder, number, classes=classes)
        (folder / "classnames.txt").write_text("".join(f"{one}\n" for one in IMAGENET_CLASSNAMES[:classes]))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{one}\n" for one in TEMPLATES))


def compare_sets(args: argparse.Namespace, folder: Path) -> None:
    """Compare commands over the sets of a folder and, with classes, three of ImageNet's words."""
    data, images = folder / "data", {}
    for source in sorted(args.data.glob("wds_*_test")):
        name = f"own-{source.name.removeprefix('wds_').removesuffix('_test')}"
        images[name] = args.images
        copy_set(source, data / folder_of(own_task(name)), args.images)
    if args.classes:
        family = dict.fromkeys(FAMILY, args.images)
        make_family(data, args.data / CALTECH, classes=args.classes, images=family)
        images |= family
    compare_commands(args, folder, images)


def compare_family(args: argparse.Namespace, folder: Path) -> None:
    """Compare commands over three sets of ImageNet's words, as large for their classes as the real ones."""
    images = {name: number * args.classes // 1000 for name, number in FAMILY.items()}
    make_family(folder / "data", args.data / CALTECH, classes=args.classes, images=images)
    compare_commands(args, folder, images)


def compare_commands(args: argparse.Namespace, folder: Path, images: Mapping[str, int]) -> None:
    """Print the ratio of two whole commands over the same sets, and whether their accuracies are equal."""
    data, names = folder / "data", list(images)
    architecture, checkpoint = save_weights(args.model, folder)
    ours = [sys.executable, "-m", "jobs", "eval", "--model", f"{architecture}@{checkpoint}", "--data", str(data)]
    ours += ["--device", "cpu", f"eval.own=[{','.join(names)}]", "--out"]
    theirs = [args.peer, "-c", PEER_COMMAND, "eval", "--dataset", *(f"wds/{name}" for name in names), "--no_amp"]
    theirs += ["--dataset_root", f"{data}/wds_{{dataset_cleaned}}_test", "--model", architecture]
    theirs += ["--pretrained", checkpoint, "--num_workers", str(args.threads), "--batch_size", str(BATCH)]
    theirs += ["--output", f"{folder}/{{dataset}}.json", "--quiet"]
    for number in range(args.rounds):
        out = folder / f"ours{number}"
        found = run([*ours, str(out)], threads=args.threads), run(theirs, threads=args.threads)
        tell("sets", *found)
    bare = time_tower(f"{architecture}@{checkpoint}", sum(images.values()), args.threads)
    print(
        f"bare image tower {bare:.1f} s: winnow {found[0][0] / bare:.2f} of it, clip_benchmark {found[1][0] / bare:.2f}"
    )
    rows = {row["key"]: row["metrics"] for row in map(json.loads, (out / "eval_results.jsonl").open())}
    peer = {name: json.loads(next(folder.glob(f"*{name}.json")).read_text())["metrics"] for name in names}
    largest = max(abs(rows[own_task(name).key][of] - peer[name][of]) for name in names for of in ("acc1", "acc5"))
    print(f"images of each set: {dict(images)}; largest difference of acc1 and acc5: {largest:.1e}")


def tell(what: str, ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    """Print seconds and the ratio."""
    load = f"load {os.getloadavg()[0]:.0f}"
    for name, (cpu, clock) in (("winnow", ours), ("clip_benchmark", theirs)):
        print(f"{what:8s}{name:16s}{cpu:9.1f} s of CPU{clock:9.1f} s of the clock")
    print(f"{what:8s}{'ratio':16s}{theirs[0] / ours[0]:9.2f}{'':9s}{theirs[1] / ours[1]:9.2f}  ({load})", flush=True)


def time_tower(model: str, images: int, threads: int) -> float:
    """Return the processor time of the image tower alone on so many images, in batches."""
    torch.set_num_threads(threads)
    encoder = Encoder(open_model(model), device="cpu", precision="fp32")
    size = np.asarray(encoder.geometry(Image.new("RGB", (64, 48)))).shape
    start = time.process_time()
    for first in range(0, images, BATCH):
        encoder.encode_images(torch.zeros(min(BATCH, images - first), *size, dtype=torch.uint8))
    return time.process_time() - start


def compare_text(args: argparse.Namespace, folder: Path) -> None:
    """Print the ratio of the text sides of three sets with one list of classes, and how far the vectors differ."""
    architecture, checkpoint = save_weights(args.model, folder)
    classes = IMAGENET_CLASSNAMES[: args.classes or len(IMAGENET_CLASSNAMES)]
    (folder / "words.json").write_text(json.dumps([classes, TEMPLATES]))
    command = [args.peer, "-c", PEER_TEXT, architecture, checkpoint, str(folder / "words.json"), str(folder / "peer")]
    torch.set_num_threads(args.threads)
    opened = open_model(f"{architecture}@{checkpoint}")
    for _ in range(args.rounds):
        start, clock = time.process_time(), time.perf_counter()
        model = Embedder(Encoder(opened, device="cpu", precision="fp32"), quiet=True)
        for _ in range(3):
            class_CD = model.embed_classes(classes, TEMPLATES)
        ours = time.process_time() - start, time.perf_counter() - clock
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        cpu, clock = json.loads(done.stdout)
        tell("text", ours, (cpu, clock))
    peer_CD = np.load(folder / "peer.npy")
    prompts = 3 * len(classes) * len(TEMPLATES)
    difference = np.abs(class_CD.numpy() - peer_CD).max()
    print(f"{prompts:,} prompts; largest difference of a class vector's number: {difference:.1e}")


def show(name: str, images: int, metric: Metric | None, measure: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Print how long a task's metrics take, and its interval of 1,000 resamples."""
    start = time.process_time()
    per_image = measure()
    middle = time.process_time()
    if metric:
        columns = {of: column.numpy() for of, column in per_image.items()}
        statistics.bootstrap(metric, columns, key=name)
    print(f"{name:24s}{images:8,d} images{middle - start:8.2f} s{time.process_time() - middle:12.2f} s", flush=True)


def time_cached(args: argparse.Namespace) -> None:
    """Print the processor time of each kind of task at its real size, from vectors of 512 numbers."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        return normalize(torch.randn(rows, 512), dim=-1)

    def judge(images: int, classes: int) -> Callable[[], dict[str, torch.Tensor]]:
        image_ND, class_CD, label_N = draw(images), draw(classes), torch.randint(0, classes, (images,))
        return lambda: classify.judge(image_ND, class_CD, label_N).per_image

    def judge_regions() -> dict[str, torch.Tensor]:
        per_image = judge(22_108, 62)()
        truths = [Tagged(0, (n % 5, n % 2 + 14, 0)) for n in range(22_108)]
        wilds.measure_fmow(per_image["best"], per_image["label"], truths)
        return {**per_image, "group": torch.arange(22_108) % 5}

    def judge_faces() -> dict[str, torch.Tensor]:
        image_ND = draw(10_954)
        best = {
            name: classify.rank_classes(image_ND, draw(count)).best_N for name, count in fairness.NUM_CLASSES.items()
        }
        truth = {field: torch.arange(10_954) % (2 + n) for n, field in enumerate(fairness.FIELDS)}
        fairness.measure_faces(best, truth)
        return {}

    def retrieve_coco() -> dict[str, torch.Tensor]:
        owner_M = torch.arange(5_000).repeat_interleave(5)
        own = retrieve.find_own(draw(5_000), draw(25_000), owner_M)
        retrieve.measure_recalls(own)
        return retrieve.tabulate(own, owner_M)

    print(f"{'task':24s}{'':15s}{'metrics':>10s}{'interval':>14s}")
    show("ImageNet 1k", 50_000, "acc1", judge(50_000, 1_000))
    show("Camelyon17 (as acc_wg)", 85_054, "acc1", judge(85_054, 2))
    show("iWildCam", 42_791, "F1-macro_all", judge(42_791, 182))
    show("FMoW", 22_108, "acc_worst_region", judge_regions)
    show("FairFace", 10_954, None, judge_faces)
    show("MSCOCO", 5_000, "mean_recall@1", retrieve_coco)


def main() -> None:
    """Parse and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["sets", "family", "text", "cached"])
    parser.add_argument("--peer", help="python that has clip_benchmark")
    parser.add_argument("--data", type=Path, help="sets, family: folder with wds_..._test folders of labelled images")
    parser.add_argument("--model", default="winnow-vit-tiny", help="ARCHITECTURE, fresh weights, or ARCHITECTURE@FILE")
    parser.add_argument("--images", type=int, default=1000, help="sets: images of each set")
    parser.add_argument("--classes", type=int, default=0, help="classes of ImageNet; sets: 0 for none of them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.part == "cached":
            time_cached(args)
        else:
            {"sets": compare_sets, "family": compare_family, "text": compare_text}[args.part](args, Path(folder))


if __name__ == "__main__":
    main()

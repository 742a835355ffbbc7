"""write_report on a small run made by the real stages' own functions."""

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.contract import Failure, Filter, Scored
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.ledger import Unit
from pipeline.manifest import Counts, Manifest, add_counts, write_manifest
from pipeline.pool import list_parts
from pipeline.report import write_report
from pipeline.schemas import IMAGE, TEXT, UID
from pipeline.score import score_part
from pipeline.subset import write_subset
from pipeline.tars import TarRow, make_member, write_rows
from pipeline.uid import parse_uids

NUM_ROWS = 60
HOSTILE = '<script>alert("x")</script><img src=https://example.org/x.png>'
BROKEN_ROW, SCORED_BROKEN_ROW, HOSTILE_ROW = 7, 0, 59
THRESHOLD = 40.0


def uid_of(number: int) -> str:
    return f"{number:032x}"


def uids_of(*numbers: int) -> np.ndarray:
    return parse_uids(pa.array([uid_of(n) for n in numbers], pa.string()))


def score_rows(batch: pa.RecordBatch) -> Scored:
    """Each row's number as its brightness; the broken row fails, and a NaN stands in row 8."""
    numbers = [int(uid, 16) for uid in batch.column(UID).to_pylist()]
    values = [None if n == BROKEN_ROW else float("nan") if n == 8 else float(n) for n in numbers]
    languages = pa.array(["en" if n % 3 else "de" for n in numbers])
    failures = tuple(
        Failure(i, "unreadable_image", "cannot <b>identify</b> image") for i, n in enumerate(numbers) if n == BROKEN_ROW
    )
    return Scored((pa.array(values, pa.float32()), languages), failures)


def load_score() -> Callable[[pa.RecordBatch], Scored]:
    return score_rows


FILTER = Filter(
    name="bright",
    needs=(IMAGE, TEXT),
    makes=(("brightness", pa.float32()), ("caption_language", pa.string())),
    version=1,
    settings={"model": "by hand", "sha256": "ab" * 32},
    load=load_score,
)


def draw_image(number: int) -> bytes:
    if number in (BROKEN_ROW, SCORED_BROKEN_ROW):
        return b"not an image"
    out = io.BytesIO()
    Image.new("RGB", (24, 16), (4 * number, 80, 255 - 4 * number)).save(out, "PNG")
    return out.getvalue()


def write_pool(folder: Path) -> str:
    folder.mkdir()
    for part in range(2):
        numbers = range(part * NUM_ROWS // 2, (part + 1) * NUM_ROWS // 2)
        captions = [HOSTILE if n == HOSTILE_ROW else f"a square of brightness {n}" for n in numbers]
        keys = [f"{n:09d}" for n in numbers]
        with (folder / f"{part:08d}.tar").open("wb") as file:
            images = zip(keys, numbers, strict=True)
            write_rows(file, (TarRow(k, (make_member(f"{k}.png", draw_image(n)),)) for k, n in images))
        table = {UID: [uid_of(n) for n in numbers], TEXT: captions, "key": keys}
        pq.write_table(pa.table(table), folder / f"{part:08d}.parquet")
    return str(folder)


def write_scores(run: Path, pool: str) -> None:
    scores = str(run / "scores")
    results = [score_part(Unit(part), filters=[FILTER], out=scores) for part in list_parts(pool)]
    names = ("pool", "bright")
    facts = {
        "columns": {name: "bright" for name, _ in FILTER.makes},
        "types": {name: str(kind) for name, kind in FILTER.makes},
        "parts": ["00000000", "00000001"],
        "broken": {},
    }
    config = {"filters": {"bright": {"version": 1, **FILTER.settings}}}
    counts = {name: add_counts(Counts(**r["counts"][name]) for r in results) for name in names}
    write_manifest(
        scores, Manifest(stage="score", config=config, parents={"pool": "cd" * 32}, counts=counts, facts=facts)
    )


def write_subsets(run: Path) -> dict[str, list[dict[str, Any]]]:
    top = {"by": "brightness", "fraction": 0.2, "count": None, "of": "pool", "ties": "exact"}
    steps = {
        "none": [],
        "bright": [
            {"name": "english", "where": "caption_language = 'en'", "top": None},
            {"name": "brightest", "where": None, "top": top},
        ],
    }
    kept = {"none": range(NUM_ROWS), "bright": [n for n in range(NUM_ROWS) if n % 3 and n >= THRESHOLD]}
    english, num_bright = NUM_ROWS * 2 // 3, len(kept["bright"])
    dropped = {"brightest": english - num_bright - 2, "no_score": 2}
    counts = {
        "none": {},
        "bright": {
            "english": Counts(read=NUM_ROWS, kept=english, dropped={"english": NUM_ROWS - english}),
            "brightest": Counts(read=english, kept=num_bright, dropped=dropped),
        },
    }
    for name, numbers in kept.items():
        write_subset(str(run / "subsets" / f"{name}.npy"), uids_of(*numbers))
        facts = {
            "rows": len(numbers),
            "sha256": "ef" * 32,
            "thresholds": {"brightest": THRESHOLD} if steps[name] else {},
        }
        parents = {"scores": "12" * 32}
        made = Manifest(
            stage="select", config={"steps": steps[name]}, parents=parents, counts=counts[name], facts=facts
        )
        write_manifest(str(run / "subsets"), made, name=f"{name}.json")
    return steps


def write_training(run: Path, kind: str, name: str) -> None:
    folder = run / kind / name
    folder.mkdir(parents=True)
    lines = [{"step": s, "samples": 8 * s, "loss": 2 / s, "samples_per_s": 1234.0} for s in range(1, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "sam')
    facts = {
        "samples_seen": 240,
        "final_loss": 0.0712,
        "num_parameters": 7654321,
        "distinct_rows": 13,
        "mean_epochs": 18.46,
    }
    config = {"model": "tiny", "batch_size": 8}
    counts = {"rows": Counts(read=14, kept=13, failed={"unreadable_image": 1})}
    write_manifest(str(folder), Manifest(stage="train", config=config, parents={}, counts=counts, facts=facts))


def write_evaluation(run: Path, name: str, value: float, *, incomplete: bool = False) -> None:
    task = {
        "name": "CIFAR-10",
        "group": "vtab",
        "counted": True,
        "metric": "acc1",
        "value": value,
        "random_baseline": 0.1,
    }
    task |= {"images": 9999 if incomplete else 10000, "images_expected": 10000, "incomplete": incomplete}
    task |= {"status": "done", "message": None}
    mean = {"value": value, "num_tasks": 1, "num_incomplete": int(incomplete)}
    facts = {
        "tasks": {"cifar10": task},
        "average": {"label": "partial average over 1 of 38 tasks", **mean},
        "groups": {"vtab": {"name": "VTAB", "of": 12, **mean}},
        "missing": ["mnist", "sun397"],
        "not_asked": [],
    }
    (run / "eval" / name).mkdir(parents=True)
    write_manifest(str(run / "eval" / name), Manifest(stage="eval", config={"model": name}, parents={}, facts=facts))


def write_truth(path: Path) -> str:
    kinds = ["clean" if n % 2 else "spam" for n in range(NUM_ROWS)]
    pq.write_table(pa.table({UID: [uid_of(n) for n in range(NUM_ROWS)], "kind": kinds}), path)
    return str(path)


@pytest.fixture
def pool(tmp_path: Path) -> str:
    return write_pool(tmp_path / "pool")


@pytest.fixture
def run(tmp_path: Path, pool: str) -> Path:
    """A run folder with every piece."""
    run = tmp_path / "run"
    write_scores(run, pool)
    steps = write_subsets(run)
    write_training(run, "networks", "dfn")
    for name, value in (("none", 0.412), ("bright", 0.534)):
        write_training(run, "runs", name)
        write_evaluation(run, name, value, incomplete=name == "none")
    write_evaluation(run, "network-dfn", 0.6)
    (run / "recipe.json").write_text(json.dumps({"name": "by-hand", "source": "a test", "subsets": steps}))
    (run / "events.jsonl").write_text('{"stage": "score", "name": "", "outcome": "done", "seconds": 3725.0}\n')
    return run


class Page(HTMLParser):
    """Collects the text, the tags and what would be loaded; checks that tags close in order."""

    EMPTY = frozenset({"meta", "img", "br", "rect", "line", "circle", "polyline", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts))


def read_page(url: str) -> Page:
    return Page(Path(url).read_text(encoding="utf-8"))


def test_whole_run(run: Path, pool: str, tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.parquet")
    url = write_report(str(run), pool=pool, truth=truth, right_kinds=("clean",))
    assert url == str(run / "report.html")
    page = read_page(url)
    for section in ("Summary", "Funnel", "Scores", "Pictures", "Failures", "Truth", "Training", "Evaluation", "Prov"):
        assert re.search(rf"\d {section}", page.text), section
    assert "60 40 20 0 ✓" in page.text and "✗" not in page.text
    assert "40 14 26 (brightest 24, no_score 2) 0 ✓" in page.text
    for mean in ("Partial average over 1 of 38 tasks", r"VTAB \(mean of 1 of 12 tasks\)"):
        assert re.search(mean + r"[\s\d.]+†", page.text), mean
    assert "Incomplete for none: CIFAR-10 (9,999 of 10,000 images)." in page.text
    assert "Means and averages that such a task enters are not those of the whole sets." in page.text
    assert "2 tasks without data mnist, sun397" in page.text
    assert "7,654,321" in page.text and "1,234" in page.text
    assert "bright unreadable_image 1 cannot <b>identify</b> image" in page.text
    assert "1 h 2 min" in page.text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "image cannot be read" in page.text and "53.4 +12.2" in page.text
    assert Path(url).stat().st_size < 1_000_000


def test_a_part_of_a_large_pool_is_drawn_and_all_of_it_accounted(run: Path, pool: str) -> None:
    pages = {rows: Path(write_report(str(run), pool=pool, max_rows=rows)).read_text() for rows in (0, NUM_ROWS // 2)}
    whole, half = (dict(re.findall(r"<h2>.*?</span>(.*?)</h2>(.*?)</section>", page, re.S)) for page in pages.values())
    assert whole["Scores"] != half["Scores"] and "over 1, evenly spaced, of 2 parts" in half["Scores"]
    assert whole["Funnel"] == half["Funnel"] and whole["Truth and overlap"] == half["Truth and overlap"]
    assert "evenly spaced" not in pages[0]


def test_one_training_run_alone(run: Path) -> None:
    folder = run / "runs" / "bright"
    points = [{"step": s, "samples": 8 * s, "tasks": {"cifar10": s / 100, "gone": None}} for s in (10, 20, 29)]
    (folder / "zeroshot.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points) + '{"step": 9, "ta')
    page = read_page(write_report(str(folder)))
    assert "Training report: bright" in page.text and "Funnel" not in page.text
    assert "cifar10 10 15 20 25 0 100 200 samples seen main metric, %" in page.text and "gone" not in page.text
    assert page.text.count("samples seen") == 3 + 1  # loss, cifar10, samples a second; the caption
    assert "bright: of 14 rows these could not be used: unreadable_image 1." in page.text
    assert "batch_size 8" in page.text and "runs/*" not in page.text
    assert "cifar10 10 15 20 25" in read_page(write_report(str(run))).text


def write_curve(folder: Path, points: list[tuple[int, float | None]], *, num_tasks: int) -> None:
    """Write checkpoints' averages, and one that failed."""
    lines: list[dict[str, Any]] = [{"step": 9, "samples": 72, "error": "the model gives vectors that are not finite"}]
    for step, value in points:
        average = {"label": f"partial average over {num_tasks} of 38 tasks", "value": value, "num_tasks": num_tasks}
        groups = {"imagenet_shift": value} if num_tasks else {}
        tasks = {"own": 0.5, "gone": None}
        lines.append({"step": step, "samples": 8 * step, "average": average, "groups": groups, "tasks": tasks})
    folder.mkdir(parents=True)
    (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_checkpoints_evaluated_together(run: Path) -> None:
    write_curve(run / "curves" / "bright", [(10, 0.1), (20, 0.25)], num_tasks=2)
    write_curve(run / "curves" / "network-dfn", [(10, 0.2)], num_tasks=2)
    page = read_page(write_report(str(run)))
    ticks = "10.0 12.5 15.0 17.5 20.0 22.5 25.0 0 100 samples seen per cent"
    assert f"bright network dfn Partial average over 2 of 38 tasks {ticks} Shifts {ticks} Figure" in page.text
    assert sum(attributes.get("r") == "2.6" for _, attributes in page.tags) == 2 * 3


def test_checkpoints_of_one_training_run_alone(run: Path) -> None:
    folder = run / "runs" / "bright"
    write_curve(folder / "curves" / "all", [(10, None), (29, None)], num_tasks=0)
    text = read_page(write_report(str(folder))).text
    assert "Evaluation all own 50 0 50 100 150 200 samples seen per cent Figure" in text and "gone" not in text


def test_a_folder_of_another_stage_is_no_training_run(run: Path) -> None:
    with pytest.raises(StageError, match="nothing to report on"):
        write_report(str(run / "eval" / "none"))


def test_captions_are_text(run: Path, pool: str) -> None:
    url = write_report(str(run), pool=pool)
    page = read_page(url)
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.tags}


def test_page_loads_nothing(run: Path, pool: str) -> None:
    url = write_report(str(run), pool=pool)
    loads = [a[name] for _, a in read_page(url).tags for name in ("src", "href", "data", "srcset") if a.get(name)]
    assert loads and all(value and value.startswith(("data:image/", "#")) for value in loads)
    style = re.findall(r"<style>(.*?)</style>", Path(url).read_text(), re.DOTALL)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]


def test_same_bytes_twice(run: Path, pool: str, tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.parquet")
    first = Path(write_report(str(run), pool=pool, truth=truth, right_kinds=("clean",))).read_bytes()
    assert Path(write_report(str(run), pool=pool, truth=truth, right_kinds=("clean",))).read_bytes() == first


def test_chosen_pictures(run: Path, pool: str) -> None:
    page = read_page(write_report(str(run), pool=pool))
    shown = [int(a["title"] or "", 16) for tag, a in page.tags if tag == "li"]
    assert shown[:4] == [59, 58, 56, 55]
    assert shown[8:16] == [44, 43, 41, 40, 39, 38, 37, 36]
    assert shown[20:24] == [3, 2, 1, 0]


@pytest.mark.parametrize("piece", ["recipe.json", "scores", "subsets", "runs", "networks", "eval", "events.jsonl"])
def test_missing_piece(run: Path, pool: str, piece: str) -> None:
    (run / piece).rename(run.parent / "gone")
    assert read_page(write_report(str(run), pool=pool)).text


def test_only_scores(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (run / "scores").rename(alone / "scores")
    page = read_page(write_report(str(alone), title="Nothing but scores"))
    assert "Nothing but scores" in page.text
    assert "The run folder holds no subset" in page.text
    assert "brightness bright float 60 2 0 30.26 59" in page.text


def test_scores_of_a_part_gone(run: Path, pool: str) -> None:
    (run / "scores" / "bright" / "00000001.parquet").unlink()
    assert "Scores of part 00000001 could not be read" in read_page(write_report(str(run), pool=pool)).text


def test_pool_absent_or_without_images(run: Path, pool: str) -> None:
    assert "The pool was not given" in read_page(write_report(str(run))).text
    (Path(pool) / "00000000.tar").unlink()
    tar = Path(pool) / "00000001.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    page = read_page(write_report(str(run), pool=pool))
    assert "no image in the pool" in page.text
    with pytest.raises(PoolError):
        write_report(str(run), pool=str(run / "nowhere"))


@pytest.mark.parametrize("content", [{}, {"report.html": "old"}, {"recipe.json": "[1]"}, {"recipe.json": "{"}])
def test_nothing_to_report(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StageError):
        write_report(str(tmp_path))


def test_wrong_truth(run: Path, tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.parquet")
    with pytest.raises(ConfigError, match="did you mean 'clean'"):
        write_report(str(run), truth=truth, right_kinds=("claen",))
    pq.write_table(pa.table({UID: [uid_of(1)]}), tmp_path / "half.parquet")
    with pytest.raises(PoolError, match="kind"):
        write_report(str(run), truth=str(tmp_path / "half.parquet"))


def test_subset_of_other_scores(run: Path, pool: str) -> None:
    url = run / "subsets" / "bright.json"
    url.write_text(url.read_text().replace("brightness", "darkness").replace("caption_language", "caption_colour"))
    assert "brightness · bright" not in read_page(write_report(str(run), pool=pool)).text

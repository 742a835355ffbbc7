import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from pipeline import worker
from pipeline.contract import Filter, Scored, TwoStepScore
from pipeline.devices import Seat
from pipeline.errors import ModelError, PoolError, StageError
from pipeline.schemas import TEXT
from pipeline.worker import score_batches

WAIT_S = 20


def make_batches(num_batches: int, *, rows: int = 70, chars: int = 1) -> Iterator[pa.RecordBatch]:
    for number in range(num_batches):
        yield pa.RecordBatch.from_pydict({TEXT: [f"{number}-{row}" + "x" * chars for row in range(rows)]})


def measure_texts(batch: pa.RecordBatch) -> list[Any]:
    return [len(text) for text in batch.column(TEXT).to_pylist()]


def finish(batch: pa.RecordBatch, items: list[Any]) -> Scored:
    return Scored((pa.array(items, pa.int32()),))


def make_filter(name: str = "chars", *, load: Callable[[], Any] | None = None, **steps: Any) -> Filter:
    """A filter in two steps, of which some may be others."""
    step = TwoStepScore(**({"prepare": measure_texts, "finish": finish, "item_bytes": 0} | steps))
    made = {"makes": ((name, pa.int32()),), "needs": (TEXT,), "version": 1}
    return Filter(name=name, settings={}, load=load or (lambda: step), **made)


def run(batches: Iterator[pa.RecordBatch], *filters: Filter, part: str = "") -> list[tuple[pa.RecordBatch, Any]]:
    return list(score_batches(batches, filters, columns=[TEXT], part=part))


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("winnow-")]


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker, "_OPENED", {})
    yield
    assert our_threads() == []


@pytest.fixture
def sit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seat], None]:
    """Give this process a seat for the length of a test."""
    return lambda seat: monkeypatch.setattr("pipeline.devices._TAKEN", [seat])


def test_order_is_kept_and_every_filter_sees_whole_batches() -> None:
    whole = make_filter("whole", load=lambda: lambda batch: finish(batch, measure_texts(batch)))
    found = run(make_batches(5), make_filter(), whole)
    assert [batch.column(TEXT)[0].as_py() for batch, _ in found] == [f"{n}-0x" for n in range(5)]
    for batch, (pieces, at_once) in found:
        assert pieces.columns[0].to_pylist() == at_once.columns[0].to_pylist() == measure_texts(batch)


@pytest.mark.parametrize("num_batches", [0, 1])
def test_nothing_and_empty_batches(num_batches: int) -> None:
    found = run(make_batches(num_batches, rows=0), make_filter())
    assert [scored.columns[0].to_pylist() for _, (scored,) in found] == [[]] * num_batches


def test_a_filter_whose_column_is_absent_gives_nulls_and_is_not_opened() -> None:
    def refuse() -> Any:
        raise AssertionError

    lacking = replace(make_filter("lacking", load=refuse), needs=(TEXT, "b", "c"))
    ((_, (scored, fine)),) = run(make_batches(1, rows=2), lacking, make_filter())
    assert scored.columns[0].to_pylist() == [None, None] and fine.failures == ()
    assert [(f.position, f.reason, f.message) for f in scored.failures] == [
        (n, "missing_column", "this part has no column b, c") for n in range(2)
    ]


def test_the_next_batch_is_read_and_prepared_while_the_model_works() -> None:
    prepared: list[str] = []
    next_is_ready = threading.Event()

    def prepare(batch: pa.RecordBatch) -> list[Any]:
        assert threading.current_thread().name.startswith("winnow-prepare")
        prepared.append(batch.column(TEXT)[0].as_py())
        if "1-64x" in prepared:
            next_is_ready.set()
        return measure_texts(batch)

    def wait(batch: pa.RecordBatch, items: list[Any]) -> Scored:
        assert threading.current_thread() is threading.main_thread()
        assert next_is_ready.wait(WAIT_S), "nothing was prepared while the model worked"
        return finish(batch, items)

    run(make_batches(2), make_filter(prepare=prepare, finish=wait))
    assert sorted(prepared) == ["0-0x", "0-32x", "0-64x", "1-0x", "1-32x", "1-64x"]


@pytest.mark.parametrize(
    ("item_bytes", "bound", "most"),
    [(0, 1 << 30, worker.AHEAD_BATCHES), (1000, 100 * 2200, 2), (1000, 100 * 1100 - 1, 1), (1000, 1, 1)],
)
def test_what_waits_is_bounded(item_bytes: int, bound: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 rows of 1,000 bytes prepared and a few bytes of text: one batch costs between 100,000 and 110,000 bytes."""
    monkeypatch.setattr(worker, "AHEAD_BYTES", bound)
    read = 0

    def count() -> Iterator[pa.RecordBatch]:
        nonlocal read
        for batch in make_batches(30, rows=100):
            read += 1
            yield batch

    scored, ahead = 0, []
    for _ in score_batches(count(), [make_filter(item_bytes=item_bytes)], columns=[TEXT]):
        time.sleep(0.02)  # the reader goes as far as it may
        ahead.append(read - scored)
        scored += 1
    assert scored == 30
    assert max(ahead) <= most + 1, "one more is in the reader's hands"
    assert max(ahead) == most + 1 or most > 2


def test_what_reading_raises_comes_out_as_it_is() -> None:
    def break_off() -> Iterator[pa.RecordBatch]:
        yield from make_batches(1)
        raise PoolError("the tar is cut")

    found = score_batches(break_off(), [make_filter()], columns=[TEXT])
    next(found)
    with pytest.raises(PoolError, match="the tar is cut"):
        next(found)


def fail(*_: Any) -> Any:
    raise OSError("no such device")


@pytest.mark.parametrize("step", ["prepare", "finish", "load"])
def test_a_filter_that_raises_is_named_and_ends_the_work(step: str) -> None:
    """OSError, too, which from reading would mean a broken part."""
    with pytest.raises(StageError, match=r"filter 'chars' failed on part '00001': OSError: no such device") as caught:
        run(make_batches(3), make_filter(**{step: fail}), part="00001")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_model_that_explains_itself_is_not_explained_again() -> None:
    def refuse() -> Any:
        raise ModelError("not a ViT")

    with pytest.raises(ModelError, match=r"^not a ViT$"):
        run(make_batches(1), make_filter(load=refuse))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"prepare": lambda batch: [1]}, "prepared 3 items of 70 rows"),
        ({"finish": lambda batch, items: Scored(())}, "made 0 columns, promised 1"),
    ],
)
def test_promises_are_checked(steps: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        run(make_batches(1), make_filter(**steps))


def test_stopping_early_ends_the_threads_and_closes_the_source() -> None:
    closed = threading.Event()

    def read() -> Iterator[pa.RecordBatch]:
        try:
            yield from make_batches(1000)
        finally:
            closed.set()

    found = score_batches(read(), [make_filter()], columns=[TEXT])
    next(found)
    assert "winnow-read" in our_threads()
    found.close()
    assert closed.is_set() and our_threads() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_seat_says_how_many_threads_prepare(threads: int, sit: Callable[[Seat], None]) -> None:
    sit(Seat("cpu", threads))
    together = threading.Barrier(threads)

    def prepare(batch: pa.RecordBatch) -> list[Any]:
        together.wait(WAIT_S)  # needs that many at once
        assert len([name for name in our_threads() if name.startswith("winnow-prepare")]) <= threads
        return measure_texts(batch)

    assert len(run(make_batches(3, rows=32), make_filter(prepare=prepare))) == 3


def test_a_model_is_opened_once_per_device(sit: Callable[[Seat], None]) -> None:
    opened: list[str] = []

    def make(name: str) -> Filter:
        def load() -> Any:
            opened.append(name)
            return TwoStepScore(prepare=measure_texts, finish=finish, item_bytes=0)

        return make_filter(name, load=load)

    for _ in range(2):
        run(make_batches(1), make("a"), make("b"))
    assert opened == ["a", "b"]
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        sit(Seat(device, 1))
        run(make_batches(1), make("a"))
    assert opened == ["a", "b", "a", "a"]
    assert {device for _, device in worker._OPENED} == {None, "cuda:0", "cuda:1"}

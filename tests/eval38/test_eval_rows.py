import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from eval38 import source
from eval38.rows import ImageRow, LostImage, read_classes, read_images, read_set
from eval38.tasks import find_task, own_task
from pipeline.errors import EvalError
from pipeline.storage import read_bytes

MakeSet = Callable[..., Path]
TOY = own_task("toy")


def _rows(folder: Path) -> list[ImageRow[int] | LostImage]:
    return list(read_images(read_set(TOY, str(folder.parent))))


def _rewrite(folder: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    path = folder / "test" / "0.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_rows_in_order(make_set: MakeSet) -> None:
    folder = make_set()
    found = read_set(TOY, str(folder.parent))
    assert found.task.classes == 4 and found.templates == ("a {c} square", "{c}")
    rows = list(read_images(found))
    assert [row.name for row in rows[:2] + rows[-1:]] == ["0.tar:s0000000", "0.tar:s0000001", "1.tar:s0000015"]
    assert [row.truth for row in rows if isinstance(row, ImageRow)] == [0, 1, 2, 3] * 4


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a\nb\n", ("a", "b")),
        ("a\nb", ("a", "b")),
        ("a\r\nb \r\n", ("a", "b")),
        ("\ufeffa\r\nb\r\n", ("a", "b")),
        ("a\n\nb\n", ("a", "", "b")),
        ("a\nb\n\n", ("a", "b", "")),
        ("\na\n", ("", "a")),
        ("missile\nмяч\nmissile\n", ("missile", "мяч", "missile")),
    ],
)
def test_only_the_last_newline_of_the_class_names_is_dropped(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    path = tmp_path / "classnames.txt"
    path.write_bytes(text.encode())
    assert read_classes(str(path)) == names


def test_clevr_distance_keeps_its_blank_class(make_set: MakeSet) -> None:
    names = "very nearby\nnearby\nnear\n\ndistant\nvery distant\n"
    folder = make_set("vtab-clevr_closest_object_distance", classes=names)
    found = read_set(find_task("vtab/clevr_closest_object_distance"), str(folder.parent))
    assert found.classes[3] == "" and len(found.classes) == 6


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", b"", "names no class"),
        ("classnames.txt", None, "is missing"),
        ("classnames.txt", b"\xff\xfe", "not UTF-8"),
        ("zeroshot_classification_templates.txt", b"a photo\n", r"'a photo' has no \{c\}"),
        ("zeroshot_classification_templates.txt", b"{c}\na {C}\n", r"'a \{C\}' has no \{c\}"),
        ("zeroshot_classification_templates.txt", b"\n", "holds no template"),
        ("zeroshot_classification_templates.txt", None, "is missing"),
        ("test/nshards.txt", None, "is missing"),
        ("test/nshards.txt", b"two", "number of tars, not 'two'"),
        ("test/nshards.txt", b"0", "number of tars, not '0'"),
        ("test/nshards.txt", b"4", "promises 4 tars, but 2.tar is not there"),
        ("test/nshards.txt", b"999999999", "promises 999999999 tars, but 2.tar is not there"),
        ("test/nshards.txt", b"9" * 5000, "number of tars, not '9999999999'"),
        ("test/1.tar", None, "1.tar is not there"),
        ("dataset_type.txt", b"retrieval", "a 'retrieval' set"),
        ("classnames.txt", b"red\ngreen\n", r"label '2'.*0 to 1"),
    ],
)
def test_broken_set_is_named(make_set: MakeSet, file: str, content: bytes | None, message: str) -> None:
    folder = make_set()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(EvalError, match=message):
        _rows(folder)


def test_class_count_must_be_the_tables(make_set: MakeSet) -> None:
    folder = make_set("mnist")
    with pytest.raises(EvalError, match="has 4 classes, but MNIST has 10"):
        read_set(find_task("mnist"), str(folder.parent))


@pytest.mark.parametrize("label", [b"4", b"-1", b"cat", b"", "²".encode(), b"9" * 5000])
def test_label_that_is_no_class(make_set: MakeSet, label: bytes) -> None:
    folder = make_set()
    _rewrite(folder, lambda members: [("s0000000.cls", label)] + members[1:])
    with pytest.raises(EvalError, match=r"s0000000\.cls says label"):
        _rows(folder)


@pytest.mark.parametrize(("dropped", "reason"), [("s0000001.png", "missing_image"), ("s0000001.cls", "missing_label")])
def test_missing_member_is_counted(make_set: MakeSet, dropped: str, reason: str) -> None:
    folder = make_set()
    _rewrite(folder, lambda members: [m for m in members if m[0] != dropped])
    rows = _rows(folder)
    assert len(rows) == 16
    assert [(row.name, row.reason) for row in rows if isinstance(row, LostImage)] == [("0.tar:s0000001", reason)]


def test_cut_tar_is_counted_and_the_next_one_read(make_set: MakeSet) -> None:
    folder = make_set()
    path = folder / "test" / "0.tar"
    path.write_bytes(path.read_bytes()[:5000])
    rows = _rows(folder)
    lost = [row for row in rows if isinstance(row, LostImage)]
    assert [(row.name, row.reason) for row in lost] == [("0.tar", "truncated_tar")]
    assert str(folder) not in lost[0].message  # the results are the same wherever the set lies
    assert 8 < len(rows) < 16 and rows[-1].name == "1.tar:s0000015"


def test_data_hash_follows_the_files(make_set: MakeSet) -> None:
    folder = make_set()
    before = read_set(TOY, str(folder.parent)).data_hash
    assert read_set(TOY, str(folder.parent)).data_hash == before
    (folder / "classnames.txt").write_text("red\ngreen\nblue\nviolet\n")
    assert read_set(TOY, str(folder.parent)).data_hash != before


def test_what_was_proven_is_read_once_a_set(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = make_set(), list[str]()
    monkeypatch.setattr(source, "read_bytes", lambda url: asked.append(url) or read_bytes(url))
    _rows(folder)
    assert asked == [str(folder / "source.json")]


def test_a_key_of_any_bytes_can_be_named(make_set: MakeSet) -> None:
    folder = make_set()
    _rewrite(folder, lambda members: [("caf\udce9.cls", b"0")] + members[2:])
    first, *_ = _rows(folder)
    assert isinstance(first, LostImage) and first.name == r"0.tar:caf\udce9"

import errno
from pathlib import Path

import fsspec
import pytest

from pipeline.config import as_mapping, config, override, read_config, read_yaml
from pipeline.errors import ConfigError, PoolError, StageError
from pipeline.ranges import read_ranges
from pipeline.storage import (
    expand,
    fingerprint,
    join,
    list_folder,
    list_sizes,
    read_bytes,
    remove,
    sha256_of_file,
    sweep_temporaries,
    write_atomic,
    write_bytes,
    write_new,
)


@config
class Inner:
    """A part."""

    size: int = 3


@config
class Outer:
    """A whole."""

    name: str
    inner: Inner = Inner()
    many: list[Inner] | None = None


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return str(folder)


def test_expand_folder_glob_range_and_list(tmp_path: Path) -> None:
    folder = touch(tmp_path, "00.tar", "01.tar", "02.tar", "a.txt")
    assert [Path(u).name for u in expand(folder)] == ["00.tar", "01.tar", "02.tar", "a.txt"]
    assert len(expand(f"{folder}/*.tar")) == 3
    assert [Path(u).name for u in expand(f"{folder}/{{01..02}}.tar::{folder}/00.tar")] == ["01.tar", "02.tar", "00.tar"]


@pytest.mark.parametrize("pattern", ["{}/*.png", "{}/nothing", "{}/{{00..03}}.tar", "{}/00.tar::{}/x*"])
def test_nothing_matched_is_an_error(tmp_path: Path, pattern: str) -> None:
    folder = touch(tmp_path, "00.tar", "01.tar")
    with pytest.raises(PoolError):
        expand(pattern.format(folder, folder))


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_atomic_write_leaves_all_or_nothing(tmp_path: Path, scheme: str) -> None:
    folder = scheme + str(tmp_path)
    fsspec.filesystem("memory").makedirs(str(tmp_path), exist_ok=True)
    write_bytes(join(folder, "a"), b"1")
    with pytest.raises(KeyError), write_atomic(join(folder, "a")) as file:
        file.write(b"half")
        raise KeyError
    assert read_bytes(join(folder, "a")) == b"1"
    assert [u.rsplit("/", 1)[1] for u in list_folder(folder)] == ["a"]
    write_bytes(join(folder, "a"), b"22")
    assert read_bytes(join(folder, "a")) == b"22"
    assert fingerprint(join(folder, "a"))["size"] == 2
    remove(join(folder, "a"))
    assert list_folder(folder) == []


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_ranges_in_the_order_asked(tmp_path: Path, scheme: str) -> None:
    url = scheme + str(tmp_path / "a")
    write_bytes(url, bytes(range(100)))
    spans = [(90, 100), (3, 5), (3, 5), (7, 7)]
    assert list(read_ranges(url, spans)) == [bytes(range(a, b)) for a, b in spans]
    assert list(read_ranges(url, [])) == []
    pieces = read_ranges(url, [(0, 1), (99, 101)])
    assert next(pieces) == b"\0"
    with pytest.raises(PoolError, match=r"holds 1 of the bytes 99 to 101: it is shorter"):
        next(pieces)


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_write_new_never_replaces(tmp_path: Path, scheme: str) -> None:
    folder = scheme + str(tmp_path / "new")
    assert write_new(join(folder, "lock"), b"first")
    assert not write_new(join(folder, "lock"), b"second")
    assert read_bytes(join(folder, "lock")) == b"first"
    assert list_sizes(folder) == {"lock": 5}, "and leaves no temporary file"


def test_sweep_takes_only_temporaries(tmp_path: Path) -> None:
    sweep_temporaries(touch(tmp_path, ".tmp-00000000000000000000000000000000-a", "b"))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_sha256(tmp_path: Path) -> None:
    touch(tmp_path, "abc")
    assert sha256_of_file(str(tmp_path / "abc")).startswith("ba7816bf8f01cfea414140de5dae2223")


def test_read_config_and_back() -> None:
    values = {"name": "x", "inner": {"size": 5}, "many": [{"size": 1}]}
    assert as_mapping(read_config(Outer, values, where="outer")) == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "outer.name"),
        ({"name": "x", "iner": {}}, "did you mean 'inner'"),
        ({"name": "x", "inner": {"size": "big"}}, r"outer\.inner\.size.*'big'"),
        ({"name": "x", "inner": {"siz": 1}}, "did you mean 'size'"),
        ({"name": "x", "many": [{}, {"siz": 1}]}, "did you mean 'size'"),
        ([1], "expected a mapping"),
    ],
)
def test_bad_field_is_named(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(Outer, values, where="outer")  # type: ignore[arg-type]


def test_override_makes_a_copy() -> None:
    values = {"a": {"b": 1}, "c": [{"d": 2}]}
    assert override(values, ["a.b=7", "c.0.d=x", "n.e.w=[1, 2]"]) == {
        "a": {"b": 7},
        "c": [{"d": "x"}],
        "n": {"e": {"w": [1, 2]}},
    }
    assert values["a"] == {"b": 1}


@pytest.mark.parametrize("assignment", ["a", "a.b.c=1", "c.5=1", "c.x=1"])
def test_override_without_a_place(assignment: str) -> None:
    with pytest.raises(ConfigError):
        override({"a": {"b": 1}, "c": [1]}, [assignment])


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        read_yaml(str(tmp_path / "r.yaml"))


def test_a_full_disk_is_no_fault_of_what_was_read(tmp_path: Path) -> None:
    def fill() -> None:
        with write_atomic(str(tmp_path / "a")) as file:
            file.write(b"1")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StageError, match=r"cannot be written: No space left on device\. Make room"):
        fill()
    assert list(tmp_path.iterdir()) == []

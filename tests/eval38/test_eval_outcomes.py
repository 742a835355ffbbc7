import hashlib
from pathlib import Path

import numpy as np
import pytest

from eval38.outcomes import place_of, read_outcomes, write_outcomes
from eval38.tasks import find_task
from pipeline.errors import EvalError

TASK = find_task("vtab/svhn")
COLUMNS = {
    "label": np.array([0, 1, 300]),
    "top": np.array([[0, 1], [1, 2], [2, 300]]),
    "best": np.array([0, 1, 2]),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sha256 = write_outcomes(str(tmp_path), TASK, COLUMNS, value=2 / 3)
    file = Path(place_of(str(tmp_path), TASK))
    assert file == tmp_path / "outcomes/wds_vtab-svhn_test.npz"
    with np.load(file, allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.name for name in arrays} == {
            "best": "uint8",
            "label": "uint16",
            "top": "uint16",
        }
    found = read_outcomes(str(tmp_path), TASK, sha256=sha256)
    assert found is not None and all((found[name] == COLUMNS[name]).all() for name in COLUMNS)
    before = file.read_bytes()
    assert write_outcomes(str(tmp_path), TASK, dict(reversed(COLUMNS.items())), value=2 / 3) == sha256
    assert file.read_bytes() == before
    assert read_outcomes(str(tmp_path), TASK, sha256=None) is None
    assert read_outcomes(str(tmp_path), TASK, sha256=sha256, column="corrected") is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": COLUMNS["label"]}, "no known kind"),
        (COLUMNS | {"other": COLUMNS["label"]}, "no known kind"),
        (COLUMNS | {"label": np.array([0, 1])}, "shapes"),
        (COLUMNS | {"label": np.array([[0], [1], [2]])}, "shapes"),
        (COLUMNS | {"top": COLUMNS["label"]}, "shapes"),
        (COLUMNS | {"label": np.array([0.0, 1.0, 2.0])}, "should be integers"),
        (COLUMNS | {"label": np.array([0, -1, 2])}, "should be integers"),
        (COLUMNS | {"label": np.array([0, "1", None], dtype=object)}, "should be integers"),
        (COLUMNS | {"label": np.array([1, 1, 1])}, "outcomes say 0.333"),
    ],
)
def test_outcomes_that_are_none(tmp_path: Path, columns: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        write_outcomes(str(tmp_path), TASK, columns, value=2 / 3)
    assert not (tmp_path / "outcomes").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x93NUMPY", b"\x80\x04N."])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    sha256 = write_outcomes(str(tmp_path), TASK, COLUMNS, value=None)
    Path(place_of(str(tmp_path), TASK)).write_bytes(content)
    with pytest.raises(EvalError, match="not the file that the results name"):
        read_outcomes(str(tmp_path), TASK, sha256=sha256)
    with pytest.raises(EvalError, match=r"holds no outcomes|shapes|kind"):
        read_outcomes(str(tmp_path), TASK, sha256=hashlib.sha256(content).hexdigest())

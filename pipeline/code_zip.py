"""winnow's own packages as one zip, as Spark ships it to workers: the same code gives the same bytes."""

import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("pipeline", "filters", "training", "eval38", "jobs")
ROOT = Path(__file__).parent.parent
CODE_ZIP = "winnow.zip"
FIXED_DATE = (1980, 1, 1, 0, 0, 0)


def write_zip(path: str) -> int:
    """Write the packages' files, sorted, with fixed dates, and return how many."""
    files = [f for p in PACKAGES for f in (ROOT / p).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            info = zipfile.ZipInfo(str(file.relative_to(ROOT)), FIXED_DATE)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, file.read_bytes())
    return len(files)


@contextmanager
def served_code(context: Any) -> Iterator[None]:
    """Serve winnow's code to a cluster's executors (`context` is a SparkContext), so that they need none of their own.

    Nothing is served when spark-submit --py-files has done it, or when this code is itself such a zip.
    """
    if context.getConf().get("spark.submit.pyFiles", "") or not ROOT.is_dir():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="winnow-code-") as folder:
        path, before = str(Path(folder) / CODE_ZIP), list(sys.path)
        write_zip(path)
        context.addPyFile(path)
        sys.path[:] = before  # the driver has its code, and the copy that Spark put on its path goes with the session
        yield

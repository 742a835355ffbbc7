"""Where each row's bytes stand in its part's tar: OUT/spans/<part>.parquet, written by the pass that scores the images.

`winnow shards` copies rows by these spans and so reads no tar header.  A file names the version of the part it was made
from; the spans of another version are as good as none.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.pool import Part
from pipeline.schemas import END, PARQUET_SUFFIX, ROW, SPANS_FOLDER, START
from pipeline.storage import exists, join, open_file, write_atomic

SPANS_SCHEMA = pa.schema([(ROW, pa.int32()), (START, pa.int64()), (END, pa.int64())])
"""One line per row whose image is in the tar: its place in read_part(part).table, and TarRow.span."""
PART_VERSION = b"winnow_part"
BROKEN_TAR = b"winnow_broken_tar"


def write_spans(
    out: str,
    part: Part,
    rows: pa.Array,
    starts: pa.Array,
    ends: pa.Array,
    *,
    version: str | None = None,
    broken: str | None = None,
) -> None:
    """Write one part's spans: int32 places of rows that have an image, and the int64 bytes [start, end) of each.

    `version` is version_of the part before it was read (default: as it is now), so that a tar that was replaced
    meanwhile does not fit.
    Rows may come in any order and are stored sorted.  `broken` is why the tar ended early, if it did: a row without a
    span is then lost to the damage and not merely without an image.
    """
    metadata = {PART_VERSION: version or version_of(part)} | ({BROKEN_TAR: broken} if broken else {})
    table = pa.table([rows, starts, ends], schema=SPANS_SCHEMA).sort_by(ROW).replace_schema_metadata(metadata)
    with write_atomic(_spans_url(out, part)) as file:
        pq.write_table(table, file)


def read_spans(out: str, part: Part) -> pa.Table | None:
    """Return the part's spans (SPANS_SCHEMA, sorted by row), or None when absent, unreadable or of another version."""
    url = _spans_url(out, part)
    if not exists(url):
        return None
    try:
        with open_file(url) as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError):
        return None
    same = (table.schema.metadata or {}).get(PART_VERSION, b"").decode() == version_of(part)
    return table if same and table.schema.remove_metadata() == SPANS_SCHEMA else None


def why_broken(spans: pa.Table) -> str | None:
    """Return why the tar that the spans speak of ended early, None when it did not."""
    message = (spans.schema.metadata or {}).get(BROKEN_TAR)
    return message.decode() if message else None


def _spans_url(out: str, part: Part) -> str:
    return join(out, SPANS_FOLDER, part.name + PARQUET_SUFFIX)


def version_of(part: Part) -> str:
    """Return the versions of tar and parquet: the places of rows come from the one, their bytes from the other."""
    return json.dumps(part.fingerprints(), sort_keys=True)

"""Tables that users bring (parquet, csv, tsv, jsonl) -> Arrow tables of the columns asked for, a few rows at a time."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.errors import PoolError
from pipeline.schemas import PARQUET_SUFFIX
from pipeline.storage import expand, name_of, open_file

CSV_SUFFIX, TSV_SUFFIX, JSONL_SUFFIX = ".csv", ".tsv", ".jsonl"
TABLE_SUFFIXES = (PARQUET_SUFFIX, CSV_SUFFIX, TSV_SUFFIX, JSONL_SUFFIX)


def list_tables(source: str) -> list[str]:
    """Return the tables that a file, folder, glob, brace range or `a::b` list names, in order.

    Raises PoolError when there is none; hidden files and other kinds are passed over.
    """
    urls = [url for url in expand(source) if url.endswith(TABLE_SUFFIXES) and not name_of(url).startswith(".")]
    if not urls:
        raise PoolError(f"{source!r} has no table. Name files that end in {', '.join(TABLE_SUFFIXES)}.")
    return urls


def list_table_columns(url: str) -> list[str]:
    """Return the columns of one table.  Raises PoolError when it cannot be read."""
    try:
        with open_file(url) as file:
            if url.endswith(PARQUET_SUFFIX):
                return list(pq.ParquetFile(file).schema_arrow.names)
            if url.endswith(JSONL_SUFFIX):
                return list(pyarrow.json.read_json(file).column_names)
            return list(pyarrow.csv.open_csv(file, parse_options=_csv_options(url)).schema.names)
    except (pa.ArrowException, OSError) as error:
        raise PoolError(f"{url} cannot be read as a table: {error}") from None


def read_tables(url: str, columns: Sequence[str], *, nested: Sequence[str] = (), rows: int) -> Iterator[pa.Table]:
    """Yield the columns of one table as tables of `rows` rows, the last one shorter; an empty table yields nothing.

    In csv, tsv and jsonl every column but the `nested` ones is read as text, so `0012` stays what it is.
    Parquet is read in pieces, other kinds at once.  Raises PoolError when the table cannot be read.
    """
    waiting: list[pa.Table] = []
    try:
        with open_file(url) as file:
            for piece in _read_pieces(url, file, columns, nested, rows):
                waiting.append(piece)
                while sum(table.num_rows for table in waiting) >= rows:
                    joined = pa.concat_tables(waiting)
                    yield joined.slice(0, rows)
                    waiting = [joined.slice(rows)]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise PoolError(f"{url} cannot be read as a table with columns {list(columns)}: {error}") from None
    if sum(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting)


def _read_pieces(
    url: str, file: object, columns: Sequence[str], nested: Sequence[str], rows: int
) -> Iterator[pa.Table]:
    texts = {name: pa.string() for name in columns if name not in nested}
    if url.endswith(PARQUET_SUFFIX):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=rows, columns=list(columns)):
            yield pa.Table.from_batches([batch]).select(list(columns))
    elif url.endswith(JSONL_SUFFIX):
        options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(list(texts.items())))
        yield pyarrow.json.read_json(file, parse_options=options).select(list(columns))
    else:
        convert = pyarrow.csv.ConvertOptions(include_columns=list(columns), column_types=texts)
        yield pyarrow.csv.read_csv(file, parse_options=_csv_options(url), convert_options=convert)


def _csv_options(url: str) -> "pyarrow.csv.ParseOptions":
    delimiter = "\t" if url.endswith(TSV_SUFFIX) else ","
    return pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)

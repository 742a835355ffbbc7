"""Every column name, Arrow schema, file name and format version, in DataComp's and img2dataset's own spelling."""

import pyarrow as pa

FORMAT_VERSION = 2
"""Raised when a stored format changes; part of every artifact's identity."""

# Columns of a pool (CommonPool metadata; img2dataset's parquet says `caption` where CommonPool says `text`).
UID = "uid"
URL = "url"
TEXT = "text"
CAPTION = "caption"
KEY = "key"
STATUS = "status"
ORIGINAL_WIDTH = "original_width"
ORIGINAL_HEIGHT = "original_height"
STATUS_SUCCESS = "success"
ERROR_MESSAGE = "error_message"
SHA256 = "sha256"

# Columns that reading a pool adds to its batches; they are never stored.
ROW = "__row__"
"""int32: position of the row within its part."""
IMAGE = "image"
"""binary: the image member's bytes, untouched; null when there are none."""
IMAGE_ERROR = "__image_error__"
"""string: why IMAGE is null (one of the REASON_ names); null otherwise."""
START = "__start__"
END = "__end__"
"""int64: bytes of the row in its tar, headers and padding included; null where the tar does not have it."""

REASON_MISSING_IMAGE = "missing_image"
REASON_TRUNCATED_TAR = "truncated_tar"
REASON_UNREADABLE_IMAGE = "unreadable_image"
REASON_OVERSIZED_IMAGE = "oversized_image"
REASON_NULL_CAPTION = "null_caption"
REASON_NOT_DOWNLOADED = "not_downloaded"
REASON_BROKEN_PART = "broken_part"
REASON_BAD_UID = "bad_uid"
REASON_DUPLICATE_KEY = "duplicate_key"
REASON_MISSING_COLUMN = "missing_column"
REASON_MISSING_EMBEDDING = "missing_embedding"
REASON_MISSING_LABEL = "missing_label"
REASON_TEXT_DETECTOR = "text_detector"
REASON_NOT_FITTED = "not_fitted"
REASON_MISSING_METADATA = "missing_metadata"
REASON_MISSING_CANDIDATE = "missing_candidate"

# Score columns.
CAPTION_WORDS = "caption_words"
CAPTION_CHARS = "caption_chars"
CAPTION_FASTTEXT_WORDS = "caption_fasttext_words"
CAPTION_ENTITIES = "caption_entities"
CAPTION_ENTITIES_STRICT = "caption_entities_strict"
MIN_SIDE_PX = "image_min_side_px"
ASPECT = "image_aspect"


def confidence_column(name: str) -> str:
    """Return the column of how sure language filter `name` is; the language itself stands in column `name`."""
    return f"{name}_confidence"


def similarity_column(name: str) -> str:
    """Return the cosine column of CLIP filter `name` (CommonPool says clip_l14_similarity_score)."""
    return f"{name}_similarity_score"


def score_column(name: str) -> str:
    """Return the float32 column of filter `name`, for the many that make one number a row."""
    return f"{name}_score"


def image_embedding_column(name: str) -> str:
    """Return the image embedding column of CLIP filter `name` (CommonPool's npz says l14_img)."""
    return f"{name}_img"


def text_embedding_column(name: str) -> str:
    """Return the caption embedding column of CLIP filter `name` (CommonPool's npz says l14_txt)."""
    return f"{name}_txt"


def fitted_column(name: str, field: str) -> str:
    """Return the column of filter `name` that holds a field of its fit's table (uid_table.py)."""
    return f"{name}_{field}"


def cluster_column(name: str) -> str:
    """Return the int32 cluster id column of image_cluster filter `name`."""
    return f"{name}_cluster"


def entries_column(name: str) -> str:
    """Return the list<int32> column of metaclip filter `name`: numbers of the metadata entries that a caption has."""
    return f"{name}_entries"


def in_targets_column(name: str) -> str:
    """Return the bool column of image_cluster filter `name` that says whether the cluster is a target."""
    return f"{name}_in_targets"


# Tar members.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSION = "txt"
JSON_EXTENSION = "json"
CLASS_EXTENSION = "cls"
METADATA_EXTENSION = "npy"

# File names.
PART_PATTERN = "{:08d}"
TAR_SUFFIX = ".tar"
PARQUET_SUFFIX = ".parquet"
ARRAYS_SUFFIX = ".npz"
STATS_SUFFIX = "_stats.json"
SIZES = "sizes.json"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
ZEROSHOT = "zeroshot.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
CHECKPOINT = "checkpoint.pt"
RESUME_PATTERN = "resume-{:08d}.pt"
"""An unfinished training run after that many steps."""
RUN_MODEL = "model.json"
RUN_CAPTIONS = "captions.bin"
"""What an unfinished run's locked text tower makes of each caption."""
RUN_INDEX = "index.npz"
"""Where an unfinished run's rows lie."""
PRETRAINED_FOLDER, FINETUNED_FOLDER, SWEEP_FOLDER = "pretrained", "finetuned", "sweep"
EVAL_RESULTS = "eval_results.jsonl"
EVAL_CURVE = "curve.jsonl"
EVAL_SOURCE = "source.json"
OUTCOMES_FOLDER = "outcomes"
IMAGE_FEATURES, FEATURE_TRUTHS = "image.npy", "truths.json"
REPORT = "report.html"
FILTER_CARD, FILTER_CARD_PAGE = "filter_card.json", "filter_card.md"
EVALUATION, EVALUATION_PAGE = "evaluation.json", "evaluation.md"
EVENTS = "events.jsonl"
LEDGER = "ledger.json"
REQUEST = "request.json"
LOCK = ".winnow-lock"
CENTROIDS = "centroids.npy"
TARGETS = "targets.npy"
TABLE = "table.npy"
PROBE = "probe.npz"

FAILURES_FOLDER = "failures"
SPANS_FOLDER = "spans"
POOL = "pool"
"""Name of the account of the pool's own rows beside one account per filter."""
FAILURE_PART = "part"
FAILURE_FILTER = "filter"
FAILURE_REASON = "reason"
FAILURE_MESSAGE = "message"
FAILURE_SCHEMA = pa.schema(
    [
        (FAILURE_PART, pa.string()),
        (ROW, pa.int32()),
        (UID, pa.string()),
        (KEY, pa.string()),
        (START, pa.int64()),
        (FAILURE_FILTER, pa.string()),
        (FAILURE_REASON, pa.string()),
        (FAILURE_MESSAGE, pa.string()),
    ]
)
"""The quarantine: one row per (pool row, filter) that could not be scored, and per row that the pool itself spoiled
(filter "pool", ROW null).  START is the byte position of the row in its tar; null where it has none, or the filter
read no images."""

# Metadata keys of a score file.
SCORE_IDENTITY = b"winnow_identity"
SCORE_FILTER = b"winnow_filter"
SCORE_COUNTS = b"winnow_counts"
SCORE_INPUTS = b"winnow_inputs"
SCORE_POOL = b"winnow_pool"

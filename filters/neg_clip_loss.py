"""negCLIPLoss: the CLIP score less what the row's image and caption give to the others (Wang et al. 2024).

Source: arXiv:2405.19547, section 3.1, and ypwang61/negCLIPLoss_NormSim baselines/vas2.py:2566-2634,2784-2810.  With
s_ij = u_i.v_j of images and captions, and K random partitions of the rows into batches B:
    R_i = tau/2 [log sum_{j in B} exp(s_ij/tau) + log sum_{j in B} exp(s_ji/tau)],   score_i = s_ii - mean_K R_i
A caption that fits every image, and an image that fits every caption, score low here and high under the cosine.

Batches are drawn inside one part, as the authors draw them inside one metadata shard; so a row's score depends on its
part, and a pool that is cut into other parts has other scores.  A seeded hash of the uid decides who is in which batch:
neither the order of rows nor the number of workers does (of two rows with one uid, the pool's order decides).  Vectors
are taken as stored, not made unit length again, as the authors take them.  Rows that lack a vector are in no batch.

The last batch of a part is short, and its sums are smaller.  The authors leave that as it is; here `correct_short` adds
tau log(batch/|B|), as if the batch were a sample of a full one.  Sums are taken with the largest term subtracted: the
authors' exp(s/tau) overflows float32 from s = 0.88 at tau = 0.01.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from filters.vectors import explain_missing, read_vectors
from pipeline.clip_model import AUTO, pick_device
from pipeline.config import as_mapping, config
from pipeline.contract import Filter, Score, Scored
from pipeline.errors import ConfigError
from pipeline.schemas import UID, score_column
from pipeline.select_draw import shuffle_uids
from pipeline.uid import parse_uids

if TYPE_CHECKING:
    import torch

MAX_REPEATS = 1 << 16
MIN_TAU = 1e-6
"""s / tau of any vectors that are scored stays within float32."""
CPU_BLOCK, GPU_BLOCK = 2048, 8192
"""Sides of the block of similarities that is held: 16 MiB of float32 on a CPU, 256 MiB on a GPU, whatever the batch."""


@config
class Options:
    """Which embeddings, and the constants of the loss."""

    image: str
    """Column of image embeddings: a key of the pool's npz such as l14_img, or one that an earlier filter makes."""
    text: str
    """Column of caption embeddings of the same encoder, such as l14_txt."""
    tau: float = 0.01
    """Temperature: OpenAI CLIP's 1/100.  The authors' code notes 0.07 for DFN-P, and their runs use both."""
    batch: int = 32768
    """Rows of a batch, OpenAI CLIP's own; the sums hold as many terms."""
    repeats: int = 10
    """K, partitions that a score is the mean of; the authors find 5 to be enough."""
    seed: int = 0
    """Of the partitions."""
    correct_short: bool = True
    """Whether a batch that is not full is corrected for it.  False: as the authors' code."""

    def __post_init__(self) -> None:
        if not MIN_TAU <= self.tau < float("inf"):
            raise ConfigError(f"neg_clip_loss: tau {self.tau} is below {MIN_TAU} or infinite; OpenAI CLIP has 0.01.")
        if self.batch < 1 or not 1 <= self.repeats <= MAX_REPEATS:
            raise ConfigError(
                f"neg_clip_loss: batch {self.batch} and repeats {self.repeats} should be 1 or more, "
                f"repeats at most {MAX_REPEATS:,}."
            )


def build(name: str, options: Options) -> Filter:
    """Return the filter; it needs a whole part at a time."""
    return Filter(
        name=name,
        needs=(options.image, options.text),
        makes=((score_column(name), pa.float32()),),
        version=1,
        settings=as_mapping(options),
        load=partial(load, options),
        vectors=(options.image, options.text),
        runs_on_device=True,
        whole_part=True,
    )


def load(options: Options) -> Score:
    """Return the scoring function on its device."""
    return partial(score, options, pick_device(AUTO))


def score(options: Options, device: str, batch: pa.RecordBatch) -> Scored:
    """Return float32 (rows,) for all rows of a part; null where one of the two embeddings is missing.

    Raises ConfigError when the two differ in length.
    """
    image_ND, has_image_N = read_vectors(batch, options.image)
    text_ND, has_text_N = read_vectors(batch, options.text)
    usable_N = has_image_N & has_text_N
    score_N = np.full(batch.num_rows, np.nan, np.float32)
    if usable_N.any():
        if image_ND.shape[1] != text_ND.shape[1]:
            raise ConfigError(
                f"{options.image} has {image_ND.shape[1]} numbers and {options.text} {text_ND.shape[1]}: "
                "they are of different encoders."
            )
        uids = parse_uids(batch.column(UID))[usable_N]
        score_N[usable_N] = compute_scores(image_ND[usable_N], text_ND[usable_N], uids, options, device)
    failures = explain_missing(usable_N, f"{options.image} or {options.text}")
    return Scored((pa.array(score_N, from_pandas=True),), failures)


def compute_scores(
    image_ND: np.ndarray, text_ND: np.ndarray, uids: np.ndarray, options: Options, device: str = "cpu"
) -> np.ndarray:
    """Return float64 (rows,) for embeddings of finite numbers, which are held on the device as float32."""
    import torch

    wide_ND, wide_MD = (torch.from_numpy(matrix.astype(np.float32)).to(device) for matrix in (image_ND, text_ND))
    cosine_N = (wide_ND * wide_MD).sum(dim=1).double().cpu().numpy()
    scaled_ND = wide_ND / options.tau
    total_N = np.zeros(len(uids))
    repeats = options.repeats if len(uids) > options.batch else 1  # all partitions into one batch are the same
    for repeat in range(repeats):
        order = _shuffle(uids, options.seed * MAX_REPEATS + repeat)
        for start in range(0, len(order), options.batch):
            rows = order[start : start + options.batch]
            place = torch.from_numpy(rows).to(device)
            total_N[rows] += _sum_logs(scaled_ND[place], wide_MD[place]).double().cpu().numpy()
            if options.correct_short:
                total_N[rows] += 2 * np.log(options.batch / len(rows))
    scores: np.ndarray = cosine_N - options.tau / 2 * total_N / repeats
    return scores


def _shuffle(uids: np.ndarray, seed: int) -> np.ndarray:
    """Return int64 places of the rows in an order that their uids decide."""
    shuffled = shuffle_uids(uids, seed)
    return np.lexsort((shuffled["f1"], shuffled["f0"]))


def _sum_logs(scaled_BD: "torch.Tensor", text_BD: "torch.Tensor") -> "torch.Tensor":
    """Return float32 (B,): log sum_j exp(s_ij) + log sum_j exp(s_ji), a block of s at a time; no B x B is held."""
    import torch

    side = CPU_BLOCK if scaled_BD.device.type == "cpu" else GPU_BLOCK
    of_image_B = torch.full(scaled_BD.shape[:1], -torch.inf, device=scaled_BD.device)
    of_text_B = of_image_B.clone()
    for start in range(0, len(scaled_BD), side):
        rows = slice(start, start + side)
        for left in range(0, len(text_BD), side):
            columns = slice(left, left + side)
            s_nk = scaled_BD[rows] @ text_BD[columns].T
            of_image_B[rows] = torch.logaddexp(of_image_B[rows], s_nk.logsumexp(dim=1))
            of_text_B[columns] = torch.logaddexp(of_text_B[columns], s_nk.logsumexp(dim=0))
    return of_image_B + of_text_B

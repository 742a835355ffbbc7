"""Embeddings and uids by chance, and a pool of metadata that holds them as CommonPool does."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.uid import UID_DTYPE, format_uids


def draw(rows: int, dim: int = 16, *, seed: int = 0, dtype: Any = np.float16) -> np.ndarray:
    """Unit vectors (rows, dim) in 20 clumps of different tightness."""
    rng = np.random.default_rng(seed)
    clump_KD = np.random.default_rng(99).normal(size=(20, dim))
    drawn = clump_KD[rng.integers(0, 20, rows)] + rng.normal(size=(rows, dim)) * rng.uniform(0.2, 1.5, (rows, 1))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(dtype)


def draw_uids(rows: int, seed: int = 0) -> np.ndarray:
    """Random uids (rows,)."""
    return np.random.default_rng(seed).integers(0, 2**64, (rows, 2), dtype=np.uint64).view(UID_DTYPE)[:, 0]


def write_metadata(folder: Path, uids: np.ndarray, vector_ND: np.ndarray, *, parts: int = 3) -> Path:
    """Write NAME.parquet and NAME.npz (l14_img) per part."""
    folder.mkdir(parents=True)
    for number, places in enumerate(np.array_split(np.arange(len(uids)), parts)):
        texts = [f"caption {n}" for n in places]
        table = pa.table({"uid": format_uids(uids[places]), "url": texts, "text": texts})
        pq.write_table(table, folder / f"{number:08d}.parquet")
        np.savez(folder / f"{number:08d}.npz", l14_img=vector_ND[places], b32_img=vector_ND[places, :2])
    return folder

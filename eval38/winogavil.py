"""WinoGAViL: which of 5 to 12 images go with a cue?

An instance has a cue, candidate images by name, and the names that people associate with the cue.  The model is told
how many these are and takes the nearest; the score is the Jaccard index of its choice and theirs.  3,563 instances
share 2,044 images, and each is encoded once.
Source: mlfoundations/datacomp at 4a8df19, eval_utils/wino_eval.py (prompt, choice, groups).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval38 import statistics
from eval38.archives import (
    check_strings,
    find_files,
    is_parquet,
    open_archive,
    parse_list,
    read_parquet,
    read_table,
    take_picture,
)
from eval38.classify import Outcome
from eval38.embed import Embedder, Seen
from eval38.metrics import Metrics
from eval38.rows import EvalSet, ImageRow, LostImage, hash_files
from eval38.tasks import Task, folder_of
from pipeline.errors import EvalError
from pipeline.schemas import REASON_MISSING_CANDIDATE
from pipeline.storage import join

CUE, CANDIDATES, ASSOCIATIONS, IMAGES = "cue", "candidates", "associations", "candidate_images"
"""Columns: in the csv the lists are spelled as JSON and there are no images."""
VOWELS = "aeiou"
GROUPS = {
    "avg_jaccard_score": (1, None),
    "jaccard_score_5": (5, 5),
    "jaccard_score_6": (6, 6),
    "jaccard_score_10": (10, 10),
    "jaccard_score_12": (12, 12),
    "jaccard_score_5-6": (1, 6),
    "jaccard_score_10-12": (10, None),
}
"""Score -> how many candidates its instances have, from and to."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One question."""

    place: str
    """File and line or row."""
    cue: str
    candidates: tuple[str, ...]
    associations: frozenset[str]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        cue = self.cue.lower()
        return f"An {cue}" if cue[0] in VOWELS else f"A {cue}"


def read_game(task: Task, data: str) -> EvalSet:
    """Return the set after reading all its instances.  Raises EvalError for one that cannot be played."""
    folder = join(data, folder_of(task))
    files = find_files(folder)
    found = EvalSet(task, (), (), files, hash_files(files))
    if not list(read_instances(found)):
        raise EvalError(f"{files[0]} holds no instance.")
    return found


def read_instances(eval_set: EvalSet) -> Iterator[Instance]:
    """Yield the instances in order."""
    columns = (CUE, CANDIDATES, ASSOCIATIONS)
    if is_parquet(eval_set.files):
        for place, cells in read_parquet(eval_set.files, columns):
            yield _check_instance(place, cells[CUE], *(check_strings(cells[name], place) for name in columns[1:]))
    else:
        for place, row in read_table(eval_set.files[0], columns):
            yield _check_instance(place, row[CUE], *(parse_list(row[name], place) for name in columns[1:]))


def _check_instance(place: str, cue: object, candidates: Sequence[str], associations: Sequence[str]) -> Instance:
    if not isinstance(cue, str) or not cue or not associations or not set(associations) <= set(candidates):
        raise EvalError(
            f"{place}: an instance needs a cue and associations among its candidates, not cue {cue!r}, "
            f"associations {list(associations)} and candidates {list(candidates)}."
        )
    return Instance(place, cue, tuple(candidates), frozenset(associations))


def list_prompts(eval_set: EvalSet) -> Iterator[str]:
    """Yield the prompt of every instance."""
    return (instance.prompt for instance in read_instances(eval_set))


def evaluate(eval_set: EvalSet, seen: Seen[str], model: Embedder) -> Outcome:
    """Return the Jaccard scores; an instance with a candidate that cannot be read is lost."""
    instances = list(read_instances(eval_set))
    places = {name: place for place, name in enumerate(seen.truths)}
    why = {row.name: row.message for row in seen.lost}
    whole = [instance for instance in instances if not why.keys() & set(instance.candidates)]
    lost = [_lose(instance, why) for instance in instances if why.keys() & set(instance.candidates)]
    if not whole:
        raise EvalError(f"{eval_set.task.name}: every instance misses a candidate; the first: {lost[0].message}.")
    text_MD = model.embed_texts([instance.prompt for instance in whole])
    choices = choose(whole, text_MD, seen.image_ND, places)
    return Outcome(measure_game(choices), len(whole), tuple(lost), per_image=tabulate(choices))


def _lose(instance: Instance, why: Mapping[str, str]) -> LostImage:
    missing = (f"{name}: {why[name]}" for name in instance.candidates if name in why)
    return LostImage(instance.place, REASON_MISSING_CANDIDATE, "; ".join(missing))


def read_candidates(eval_set: EvalSet) -> Iterator[ImageRow[str] | LostImage]:
    """Yield each candidate's image once, with its name as truth."""
    if not is_parquet(eval_set.files):
        names = dict.fromkeys(name for instance in read_instances(eval_set) for name in instance.candidates)
        with open_archive(eval_set.files[1]) as images:
            for name in names:
                yield images.read(name, name, name)
        return
    known: dict[str, int] = {}
    for place, cells in read_parquet(eval_set.files, (CANDIDATES, IMAGES)):
        pictures = cells[IMAGES] or []
        if len(pictures) != len(cells[CANDIDATES]):
            raise EvalError(f"{place}: {len(cells[CANDIDATES])} candidates, but {len(pictures)} images.")
        for name, picture in zip(cells[CANDIDATES], pictures, strict=True):
            row = take_picture(picture, name, name)
            content = hash(row.content) if isinstance(row, ImageRow) else 0
            if name not in known:
                yield row
            elif known[name] != content:
                raise EvalError(f"{place}: candidate {name!r} has another image than in a row before.")
            known[name] = content


class Choice(NamedTuple):
    """What the model takes in one instance."""

    candidates: int
    shared: int
    """Candidates that are chosen and true."""
    union: int
    """Candidates that are chosen or true."""


def choose(instances: Sequence[Instance], text_MD: Tensor, image_ND: Tensor, places: Mapping[str, int]) -> list[Choice]:
    """Return the choice of each instance.

    text_MD holds the instances' prompts, image_ND the images, places[name] the row of a candidate.  Unit vectors.
    """
    choices = []
    for instance, text_D in zip(instances, text_MD, strict=True):
        image_KD = image_ND[[places[name] for name in instance.candidates]]
        choices.append(compare_choice(instance, (image_KD @ text_D).numpy()))
    return choices


def compare_choice(instance: Instance, cosine_K: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> Choice:
    """Return how the nearest candidates agree with the true ones.  Of equal cosines numpy's sort decides."""
    truth_K = np.array([name in instance.associations for name in instance.candidates])
    choice_K = np.zeros_like(truth_K)
    choice_K[np.argsort(cosine_K)[-int(truth_K.sum()) :]] = True
    return Choice(len(truth_K), int((truth_K & choice_K).sum()), int((truth_K | choice_K).sum()))


def measure_game(choices: Sequence[Choice]) -> Metrics:
    """Return the mean Jaccard index of all instances and by number of candidates; None where there is no instance."""
    metrics: Metrics = {}
    for group, (least, most) in GROUPS.items():
        of_group = [one.shared / one.union for one in choices if least <= one.candidates <= (most or one.candidates)]
        metrics[group] = fsum(of_group) / len(of_group) if of_group else None
    return metrics


def tabulate(choices: Sequence[Choice]) -> dict[str, Tensor]:
    """Return the choices by column, in the names of statistics.py."""
    names = (statistics.CANDIDATES, statistics.SHARED, statistics.UNION)
    return {name: torch.tensor(column) for name, column in zip(names, zip(*choices, strict=True), strict=True)}

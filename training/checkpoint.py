"""Save and load weights and unfinished runs.  Files appear whole or not at all, and hold tensors and numbers only.

Everything that a step depends on is in RunState or is a function of (seed, step), so loading one is an exact resume.
A save of an unfinished run is resume-STEP.pt; as `ARCHITECTURE@FILE` it is a model too.
"""

import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.clip_model import describe_architecture
from pipeline.errors import StageError, is_out_of_means
from pipeline.schemas import CHECKPOINT, MANIFEST, METRICS, RESUME_PATTERN, RUN_MODEL, TENSORBOARD_FOLDER, ZEROSHOT
from pipeline.storage import join, list_folder, name_of, read_bytes, remove, write_atomic, write_bytes
from training.metrics import cut_lines
from training.sharding import keep_own, receive_state, send_state
from training.world import ALONE, World

log = logging.getLogger("winnow")
SAVE_NAME = re.compile(r"resume-\d+\.pt")
NO_MEMORY = "allocate memory"
"""What torch says where there is too little main memory for a tensor, in a plain RuntimeError."""
SIGLIP_LOGIT_BIAS = -10.0
"""Where SigLIP's logit bias starts (arXiv:2303.15343, section 3.2)."""


@dataclass(slots=True)
class RunState:
    """A run after `step` steps."""

    model: Any
    optimizer: torch.optim.Optimizer
    is_seen_N: torch.Tensor
    """bool: rows trained on."""
    is_unreadable_N: torch.Tensor
    """bool: rows drawn whose image could not be decoded."""
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    """Of the loss, for fp16; without effect otherwise."""
    step: int = 0
    """Steps done."""
    num_unreadable_draws: int = 0
    losses: list[float] = field(default_factory=list)
    """Of every step done, in nats."""
    world: World = ALONE
    """The processes of the run; rows and draws are those that this one saw since gather_account."""
    spread: Any = None
    """The model's towers, sharing gradients with the other processes; None if there is but one."""
    owners: list[int] = field(default_factory=list)
    """Which process steps each parameter (sharding.py); empty: each steps all."""


def gather_account(state: RunState) -> None:
    """Bring what all processes saw into the state of the first."""
    world = state.world
    state.is_seen_N, state.is_unreadable_N = world.any(state.is_seen_N), world.any(state.is_unreadable_N)
    draws = int(world.add(torch.tensor([state.num_unreadable_draws])))
    state.num_unreadable_draws = draws if world.is_first else 0


def hand_over_optimizer(state: RunState) -> None:
    """Send the first process, which takes a snapshot, what only this one's optimiser knows."""
    send_state(state.optimizer.state_dict(), state.owners, state.world)


def snapshot(state: RunState, *, identity: str) -> dict[str, Any]:
    """Return a copy of a run's state in main memory; `identity` is that of the manifest it will have.

    Where the optimiser is sharded the other processes call hand_over_optimizer meanwhile.
    """
    content: dict[str, Any] = _copy(
        {
            "state_dict": state.model.state_dict(),
            "optimizer": receive_state(state.optimizer.state_dict(), state.owners, state.world),
            "scaler": state.scaler.state_dict(),
            "is_seen": state.is_seen_N,
            "is_unreadable": state.is_unreadable_N,
        }
    )
    losses = torch.tensor(state.losses, dtype=torch.float64)
    counts = {"step": state.step, "num_unreadable_draws": state.num_unreadable_draws}
    return content | counts | {"identity": identity, "losses": losses}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(part) for part in value)
    return value


class Saver:
    """Writes snapshots of one run in a thread while steps go on; at most one is under way.

    What lies in `out` beyond `step`, from which the run goes on, load_resume found damaged or of other runs: the first
    save takes its place.  `check_lock` raises StageError when another driver took the folder over.
    """

    def __init__(
        self, out: str, *, identity: str, keep: int, step: int = 0, check_lock: Callable[[], None] = lambda: None
    ) -> None:
        self.out, self.identity, self.keep, self.check_lock = out, identity, keep, check_lock
        self._strange = [save for save in list_saves(out) if save > step]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[None] | None = None

    def save(self, state: RunState) -> None:
        """Copy the state and begin to write it, after the save before is done."""
        self.finish()
        self.check_lock()
        content = snapshot(state, identity=self.identity)
        self._writing = self._thread.submit(write_save, self.out, content, keep=self.keep, strange=self._strange)
        self._strange = []

    def list_saves_before(self, step: int) -> list[int]:
        """Return the steps of this run's own saves before a step, ascending."""
        return [save for save in list_saves(self.out) if save < step and save not in self._strange]

    def remove_strange(self) -> None:
        """Delete the saves of other runs, if no save of this one has."""
        for step in self._strange:
            remove(place_save(self.out, step))

    def check(self) -> None:
        """Raise StageError if the last save failed."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way.  Raises StageError if it failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception as error:
            raise StageError(
                f"train: the state could not be saved in {self.out} ({error}). Make room, and run the same again."
            ) from error

    def close(self) -> None:
        """Wait for what is under way and end the thread."""
        self._thread.shutdown()


def write_save(out: str, content: dict[str, Any], *, keep: int, strange: Sequence[int] = ()) -> None:
    """Write a snapshot, then delete the strange ones and all but the `keep` newest of the rest."""
    _save(place_save(out, content["step"]), content)
    own = [step for step in list_saves(out) if step == content["step"] or step not in strange]
    for step in {*own[:-keep], *strange} - {content["step"]}:
        remove(place_save(out, step))


def list_saves(out: str) -> list[int]:
    """Return the steps of a run's saves, ascending."""
    names = [name_of(url) for url in list_folder(out)]
    return sorted(int(name[len("resume-") : -len(".pt")]) for name in names if SAVE_NAME.fullmatch(name))


def remove_saves(out: str) -> None:
    """Delete every save of a run."""
    for step in list_saves(out):
        remove(place_save(out, step))


def place_save(out: str, step: int) -> str:
    """Return where the save after that step is."""
    return join(out, RESUME_PATTERN.format(step))


def load_resume(out: str, state: RunState, *, identity: str) -> bool:
    """Bring `state` to where an unfinished run of the same identity stopped; return False when there is none.

    What another run left that was finished in `out` is taken away.  Of several processes the first chooses and the
    others follow.  Raises StageError for a save that cannot be read now, as it may be whole.
    """
    if state.world.is_first:
        _load_newest(out, state, identity)
    step = state.world.share(state.step)
    if state.step != step:
        content = _read_resume(place_save(out, step), identity)
        if content is None:
            raise StageError(
                f"train: process {state.world.rank} cannot read {place_save(out, step)}, from which the first goes on. "
                "All machines must see the same run folder."
            )
        _restore(state, content)
        state.num_unreadable_draws = 0  # the first has them
    return step > 0


def _load_newest(out: str, state: RunState, identity: str) -> None:
    """Restore from the newest save of this run and cut the metrics and zero-shot lines to it.

    The newest whole save is taken; one that is damaged, or is of another run, is named in a warning.
    Then lines of later steps are cut; a run that starts anew takes away what TensorBoard showed of another.
    """
    for step in reversed(list_saves(out)):
        url = place_save(out, step)
        content = _read_resume(url, identity)
        if content is not None:
            _restore(state, content)
            log.info("train: going on from step %d of %s", state.step, url)
            break
    for stale in (MANIFEST, RUN_MODEL):
        remove(join(out, stale))
    for name in (METRICS, ZEROSHOT):
        cut_lines(join(out, name), step=state.step)
    if state.step == 0:
        remove(join(out, TENSORBOARD_FOLDER))


def _restore(state: RunState, content: dict[str, Any]) -> None:
    state.model.load_state_dict(content["state_dict"])
    state.optimizer.load_state_dict(keep_own(content["optimizer"], state.owners, state.world.rank))
    state.scaler.load_state_dict(content["scaler"])
    state.step, state.num_unreadable_draws = content["step"], content["num_unreadable_draws"]
    state.is_seen_N, state.is_unreadable_N = content["is_seen"], content["is_unreadable"]
    state.losses = content["losses"].tolist()


def _read_resume(url: str, identity: str) -> dict[str, Any] | None:
    """Return a save's content, None when it is damaged or of another run.

    Raises StageError where a disk or a store fails, and what says that memory is short.
    """
    try:
        packed = read_bytes(url)
    except OSError as error:
        raise StageError(
            f"train: the save {url} cannot be read now ({error}), and it may be whole. Run the same command again, or "
            "move it away to go on from the save before it."
        ) from error
    try:
        content: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        found = content["identity"]
    except Exception as error:  # of bytes in memory: RuntimeError, UnpicklingError, EOFError, UnicodeDecodeError, ...
        if is_out_of_means(error) or NO_MEMORY in str(error):
            raise
        log.warning("train: passed over, because it is damaged: %s: %s", url, error)
        return None
    if found != identity:
        log.warning(
            "train: passed over, because it is of another config or data (%.12s, now %.12s): %s", found, identity, url
        )
        return None
    return content


def save_weights(out: str, model: torch.nn.Module, *, architecture: str) -> None:
    """Write the finished weights, in open_clip's layout, and which architecture they are of."""
    state_dict = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    _save(join(out, CHECKPOINT), {"state_dict": state_dict})
    described = {"architecture": architecture} | (
        {"settings": settings} if (settings := _find_settings(model, architecture)) else {}
    )
    write_bytes(join(out, RUN_MODEL), (json.dumps(described) + "\n").encode())


def _find_settings(model: Any, architecture: str) -> dict[str, float]:
    """Return what open_clip must be told besides the architecture, to make room for all weights."""
    has_bias = getattr(model, "logit_bias", None) is not None
    if has_bias and "init_logit_bias" not in describe_architecture(architecture):
        return {"init_logit_bias": SIGLIP_LOGIT_BIAS}
    return {}


def _save(url: str, content: dict[str, Any]) -> None:
    with write_atomic(url) as file:
        torch.save(content, file)

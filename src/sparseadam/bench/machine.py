"""What a result depends on besides the code: the machine, the versions, and how much memory is free."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..update import Backend, backends

HOST = torch.device("cpu")


def fastest_backend(device: torch.device = HOST) -> Backend:
    """Return the backend that is measured: the fastest one present for tables on ``device``."""
    names = ("native", "reference") if device == HOST else ("triton", "reference")
    return next(backend for backend in backends() if backend.available and backend.name in names)


def facts(device: torch.device = HOST) -> dict[str, Any]:
    """Return what a result line says of its origin."""
    backend = fastest_backend(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sparseadam": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "device": "cpu" if device == HOST else f"{torch.cuda.get_device_name(device)}, {_driver()}",
        "threads": torch.get_num_threads(),
        "backend": backend.name,
        "backend_detail": backend.detail,
    }


def _driver() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"


# Where measurements are kept in a checkout: to write some does not make the next ones those of other code.
_RESULTS = "benchmarks/results"


def commit() -> str | None:
    """Return the commit that this package was installed from, marked where code differs, or None outside a checkout."""
    package = Path(__file__).resolve().parent.parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        # The environment may lie in a checkout of something else, whose commit says nothing of this package.
        if not (Path(top) / "src" / "sparseadam" / "bench").is_dir():
            return None
        name = _git(package, "rev-parse", "--short=12", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", top, f":(top,exclude){_RESULTS}")
        return f"{name}-dirty" if changed else name
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def processor() -> str:
    """Return the processor's name as the system gives it, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            name = next(models, name)
    except OSError:  # not Linux
        pass
    return f"{name}, {num_cores()} cores"


def num_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes(device: torch.device = HOST) -> int | None:
    """Return how much memory can still be taken without swapping, or None where the system does not say."""
    if device != HOST:
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

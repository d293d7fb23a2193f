"""Memory: how much this process may still take, and which errors mean that there was none left."""

import errno
import math
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")  # of the files of the kernel, which tests replace
# Files of a cgroup per version: its limit, its use, and lines of memory.stat: the cache of files,
# which the kernel frees for processes.
CGROUP_FILES = {
    "cgroup2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}
# By torch, cuBLAS and cuDNN, C++, the C library, and its loader.
MESSAGES = re.compile(
    "out of memory|not enough memory|can't allocate memory|Cannot allocate memory|ALLOC_FAILED"
    "|bad_alloc|failed to map segment from shared object$|could not (create|execute) a primitive"
)


def free_memory() -> int:
    """Return the bytes that this process may still take: see `shared_memory`, and `ulimit`."""
    return max(0, int(min(shared_memory(), *_left_by_ulimit())))


def shared_memory() -> int:
    """Return the bytes that this process and those it starts may still take together.

    That is what the machine has, or less where limits of containers and batch jobs leave less:
    cgroups, which kill a process that takes more.
    """
    return max(0, int(min(psutil.virtual_memory().available, *_left_by_cgroups(), math.inf)))


def free_gpu_memory(device) -> int:
    """Return the bytes of a GPU's memory that this process may still take, with those that torch
    holds for later.
    """
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no memory left, also where a library has its own words."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_of_library = isinstance(error, (RuntimeError, ImportError))
    return isinstance(error, MemoryError) or (is_of_library and bool(MESSAGES.search(str(error))))


def _left_by_cgroups() -> Iterator[float]:
    """Yield what each limit leaves, of this process's own cgroup and of those that it is in."""
    for version, folder in _find_cgroups():
        limit_file, use_file, caches = CGROUP_FILES[version]
        try:
            limit = float((folder / limit_file).read_text().replace("max", "inf"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / use_file).read_text()) - sum(int(stat[name]) for name in caches)
        except (OSError, ValueError, KeyError):
            continue  # the highest has no limit, and others may not be readable
        yield limit - max(used, 0)


def _find_cgroups() -> Iterator[tuple[str, Path]]:
    """Yield (version, folder) of the memory cgroup of this process and of those above it."""
    try:
        memberships = (ROOT / "proc/self/cgroup").read_text().splitlines()
        mounts = (ROOT / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return  # not Linux
    own = {}
    for line in memberships:  # 4:memory:/slurm/job_7 in version 1, 0::/user.slice in version 2
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for line in mounts:  # ID PARENT DEVICE ROOT PLACE OPTIONS - TYPE SOURCE OPTIONS
        place, _, kind = line.partition(" - ")
        version, _, options = kind.split(" ", 2)
        is_other = version == "cgroup" and "memory" not in options.split(",")
        if version not in own or is_other:
            continue
        top, mounted_at = place.split()[3:5]
        mount, path = ROOT / mounted_at.lstrip("/"), Path(own[version])
        # A container may see its own cgroup mounted, but be told the path on its host.
        below = path.relative_to(top) if path.is_relative_to(top) else Path()
        folder = mount if ".." in below.parts else mount / below
        yield from (
            (version, level) for level in (folder, *folder.parents) if level.is_relative_to(mount)
        )


def _left_by_ulimit() -> Iterator[float]:
    used = psutil.Process().memory_info()
    taken = {resource.RLIMIT_AS: used.vms, resource.RLIMIT_DATA: getattr(used, "data", 0)}
    for kind, size in taken.items():
        limit, _ = resource.getrlimit(kind)
        yield math.inf if limit == resource.RLIM_INFINITY else limit - size

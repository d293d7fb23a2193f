import errno
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, run_python

from local.tools import memory
from local.tools.memory import free_memory, is_out_of_memory


def allocate(make) -> Exception:
    with pytest.raises(Exception, match=".") as error:
        make(2**45)
    return error.value


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (allocate(np.empty), True),
        (allocate(torch.empty), True),
        (RuntimeError("could not create a primitive"), True),  # of oneDNN, whose kernels take some
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ImportError("libx.so: failed to map segment: Cannot allocate memory"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (ImportError("libx.so: failed to map segment from shared object: Operation no"), False),
        (ImportError("libx.so: cannot allocate memory in static TLS block"), False),
        (OSError(errno.ENOSPC, "out of memory"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_errors_are_told_apart(error, is_memory):
    assert is_out_of_memory(error) == is_memory


V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n"
CPU_MOUNT = "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def v1(folder: str, limit: int, used: int, cache: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 9\ntotal_inactive_file {cache}\ntotal_active_file 0\n",
    }


def v2(folder: str, limit: int | str, used: int, cache: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup{folder}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache - 1}\nactive_file 1\n",
    }


@pytest.mark.parametrize(
    ("mounts", "own", "limits", "free"),
    [
        # A service of systemd; the highest cgroup has no memory.max.
        (V2_MOUNT.format(top="/"), "0::/a/b", v2("/a/b", 900, 300, 100), 700),
        (V2_MOUNT.format(top="/"), "0::/a/b", v2("/a/b", 900, 50, 100), 900),  # cache of before
        (V2_MOUNT.format(top="/"), "0::/a/b", v2("/a/b", 900, 950, 10), 0),
        # The one above has less left.
        (
            V2_MOUNT.format(top="/"),
            "0::/a/b",
            {**v2("/a/b", "max", 300, 100), **v2("/a", 500, 400, 100)},
            200,
        ),
        (V2_MOUNT.format(top="/"), "0::/", v2("", 900, 300, 100), 700),  # a container's own view
        (V2_MOUNT.format(top="/../.."), "0::/a", v2("", 900, 300, 100), 700),
        (V2_MOUNT.format(top="/"), "0::/../b", v2("", 900, 300, 100), 700),
        # A job of SLURM, with version 1; the other hierarchies do not count.
        (
            CPU_MOUNT + V1_MOUNT.format(top="/"),
            "9:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/",
            v1("/slurm/job_7", 900, 300, 100),
            700,
        ),
        # Docker: the path is the host's, the mount is the container's.
        (V1_MOUNT.format(top="/docker/7"), "4:memory:/docker/7", v1("", 900, 300, 100), 700),
        # Both versions, of which the second has no memory controller.
        (
            V1_MOUNT.format(top="/") + V2_MOUNT.format(top="/").replace("group rw", "group/u rw"),
            "4:memory:/a\n0::/a",
            v1("/a", 900, 300, 100),
            700,
        ),
    ],
)
def test_limits_of_containers_and_batch_jobs_are_respected(
    mounts, own, limits, free, tmp_path, monkeypatch
):
    write_files(tmp_path, {"proc/self/mountinfo": mounts, "proc/self/cgroup": own, **limits})
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert free_memory() == free


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/mountinfo": "", "proc/self/cgroup": "0::/a"},
        {
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            "proc/self/cgroup": "0::/a",
            **v2("/a", "max", 300, 100),
        },
        {
            "proc/self/mountinfo": V1_MOUNT.format(top="/"),
            "proc/self/cgroup": "4:memory:/a",
            **v1("/a", 9223372036854771712, 300, 100),
        },
        {
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            "proc/self/cgroup": "0::/a",
            "sys/fs/cgroup/a/memory.max": "9",  # without the others
        },
    ],
)
def test_without_a_limit_it_is_the_memory_of_the_machine(files, tmp_path, monkeypatch):
    write_files(tmp_path, files)
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    machine = psutil.virtual_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: machine)
    assert free_memory() == machine.available


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_what_is_free_can_be_taken_and_more_cannot(kind, tmp_path):
    script = tmp_path / "take.py"
    script.write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, psutil
from local.tools.memory import free_memory, is_out_of_memory
limit = psutil.Process().memory_info().vms + 300 * 2**20
resource.setrlimit(resource.{kind}, (limit, limit))
free = free_memory()
taken = np.empty(int(0.9 * free), np.uint8)
print(free_memory() < 0.2 * free)
try:
    np.empty(int(0.9 * free), np.uint8)
except Exception as error:
    print(is_out_of_memory(error))
""")
    result = run_python(script)
    assert result.stdout == "True\nTrue\n", result.stderr

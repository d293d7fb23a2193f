"""Runs train.py in children that are forked after the slow imports, and kills them at points that
are counted, not timed: python tests/chaos.py JOBS.json, a list of [exp_dir, flags, event, number].

Without an event a run comes to its end, and EXP.json beside it tells how many of each there were.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from local.tools import weights

EVENTS = ("step", "rename", "renamed", "write", "open", "remove")


class Killer:
    """Counts what happens, and ends this process when the number of an event is reached."""

    def __init__(self, exp_dir: str, event: str, number: int):
        self.exp_dir, self.last = exp_dir, (event, number)
        self.counts = Counter()

    def note(self, event: str) -> None:
        self.counts[event] += 1
        if (event, self.counts[event]) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Every optimizer step, and before and after every rename and within every write of the
        atomic ways out, and before any file of the run is opened to be written, or removed."""
        step, replace = torch.optim.Adam.step, os.replace

        def step_and_note(*args, **kwargs):
            result = step(*args, **kwargs)
            self.note("step")
            return result

        def replace_and_note(*args):
            self.note("rename")
            replace(*args)
            self.note("renamed")

        def open_to_tear(path, mode):
            file = open(path, mode)
            return TornFile(file, self) if mode == "wb" else file

        torch.optim.Adam.step, os.replace = step_and_note, replace_and_note
        weights.open = open_to_tear
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if event not in ("open", "os.remove") or not str(args[0]).startswith(self.exp_dir):
            return
        if event == "os.remove":
            self.note("remove")
        elif args[2] & (os.O_WRONLY | os.O_RDWR):
            self.note("open")


class TornFile:
    """A file in the middle of whose writes something is noted."""

    def __init__(self, file, killer: Killer):
        self.file, self.killer = file, killer

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, content) -> None:
        middle = len(content) // 2
        self.file.write(content[:middle])
        self.file.flush()
        self.killer.note("write")
        self.file.write(content[middle:])


def run(exp_dir: str, flags: list[str], event: str, number: int) -> int:
    """How a run in a child of this process ended: 0, or minus the signal."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        log = os.open(f"{exp_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        killer = Killer(exp_dir, event, number)
        killer.watch()
        train.quieten_lightning()
        train.main(["--exp_dir", exp_dir, *flags])
        Path(f"{exp_dir}.json").write_text(json.dumps(killer.counts))
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([run(*job) for job in jobs]))

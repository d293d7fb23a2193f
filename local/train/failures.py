"""What can end a run, told from the errors of the libraries that it meets."""

import re

from local.musdb18_tracks import SOURCES
from local.system import MusicSystem
from local.tools.command_line import brief


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no memory left, in the words of torch or cuBLAS."""
    words = "out of memory|can't allocate memory|STATUS_ALLOC_FAILED"
    told = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(told)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a rank found another one gone, in the words of gloo or NCCL."""
    words = (
        "[Cc]onnection (closed|reset|was likely closed)|[Bb]roken pipe"
        "|remote process exited|communicator was aborted"
    )
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error)))


def describe_lost_worker(error: BaseException, system: MusicSystem) -> str:
    """Which file a worker of a loader was reading when it ended, in a line; nothing where none did.

    The words of the error are those of torch.
    """
    told = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
    if not told:
        return ""
    for pid in map(int, told[1].split(",")):
        for dataset in (system.train_loader.dataset, system.val_loader.dataset):
            if found := dataset.reading.find(pid):
                track, source = dataset.tracks[found[0]], SOURCES[found[1]]
                return (
                    f"a process that loads items ended while it read {track.path(source)}; is the"
                    " file damaged, or was there no memory left? Fewer --num_workers need less"
                )
    return f"a process that loads items ended: {brief(error)}"


def advise_on_memory(system: MusicSystem) -> str:
    """The flags by which a run that was out of memory may fit."""
    if not system.training:
        return "out of memory in validation; leave the longest tracks out, with --valid_tracks"
    training, segment = system.config["training"], system.config["data"]["segment"]
    batch, aggregate = training["batch_size"], training["aggregate"]
    flags = ["--memory most", "--precision bf16-mixed", f"--segment below {segment}"]
    if batch > 1:
        less = batch // 2 if batch % 2 == 0 else 1
        more = batch * aggregate // less  # as many items to an optimizer step
        flags.append(f"--batch_size {less} --aggregate {more} (now {batch} and {aggregate})")
    return (
        f"out of memory in training; these need less: {', '.join(flags)}; a run that has begun goes"
        " on with them and --resume_with_changes"
    )

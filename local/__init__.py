"""The recipe's parts; `from local import ConvTasNetStereo` loads what it names, and no more."""

from importlib import import_module

from local.tools import asteroid_guard

__version__ = "1.0.0"
EXPORTS = {
    "ConvTasNetStereo": "local.tasnet",
    "StreamingConvTasNet": "local.streaming",
    "SegmentDataset": "local.musdb18_dataset",
    "TrackDataset": "local.musdb18_dataset",
    "MusicSystem": "local.system",
}
__all__ = list(EXPORTS)

asteroid_guard.install()


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)

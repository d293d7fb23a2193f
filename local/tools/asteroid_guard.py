"""Lets asteroid be imported whether torchaudio loads, is missing, or fails.

asteroid imports torchaudio (through torch_stoi) for a loss that this recipe never calls, and
torchaudio refuses to load beside many torch builds: OSError beside a CPU-only one, RuntimeError
beside another CUDA. asteroid has a fallback of its own for a missing torch_stoi.
"""

import importlib
import sys


class _Guard:
    """Finds torch_stoi missing where torchaudio cannot be imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch_stoi":
            try:
                importlib.import_module("torchaudio")
            except Exception:
                raise ModuleNotFoundError("torchaudio cannot be imported", name=name) from None
        return None  # whatever else there is finds it


def install() -> None:
    """Takes effect when torch_stoi is imported; importing nothing until then."""
    if _Guard not in sys.meta_path:
        sys.meta_path.insert(0, _Guard)

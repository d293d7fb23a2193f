"""The challenge's hearing aid: a multiband compressor for each ear of a listener."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from local.tools.command_line import UserError, suggest

CROSSOVERS = [353.55, 707.11, 1414.21, 2828.43, 5656.85]  # Hz
# Of the six bands; ratios and gains are the listener's.
BANDS = dict(
    attack=[11, 11, 14, 13, 11, 11],  # ms
    release=[80, 80, 80, 80, 100, 100],  # ms
    threshold=[-30] * 6,  # dB
)
LUFS = -40.0  # of the music that the gains are meant for
PARAMETERS = ("cr_l", "gain_l", "cr_r", "gain_r")
BYTES = 200  # that it takes for a sample of a song (176 with pyClarity 0.9.0)


class Ear(NamedTuple):
    """Of a listener, for each band."""

    ratios: list[float]
    gains: list[float]  # dB


class Listener(NamedTuple):
    left: Ear
    right: Ear

    def compress(self, remix: np.ndarray, rate: int) -> np.ndarray:
        """(1 or 2, T) -> (2, T): a mono remix reaches both ears."""
        sides = np.broadcast_to(remix, (2, remix.shape[-1]))
        return np.stack([_compress(side, ear, rate) for side, ear in zip(sides, self, strict=True)])


def _compress(samples: np.ndarray, ear: Ear, rate: int) -> np.ndarray:
    from clarity.enhancer.multiband_compressor import MultibandCompressor

    compressor = MultibandCompressor(CROSSOVERS, rate)
    compressor.set_compressors(**BANDS, ratio=ear.ratios, makeup_gain=ear.gains)
    return compressor(signal=samples.astype(np.float64))[0]


def find_compressor_fault() -> str:
    """Why there is no compressor, in a line; "" if there is one."""
    try:
        import clarity.enhancer.multiband_compressor  # noqa: F401
    except ImportError as error:
        return f"the compressor is pyClarity's: pip install pyclarity ({error})"
    return ""


def load_listener(metadata: Path, name: str) -> Listener:
    """Read a listener from the compressor_params files of the challenge in a folder.

    Raises:
        UserError: the files cannot be read, lack the listener, or hold other values.
    """
    files = sorted(metadata.glob("compressor_params.*.json"))
    if not files:
        raise UserError(f"--metadata: {metadata} holds no compressor_params.SPLIT.json")
    listeners = {}
    for file in files:
        listeners |= read_json(file)
    if name not in listeners:
        raise UserError(f"--listener: {metadata} has no {name}{suggest(name, listeners)}")
    try:
        return make_listener(listeners[name])
    except ValueError as error:
        raise UserError(f"--listener {name}: {error}") from None


def make_listener(values) -> Listener:
    """A listener from an entry of compressor_params.

    Raises:
        ValueError: it holds something else than six numbers for each of PARAMETERS.
    """
    for key in PARAMETERS:
        found = values.get(key) if isinstance(values, dict) else None
        is_list = isinstance(found, list) and len(found) == len(CROSSOVERS) + 1
        if not is_list or not all(map(is_number, found)):
            raise ValueError(f"{key} must be {len(CROSSOVERS) + 1} numbers, got {found}")
    ratios_l, gains_l, ratios_r, gains_r = map(values.get, PARAMETERS)
    if min(*ratios_l, *ratios_r) <= 0:
        raise ValueError("cr_l and cr_r must be above 0")
    return Listener(Ear(ratios_l, gains_l), Ear(ratios_r, gains_r))


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object in braces")
    return content

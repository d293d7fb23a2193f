"""Spectrograms of signals of one track, below one another."""

import numpy as np

WINDOW = 0.046  # seconds, about: 2048 samples at 44.1 kHz
RANGE = 80  # dB below the loudest that are told apart
HIGHEST = 10_000  # Hz
SILENCE = 1e-20  # power: else that of silence would have no logarithm


def draw_spectrograms(signals: dict[str, np.ndarray], rate: int):
    """A matplotlib figure, with a panel per signal and one scale for all.

    Args:
        signals: name -> (T, channels), whose mean over channels is shown.
    """
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.mlab import specgram

    figure = Figure(figsize=(9, 0.5 + 1.9 * len(signals)), dpi=100, layout="constrained")
    panels = figure.subplots(len(signals), sharex=True, squeeze=False)[:, 0]
    window = 2 ** round(np.log2(WINDOW * rate))
    powers = {
        name: specgram(samples.mean(1), window, rate, noverlap=window // 2)[0]
        for name, samples in signals.items()
    }
    levels = {name: 10 * np.log10(power + SILENCE) for name, power in powers.items()}
    loudest = max(map(np.max, levels.values()))
    for panel, (name, level) in zip(panels, levels.items(), strict=True):
        seconds = len(signals[name]) / rate
        image = panel.imshow(
            level - loudest,
            vmin=-RANGE,
            vmax=0,
            cmap="magma",
            aspect="auto",
            origin="lower",
            extent=(0, seconds, 0, rate / 2000),
        )
        panel.set_ylim(0, min(rate / 2, HIGHEST) / 1000)
        panel.set_ylabel(f"{name}\nfrequency in kHz")
    panels[-1].set_xlabel("time in seconds")
    figure.colorbar(image, ax=panels, label="level in dB, 0 is the loudest")
    return figure

"""What a model does, how it is used, and what it is for, as sections of its card."""

from local.musdb18_tracks import SOURCES, TARGETS
from local.share.facts import Facts
from local.tasnet import ConvTasNetStereo

FETCHED = 'snapshot_download("{place}")'
SAMPLE = """\
With `pip install torch huggingface_hub`; the model's code is here beside its weights, in `local/`:

```python
import sys

import torch
{fetch}
sys.path.insert(0, folder)
from {module} import {name}

model = {name}.from_pretrained(folder).eval()
mixture = torch.randn(1, {channels}, 10 * {rate})  # your song: (batch, channels, samples), {rate} Hz
with torch.inference_mode():
    {sources} = model(mixture)[0]  # each (channels, samples)
```

With the recipe itself, files of any format, length and sampling rate are separated, in bounded memory:

```bash
python -m local.separate SONG.mp3 --checkpoint {place}
```
"""
CADENZA = """
The weights also load in the Cadenza project's own class of that name (`recipes/cad2/task1` of
[clarity](https://github.com/claritychallenge/clarity)), and so in the challenge's baseline.
"""
LIMITS = """\
- Meant for research on music separation and on making lyrics easier to understand for listeners with
  hearing loss. It was not tested with listeners, and is no medical device.
- It takes stereo at {rate} Hz. Other rates must be converted first; `local.separate` does.
- {sources}. Choirs, speech in music, and voices that are used as instruments may go either way.
- The estimates need not add up to the mixture, and have artefacts where voice and music overlap in
  time and frequency.
- {context}
- It was trained on {dataset}, and may do worse on music that is unlike it.{demo}
"""
DEMO = " **That is a demonstration of the recipe: for real music, use a model that was trained on it.**"


def describe_model(facts: Facts) -> str:
    """Return the title of the card."""
    model, kind = facts.model, type(facts.model).__name__
    if isinstance(model, ConvTasNetStereo):
        kind = f"Stereo ConvTasNet, {'causal' if model.causal else 'non-causal'}"
    return f"{kind}: {_join(list_sources(facts))}"


def describe_way(facts: Facts) -> str:
    """Return the first paragraph: what the model separates."""
    model = facts.model
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    first = (
        f"Separates stereo music at {model.samplerate:,} Hz into {_join(list_sources(facts))}, for"
        f" lifting the lyrics. It has {millions:.2f} million parameters."
    )
    if not isinstance(model, ConvTasNetStereo):
        return first
    norm = "no normalisation" if model.norm_type == "id" else model.norm_type
    second = f" A convolutional mask estimator on a learned filterbank (Conv-TasNet), {norm};"
    return f"{first}{second} {_describe_delay(model)}."


def _describe_delay(model: ConvTasNetStereo) -> str:
    if not model.causal:
        return "non-causal, so it needs the music that follows"
    if model.norm_type == "gLN":
        return "its convolutions are causal, but its norm (gLN) needs the whole input"
    delay = model.L - 1
    return (
        f"causal, so it can run while the music plays, {delay} samples"
        f" ({1000 * delay / model.samplerate:.1f} ms) behind it"
    )


def describe_use(facts: Facts, place: str, is_repo: bool) -> str:
    """Return samples that run.

    Args:
        place: the repository that holds the model, or the name of its folder.
    """
    fetch = f'\nfolder = "{place}"  # where this folder is\n'
    if is_repo:
        fetch = "from huggingface_hub import snapshot_download\n\n"
        fetch += f'folder = snapshot_download("{place}")\n'
    kind = type(facts.model)
    text = SAMPLE.format(
        fetch=fetch.rstrip("\n"),
        module=kind.__module__,
        name=kind.__name__,
        channels=facts.model.audio_channels,
        rate=facts.model.samplerate,
        sources=", ".join(list_sources(facts)),
        place=place,
    )
    return text + CADENZA * (kind is ConvTasNetStereo)


def describe_limits(facts: Facts) -> str:
    """Return the section of the card."""
    return LIMITS.format(
        rate=facts.model.samplerate,
        sources=_describe_sources(facts),
        context=_describe_context(facts.model),
        dataset=facts.dataset,
        demo=DEMO * ("demo_musdb18" in facts.dataset),
    )


def _describe_sources(facts: Facts) -> str:
    if facts.model.C == len(SOURCES):
        return "It knows vocals, bass and drums; whatever else there is is *other*"
    return "Vocals are all singing voices together; the accompaniment is all the rest"


def _describe_context(model) -> str:
    causal = getattr(model, "causal", False)
    if getattr(model, "norm_type", "gLN") == "gLN":
        return (
            "Its norm (gLN) is taken over the whole input: the same second is separated a little"
            " differently in a window than in the whole song, and the memory of a whole song at once"
            " grows with its length."
        )
    end = "it can be run block by block." if causal else "of a whole song at once it takes much."
    return f"The memory it takes grows with the length of its input; {end}"


def list_sources(facts: Facts) -> tuple[str, ...]:
    """Return the names of what the model gives, in its order."""
    known = {len(TARGETS): TARGETS, len(SOURCES): SOURCES}
    return known.get(facts.model.C, tuple(f"source_{n}" for n in range(facts.model.C)))


def _join(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]

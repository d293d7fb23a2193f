"""What a model does, how it is used, and what it is for, as sections of its card."""

import shlex

from local.musdb18_tracks import SOURCES, TARGETS
from local.share.facts import Facts, name_sources
from local.tasnet import ConvTasNetStereo
from local.tools.markdown import escape

SAMPLE = """\
With `pip install "huggingface_hub[torch]"`. The model's code is beside its weights, in `local/`:

```python
import sys

import torch
{fetch}
sys.path.insert(0, folder)  # for its folder local
from {module} import {name}

model = {name}.from_pretrained(folder)
mixture = torch.randn(1, {channels}, 10 * {rate})  # your song, (batch, channels, samples)
with torch.inference_mode():
    {sources} = model(mixture)[0]  # (channels, samples) each
```

In the recipe's repository, for files of any format, length and sampling rate, in bounded memory:

```bash
python -m local.separate SONG.mp3 --checkpoint {place}
```
"""
FROM_HUB = """\
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}")"""
CADENZA = """
The weights also load in the class of that name that the challenge's baseline uses:
`recipes/cad2/task1/ConvTasNet` of [clarity](https://github.com/claritychallenge/clarity).
"""
LIMITS = """\
- Meant for research on music separation, and on lyrics that listeners with hearing loss can follow.
  It was not tested with listeners here, and is no medical device.
- It takes stereo at {rate:,} Hz. Other rates are converted first; `local.separate` does that.
- {sources}. Choirs, speech in music, and voices that are used as instruments may go either way.
- The estimates need not add up to the mixture, and have artefacts where sources overlap in time and
  frequency.
- {context}
- It was trained on {dataset}, and may do worse on music that is unlike it.
"""
DEMO = "**It was trained on synthetic songs, to show that the recipe works; expect little of it.**"
GLN = (
    "Its norm (gLN) is taken over the whole input, so the same second is separated a little"
    " differently in a window than in the whole song."
)


def describe_model(facts: Facts) -> str:
    """Return the title of the card."""
    model, kind = facts.model, type(facts.model).__name__
    if isinstance(model, ConvTasNetStereo):
        kind = f"Stereo ConvTasNet, {'causal' if model.causal else 'non-causal'}"
    return f"{kind}: {_join(name_sources(facts.model))}"


def describe_way(facts: Facts) -> str:
    """Return the first paragraph: what the model separates, and how."""
    model = facts.model
    count = sum(parameter.numel() for parameter in model.parameters())
    sentences = [
        f"Separates stereo music at {model.samplerate:,} Hz into {_join(name_sources(model))}, so"
        f" that the lyrics can be lifted. It has {count:,} parameters."
    ]
    if isinstance(model, ConvTasNetStereo):
        norm = "no norm" if model.norm_type == "id" else model.norm_type
        sentences.append(f"It is a Conv-TasNet with {norm}, {_describe_delay(model)}.")
    if facts.is_demo:
        sentences.append(DEMO)
    return " ".join(sentences)


def _describe_delay(model: ConvTasNetStereo) -> str:
    if not model.causal:
        return "non-causal: what it gives at a moment depends on the music that follows"
    if model.norm_type == "gLN":
        return "causal but for that norm, which is taken over the whole input"
    delay = model.L - 1
    return (
        f"causal: it can run while the music plays, {delay} samples"
        f" ({1000 * delay / model.samplerate:.1f} ms) behind it"
    )


def describe_use(facts: Facts, folder: str, repo: str | None) -> str:
    """Return samples that run.

    Args:
        folder: the name of the published folder.
        repo: that it is uploaded to, USER/NAME.
    """
    here = f"\nfolder = {folder!r}  # where this folder is"
    kind = type(facts.model)
    text = SAMPLE.format(
        fetch=FROM_HUB.format(repo=repo) if repo else here,
        module=kind.__module__,
        name=kind.__name__,
        channels=facts.model.audio_channels,
        rate=facts.model.samplerate,
        sources=", ".join(name_sources(facts.model)),
        place=repo or shlex.quote(folder),
    )
    loads_in_clarity = kind is ConvTasNetStereo and facts.model.C == len(TARGETS)
    return text + CADENZA * loads_in_clarity


def describe_limits(facts: Facts) -> str:
    """Return the section of the card."""
    has_gln = getattr(facts.model, "norm_type", "") == "gLN"
    return LIMITS.format(
        rate=facts.model.samplerate,
        sources=_describe_sources(facts),
        context=f"{GLN} " * has_gln + "The memory that it takes grows with the input.",
        dataset=escape(facts.dataset),
    )


def _describe_sources(facts: Facts) -> str:
    if facts.model.C == len(SOURCES):
        return "It knows vocals, bass and drums, and calls the rest *other*"
    return "Vocals are all singing voices together; the accompaniment is the rest"


def _join(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]

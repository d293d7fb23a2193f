"""The model card: README.md of a published folder, with its front matter for the hub."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from local.eval.results import list_targets
from local.eval.score_files import METRICS
from local.share.facts import Facts
from local.share.licence import describe_licence, licence_fields
from local.share.results import count_seen, describe_scores
from local.share.scores import Scores
from local.share.training import describe_training
from local.share.usage import describe_limits, describe_model, describe_use, describe_way
from local.train.origin import MUSDB18

TAGS = ["audio", "audio-to-audio", "music-source-separation", "conv-tasnet"]
MIXIN_TAGS = ["model_hub_mixin", "pytorch_model_hub_mixin"]
CITATIONS = """\
- This recipe, "Stereo ConvTasNet for lyrics: an installable CAD2 recipe", version {version},
  commit {commit}.
- The model: Y. Luo and N. Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude
  Masking for Speech Separation", IEEE/ACM TASLP 27(8), 2019. Its stereo form: A. Défossez et al.,
  "Music Source Separation in the Waveform Domain", 2019, and the recipe of the Cadenza project
  (pyClarity) for the
  [Second Cadenza Challenge](https://cadenzachallenge.org/docs/cadenza2/intro).
- Training: M. Pariente et al., "Asteroid: the PyTorch-based audio source separation toolkit for
  researchers", Interspeech 2020.
"""
OF_MUSDB18 = """\
- The data: Z. Rafii et al., "The MUSDB18 corpus for music separation", 2017,
  [doi:10.5281/zenodo.1117372](https://doi.org/10.5281/zenodo.1117372).
"""
OF_SCORES = """\
- The scores: F.-R. Stöter, A. Liutkus and N. Ito, "The 2018 Signal Separation Evaluation Campaign",
  LVA/ICA 2018.
"""


def make_card(facts: Facts, scores: Scores | None, folder: str, repo: str | None) -> ModelCard:
    """Return the card of a model.

    Args:
        folder: the name of the published folder.
        repo: that it is uploaded to, USER/NAME.
    """
    name = repo.partition("/")[2] if repo else facts.exp_dir.resolve().name
    data = make_card_data(facts, scores, name)
    sections = {
        "How to use it": describe_use(facts, folder, repo),
        "How it was trained": describe_training(facts),
        "Scores": describe_scores(facts, scores),
        "Intended use and limits": describe_limits(facts),
        "Licence": describe_licence(facts),
        "How to cite": cite(facts, scores),
    }
    text = "\n\n".join(f"## {title}\n\n{body.strip()}" for title, body in sections.items())
    title = f"# {describe_model(facts)}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{describe_way(facts)}\n\n{text}\n")


def make_card_data(facts: Facts, scores: Scores | None, name: str) -> ModelCardData:
    """Return the front matter; `name` is that of the model in its model-index."""
    results = list_results(facts, scores) if scores else []
    return ModelCardData(
        pipeline_tag="audio-to-audio",
        tags=[*TAGS, *MIXIN_TAGS],
        base_model=facts.base_hub_name or None,
        # Without results the hub takes the name of the repository.
        **({"model_name": name, "eval_results": results} if results else {}),
        **licence_fields(facts),
    )


def list_results(facts: Facts, scores: Scores) -> list[EvalResult]:
    """Return the median over tracks of each target and metric; none where there is no score."""
    medians = scores.metrics
    values = {
        (target, metric): medians[f"{target}_{metric}_median"]
        for target in list_targets(scores.tracks)
        for metric in METRICS
    }
    is_unseen = not count_seen(facts, scores)
    return [
        EvalResult(
            task_type="audio-to-audio",
            task_name="music source separation",
            dataset_type="musdb18" if scores.dataset == MUSDB18 else "other",
            dataset_name=scores.dataset,
            dataset_split="test" if is_unseen else None,
            metric_type=metric.lower(),
            metric_name=f"{metric} of {target} in dB, median over tracks of medians over frames",
            metric_value=round(value, 3),
            metric_args={"method": scores.method},
        )
        for (target, metric), value in values.items()
        if value is not None
    ]


def cite(facts: Facts, scores: Scores | None) -> str:
    """Return the work that the model stands on."""
    text = CITATIONS.format(
        version=facts.infos.get("software_versions", {}).get("recipe", "unknown"),
        commit=facts.infos.get("commit", "unknown"),
    )
    return text + OF_MUSDB18 * bool(facts.licences) + OF_SCORES * bool(scores)

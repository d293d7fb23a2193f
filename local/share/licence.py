"""The licence of published weights: that of their data, and of the weights they started from."""

import re

from local.share.facts import Facts
from local.tools.markdown import escape

UNKNOWN = (
    "No licence of the training data is recorded ({dataset}). Ask whoever published this model"
    " before you use it."
)
DEMO = (
    "The training data are {dataset}, made by code under the MIT licence. No licence of these"
    " weights is recorded."
)


def licence_fields(facts: Facts) -> dict[str, str]:
    """Return what the front matter says of it: nothing where none is known."""
    if facts.licences:
        terms = facts.licences[0]
        name = re.sub(r"\W+", "-", f"{terms['title']} {terms['license']}".lower())
        link = terms["title_link"]
    elif facts.base_hub_name:
        name, link = "terms-of-the-base-model", f"https://huggingface.co/{facts.base_hub_name}"
    else:
        return {}
    return {"license": "other", "license_name": name, "license_link": link}


def describe_licence(facts: Facts) -> str:
    """Return the section of the card."""
    parts = [
        f"Training data: [{terms['title']}]({terms['title_link']}), by {terms['author']}:"
        f" **{terms['license']}**. The same holds for these weights."
        for terms in facts.licences
    ]
    if not parts:
        parts.append((DEMO if facts.is_demo else UNKNOWN).format(dataset=escape(facts.dataset)))
    if "base_model" in facts.infos:
        parts.append("They were started from the base model above, whose terms carry over to them.")
    return " ".join([*parts, "The code in `local/` is under the MIT licence (`local/LICENSE`)."])

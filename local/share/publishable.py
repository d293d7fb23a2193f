"""publish_dir/model.pth: the model as asteroid's recipes publish theirs."""

import os
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from local.share.facts import Facts
from local.share.scores import Scores
from local.tools.command_line import UserError

FOLDER = "publish_dir"
RECIPE = "CAD2 task 1, stereo ConvTasNet"


def save_for_asteroid(facts: Facts, scores: Scores | None) -> Path:
    """Write EXP/publish_dir/model.pth by asteroid's `save_publishable`, and return its path.

    Raises:
        UserError: it cannot be written.
    """
    from asteroid.models.publisher import save_publishable

    # asteroid writes links to author and licence.
    links = [
        dict.fromkeys(("author_link", "license_link"), terms["title_link"]) | terms
        for terms in facts.licences
    ]
    content = {"task": "music source separation", **facts.content, "licenses": links}
    content |= {"dataset": facts.dataset, "infos": dict(facts.infos)}
    metrics = scores.metrics if scores else {}
    folder = facts.exp_dir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            with redirect_stdout(StringIO()):  # advice to upload it to Zenodo
                conf = facts.infos.get("configuration", {})
                save_publishable(temporary, content, metrics, conf, RECIPE)
            os.replace(Path(temporary) / "model.pth", folder / "model.pth")
    except (OSError, RuntimeError) as error:  # torch.save raises the second on a full disk
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"EXP: {folder} cannot be written: {reason}") from None
    return folder / "model.pth"

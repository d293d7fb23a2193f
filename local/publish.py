"""A trained model to share: a folder for the Hugging Face hub, with its model card.

`python -m local.publish EXP` writes EXP/published: config.json, model.safetensors, a card with the
training, the scores and the licence (README.md), and the code that the model needs (local/). It is
also what `ConvTasNetStereo.from_pretrained` and every --checkpoint take. EXP/publish_dir/model.pth
is the same for asteroid. Nothing leaves this machine without --repo.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.tools.command_line import OneLineParser, clear_errors, raise_together


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.publish", description=__doc__)
    add = parser.add_argument
    add("exp_dir", type=Path, metavar="EXP", help="folder of the run, with best_model.pth")
    add(
        "--eval",
        type=Path,
        metavar="OUT",
        help="folder of eval.py with scores of best_model.pth, in EXP or as a path [the only one"
        " in EXP]",
    )
    add("--out", type=Path, metavar="FOLDER", help="folder to write [EXP/published]")
    add("--repo", metavar="USER/NAME", help="upload it to this repository of the hub [no upload]")
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        publish(args.exp_dir, args.eval, args.out or args.exp_dir / "published", args.repo)


def publish(exp_dir: Path, eval_dir: Path | None, out: Path, repo: str | None = None) -> None:
    """Write the published folder of a run, and print what is in it; with `repo`, upload it.

    Args:
        eval_dir: with the scores; None for the only one in `exp_dir`.
        out: replaced if it is a published folder that nobody has edited.

    Raises:
        UserError: lists the faults; nothing is written. Or the upload failed; `out` is complete.
    """
    from local.share.card import make_card
    from local.share.facts import read_facts
    from local.share.folder import find_folder_fault, write_folder
    from local.share.publishable import save_for_asteroid
    from local.share.results import summarise_scores
    from local.share.scores import find_scores
    from local.share.upload import describe_upload, find_repo_faults, upload

    faults = [fault for fault in [find_folder_fault(out)] if fault]
    raise_together(faults + (find_repo_faults(repo) if repo is not None else []))
    facts = read_facts(exp_dir)
    scores = find_scores(exp_dir, eval_dir, facts.sha256)
    card = make_card(facts, scores, out.resolve().name, repo)
    names = write_folder(out, facts, card)
    model_file = save_for_asteroid(facts, scores)
    print(f"{out}: model card, weights and code, for the hub and --checkpoint")
    print(f"{model_file}: the same for asteroid")
    print(f"scores: {summarise_scores(scores)}")
    print(f"licence: {card.data.license_name or 'none is recorded; name one in the card'}")
    if repo is None:
        print("Nothing was uploaded; --repo USER/NAME does that.")
        return
    print(f"Uploading {describe_upload(out, names, repo)}", flush=True)
    print(f"Uploaded to {upload(out, names, repo)}")


if __name__ == "__main__":
    main()

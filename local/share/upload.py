"""A published folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import constants, create_repo, get_token, upload_folder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from local.share.folder import CARD
from local.tools.command_line import UserError, brief


def find_repo_faults(repo: str) -> list[str]:
    """Return what is wrong with --repo, and whether there is no token, a line each."""
    faults = []
    try:
        validate_repo_id(repo)
        is_name = repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        faults.append(f"--repo: {repo!r} is no name of a repository; write USER/NAME")
    if not get_token():
        faults.append(
            "--repo needs a token of the hub that may write: set HF_TOKEN, or log in by"
            " `hf auth login`"
        )
    return faults


def describe_upload(folder: Path, names: list[str], repo: str) -> str:
    """Return what will be uploaded where."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    lines = [f"to {constants.ENDPOINT}/{repo}, {sum(sizes.values()) / 1e6:.1f} MB:"]
    return "\n".join(lines + [f"  {size:>12,} bytes  {name}" for name, size in sizes.items()])


def upload(folder: Path, names: list[str], repo: str) -> str:
    """Upload files of a folder to a repository, which is made where there is none, as one commit.

    Returns:
        the address of the repository.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    try:
        address = create_repo(repo, exist_ok=True)
        upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"{CARD}, weights and code by local.publish",
        )
    except Exception as error:  # of several kinds, of the hub's client and those below it
        raise UserError(
            f"--repo: the upload to {constants.ENDPOINT}/{repo} failed: {brief(error)}; {folder} is"
            " complete, and the same command tries again"
        ) from None
    return str(address)

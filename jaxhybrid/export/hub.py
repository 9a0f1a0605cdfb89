"""An exported folder on the Hugging Face hub: only when asked for by name, and only with a token."""

from pathlib import Path

from jaxhybrid.checksums import verify
from jaxhybrid.errors import ConfigError, DamageError, RunError
from jaxhybrid.families.student import is_student
from jaxhybrid.weights.huggingface import HUB_ID


def require_token(repository: str) -> None:
    """Before hours of work: raises ConfigError without a token, or for a name that is none of a repository."""
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repository):
        raise ConfigError(f"--push-to-hub {repository}: name a repository as owner/name.")
    if get_token() is None:
        raise ConfigError(
            f"--push-to-hub {repository}: no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, repository: str) -> str:
    """Uploads an export to a repository, which is made, private, where there is none; its address.

    The hub takes all files in one commit, so a reader never sees half of them. Files that are in the repository and
    not in the folder stay there.

    Raises:
        ConfigError: no token, or `folder` is no export.
        RunError: a file is damaged, or the hub refuses.
    """
    from huggingface_hub import HfApi

    require_token(repository)
    if not is_student(folder):
        raise ConfigError(f"{folder} is not an exported folder; nothing was sent.")
    try:
        verify(folder)
    except DamageError as error:
        raise RunError(f"{error}; nothing was sent. Export it again.") from error
    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of jaxhybrid")
    except OSError as error:  # the hub's own errors are OSErrors
        raise RunError(f"{repository} on the hub did not take {folder}: {error}") from error
    return str(commit.commit_url)

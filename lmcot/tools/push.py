"""`lmcot push` puts a trained policy into a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lmcot import run_files
from lmcot.config import read_config
from lmcot.config.stages import most_trained
from lmcot.errors import UserError, first_line
from lmcot.monitor.progress import say
from lmcot.run.model_card import card
from lmcot.storage import on_disk, reaching

if TYPE_CHECKING:
    from lmcot.storage import Place

_LOG_IN = "log in by 'hf auth login', or set HF_TOKEN to a token that may write there"


def push(
    run: Place, repository: str, *, policy: str | None, private: bool, licence: str | None
) -> None:
    """Uploads a policy with its model card, in one commit; the repository is made if need be.

    Args:
        repository: such as ``me/my-guide``.
        policy: None: the most trained one.
        licence: of the weights, as the hub writes it; None: as the card has it.

    Raises:
        UserError: if the run has no such policy, or the hub refuses it or cannot be reached.
    """
    with reaching(run):
        run_files.check_format(run)
        policy = policy or most_trained(run)
        if policy is None or not run_files.holds_model(run / policy):
            raise UserError(
                f"'{run}' holds no policy{'' if policy is None else f' {policy!r}'} to push: train "
                "one, or name another by --policy"
            )
    with on_disk(run / policy) as folder:
        file = folder / run_files.CARD
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        else:  # of a version without cards
            text = card(read_config(run / run_files.CONFIG), policy, {})
        address = _upload(folder, with_licence(text, licence), repository, private)
    say(f"pushed '{policy}' of '{run}' to {address}")


def with_licence(text: str, licence: str | None) -> str:
    """A card whose front matter and last section name the licence, if one is given."""
    if licence is None:
        return text
    _, front, body = text.split("---\n", 2)
    values = {**yaml.safe_load(front), "license": licence}
    body = re.sub(r"(?<=## Licence\n\n).*", f"The licence of the weights is `{licence}`.", body)
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n{body}"


def _upload(folder: Path, card_text: str, repository: str, private: bool) -> str:
    """Commits the folder's files, and gives the repository's address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    operations = [
        CommitOperationAdd(name, card_text.encode() if name == run_files.CARD else path)
        for name, path in {**files, run_files.CARD: folder}.items()
    ]
    api = HfApi(library_name="lmcot")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Upload by lmcot push")
    except HFValidationError as error:
        raise UserError(f"--repo '{repository}' is no repository: {first_line(error)}") from None
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"'{repository}' cannot be pushed to ({first_line(error)})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = _LOG_IN if status in (401, 403) else "the same command tries again"
        raise UserError(
            f"the hub refused the push to '{repository}' ({first_line(error)}): {remedy}"
        ) from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"the hub cannot be reached ({first_line(error)}): check the network and HF_ENDPOINT; "
            "the same command tries again"
        ) from None
    return str(address)

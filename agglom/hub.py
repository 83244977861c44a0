"""An export onto the Hugging Face hub, with the library's own client and its token."""

from __future__ import annotations

import re
from pathlib import Path

from agglom.errors import UserError, brief


def push(folder: Path, name: str, *, private: bool = False, run: Path | None = None) -> str:
    """Upload an export as one commit of a model repository, which is made where there is none.

    `timm.create_model("hf-hub:NAME", pretrained=True)` loads it from there. The token is the one that
    `hf auth login` or HF_TOKEN has left; HF_ENDPOINT names another hub.

    Args:
        folder: the export.
        name: of the repository, USER/NAME or NAME.
        private: of a repository that is made.
        run: the run directory that the export came from, for the card.

    Returns:
        the address of the commit.

    Raises:
        UserError: no token or one that may not write, a name that the hub doesn't take, or no hub that answers.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from agglom.export import note

    api = HfApi(library_name="agglom")
    where = f"push_to_hub: {name}"
    if get_token() is None:
        raise UserError(f"{where}: no token; valid: one that may write; run `hf auth login`, or set HF_TOKEN")
    try:
        found = api.create_repo(name, exist_ok=True, private=private)
        note(folder, run, hub=found.repo_id)
        message = "An export of agglom"
        return str(api.upload_folder(repo_id=found.repo_id, folder_path=folder, commit_message=message).commit_url)
    except HFValidationError as err:
        raise UserError(f"{where}: {_plain(err)}; valid: USER/NAME of letters, digits, -, _ and .") from err
    except LocalTokenNotFoundError as err:
        raise UserError(f"{where}: no token; run `hf auth login`, or set HF_TOKEN") from err
    except HfHubHTTPError as err:
        code = err.response.status_code if err.response is not None else 0
        if code in (401, 403):
            raise UserError(
                f"{where}: the hub refuses the token ({code}); valid: one that may write there; run `hf auth login`"
            ) from err
        raise UserError(f"{where}: the hub answers {code or 'nothing'} ({_plain(err)}); try again later") from err
    except (OSError, RuntimeError, ValueError) + _transport() as err:
        raise UserError(f"{where}: {api.endpoint} can't be used ({_plain(err)}); the export is in {folder}") from err


def _transport() -> tuple[type[Exception], ...]:
    """What the client's HTTP library raises where no hub answers; which library that is, its version decides."""
    from importlib import import_module

    found: list[type[Exception]] = []
    for name, error in (("httpx2", "HTTPError"), ("httpx", "HTTPError"), ("requests", "RequestException")):
        try:
            found.append(getattr(import_module(name), error))
        except ImportError:
            continue
    return tuple(found)


def _plain(error: Exception) -> str:
    """An error's words without anything that looks like a token."""
    from huggingface_hub import get_token

    text = re.sub(r"hf_\w+", "hf_***", brief(error, 300))
    token = get_token()
    return text.replace(token, "***") if token else text

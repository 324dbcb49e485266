"""A finished adapter, warm start or merged model put on the hub, with a card that it takes.

    d2lora publish adapter me/titles --scores scores --private
    d2lora publish adapter me/titles --dry-run

The token and the hub's address are those of huggingface_hub: `hf auth login` or HF_TOKEN, and
HF_ENDPOINT.
"""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from d2lora.adapters.base_files import hub_id
from d2lora.adapters.card import CARD_FILE, Published
from d2lora.errors import D2LoraError, RunError, SettingsError, counted, first_line
from d2lora.runtime.console import Reporter, table_console
from d2lora.settings import PublishSettings
from d2lora.tools.publication import Content, Finished, read_scores, with_about

_REPO = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?!\.))*/[A-Za-z0-9_](?:[\w-]|\.(?!\.))*", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


@dataclass(frozen=True)
class Publication:
    """What was sent, or would be."""

    repo: str
    files: dict[str, int]
    """Name -> bytes."""
    card: str
    url: str | None
    """Of the commit; None for a dry run."""
    notes: tuple[str, ...]
    """What the card leaves out and why, and what a dry run could not check."""


def publish(settings: PublishSettings) -> Publication:
    """Upload an adapter, a warm start or a merged model to the hub, or show what would be.

    Raises:
        SettingsError: If the repository's name, the scores or the token are not what they must be.
        RunError: If the folder holds an unfinished run, or the hub refuses or is not reached.
        ModelError: If the folder holds nothing to publish.
    """
    _check_repo(settings.to, "owner/name")
    if settings.base_id is not None:
        _check_repo(settings.base_id, "the base's hub id as --base-id owner/name")
    _check_license(settings.license)
    model = Finished.read(settings.folder)
    scores = read_scores(settings.scores, model)
    api, notes = HfApi(), list[str]()
    base_id = settings.base_id or hub_id(model.manifest.base.id)
    try:
        with _hub():
            _check_token(api, settings.to)
            base_id = _on_hub(api, base_id)
    except _NotAskedError as error:
        if not settings.dry_run:
            raise
        notes.append(f"not checked on the hub: {first_line(error)}")
    if base_id is None:
        notes.append(
            f"the card names no base: {model.manifest.base.id or 'the base'} is no model of the "
            "hub; give its hub id as --base-id"
        )
    published = Published(settings.to, base_id, settings.license, scores)
    files = model.files(with_about(published, settings.about))
    url = None if settings.dry_run else _send(api, settings, files)
    content = files[CARD_FILE]
    assert isinstance(content, bytes)
    sizes = {name: _size(content) for name, content in files.items()}
    return Publication(settings.to, sizes, content.decode(), url, tuple(notes))


def _check_repo(name: str, expected: str) -> None:
    ends = name.endswith((".git", ".ipynb", "-", "."))
    if ends or "--" in name or len(name) > 96 or not _REPO.fullmatch(name):
        raise SettingsError(
            f"expected {expected}: letters, digits, `-`, `_` and `.`, at most 96 characters; "
            f"found {name!r}"
        )


def _check_license(name: str | None) -> None:
    """Check that a license has the form of the hub's identifiers; which there are it knows."""
    if name is not None and not _LICENSE.fullmatch(name):
        raise SettingsError(
            f"expected an identifier of the hub as --license, such as apache-2.0 or cc-by-4.0; "
            f"found {name!r}"
        )


class _NotAskedError(RunError):
    """The hub could not be asked."""


@contextmanager
def _hub() -> Generator[None]:
    """Turn what may go wrong with the hub into a message.

    Raises:
        SettingsError: Where the hub refuses the token.
        RunError: Where it refuses something else, there is no token, or it is not reached.
    """
    endpoint = HfApi().endpoint
    try:
        yield
    except D2LoraError:
        raise
    except LocalTokenNotFoundError:
        raise _NotAskedError(
            "no token of the hub: `hf auth login` keeps one, or set HF_TOKEN"
        ) from None
    except OfflineModeIsEnabled:
        raise _NotAskedError("HF_HUB_OFFLINE is set: unset it to publish") from None
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise SettingsError(
                f"{endpoint} refused the token: `hf auth login` keeps another, or set HF_TOKEN"
            ) from None
        reason = error.server_message or first_line(error)
        raise RunError(f"{endpoint} refused ({error.response.status_code}): {reason}") from None
    except (HTTPError, OSError) as error:
        raise _NotAskedError(f"{endpoint} cannot be reached: {first_line(error)}") from None
    except RuntimeError as error:  # a file that could not be uploaded, and why
        reason = first_line(error.__cause__ or error)
        raise RunError(f"{endpoint}: {first_line(error)} {reason}") from None
    except ValueError as error:  # what the hub found wrong in the card, among others
        raise RunError(f"{endpoint} refused: {' '.join(str(error).split())}") from None


def _check_token(api: HfApi, repo: str) -> None:
    """Check that there is a token, and that it may write where the repository is to be."""
    if get_token() is None:
        raise LocalTokenNotFoundError
    who: dict[str, Any] = api.whoami()
    owners = [who["name"], *(group["name"] for group in who.get("orgs", []))]
    owner = repo.partition("/")[0]
    if owner.lower() not in {name.lower() for name in owners}:
        raise SettingsError(
            f"{repo}: the token is of {who['name']}, who cannot write to {owner}; "
            f"choose one of {', '.join(owners)}, or another token"
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise SettingsError(f"the token of {who['name']} can only read: make one that can write")


def _on_hub(api: HfApi, base_id: str | None) -> str | None:
    """Return a base's hub id where the hub has such a model: the card must not name a folder."""
    if base_id is None:
        return None
    try:
        api.model_info(base_id)
    except GatedRepoError:
        return base_id  # it is there, behind a form
    except RepositoryNotFoundError:
        return None
    return base_id


def _send(api: HfApi, settings: PublishSettings, files: Mapping[str, Content]) -> str:
    """Make the repository where it is not there, and commit the files at once; return its URL."""
    repo = settings.to
    with _hub():
        api.create_repo(repo, private=settings.private or None, exist_ok=True)
        if settings.private and not api.model_info(repo).private:
            raise SettingsError(
                f"{repo} is there already and public; make it private in its settings on the hub, "
                "leave out --private, or choose another name"
            )
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        message = f"{settings.folder.resolve().name}, by d2lora"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def command(settings: PublishSettings) -> None:
    """Run `d2lora publish`."""
    done = publish(settings)
    reporter = Reporter()
    if settings.dry_run:
        table_console().print(done.card, markup=False)
    for name, size in done.files.items():
        reporter.say(f"{size:>14,} bytes  {name}")
    for note in done.notes:
        reporter.say(f"note: {note}")
    n_files = counted(len(done.files), "file")
    if done.url is None:
        reporter.say(f"{n_files} would be sent to {done.repo}; nothing was sent")
    else:
        reporter.say(f"{n_files} sent to {done.url}")

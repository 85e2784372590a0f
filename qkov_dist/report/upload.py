"""A finished run on the Hugging Face hub: its heatmap, page, figures, configuration and a card, in one commit.

Without a word to the contrary nothing of the samples' texts leaves the machine, nor the folders of paths: what is
uploaded is a copy of ``heatmap.h5`` that is written anew without them, and a page of that copy. Ids, lengths, losses
and hashes of samples stay, for the numbers rest on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from qkov_dist.console import Say
from qkov_dist.errors import QkovError
from qkov_dist.results.heatmap_file import HEATMAP_FILE, heatmap_path
from qkov_dist.values import readable

from .card import make_card
from .logged import Found, load_run, pictures
from .shareable import pages_of, without_texts

REPO_TYPES = ("dataset", "model")
Files = Mapping[str, Path | bytes]


@dataclass(frozen=True)
class Target:
    """Where a run is uploaded to.

    Attributes:
        repo_id: Hub id, ``name/repository``, or a repository of one's own by its name.
        repo_type: One of ``REPO_TYPES``.
        revision: A branch, made where there is none; None is the main one.
        is_private: Whether a repository that is made now is private; else it is what the account's default says.
    """

    repo_id: str
    repo_type: str = "dataset"
    revision: str | None = None
    is_private: bool = False

    def check(self) -> None:
        """Refuse an id that no repository can have; nobody is asked."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise QkovError(
                "HUB_ID",
                expected="a hub id, such as name/heatmap-of-my-model",
                got=readable(self.repo_id),
                remedy=readable(str(error)),
            ) from None


def push(place: str | Path, target: Target, say: Say, *, with_texts: bool = False) -> str:
    """Upload a finished run; returns where it lies. The run's folder is not changed.

    Args:
        place: The run's folder, or its heatmap's file.
        target: Where to.
        say: Takes a line about each stage.
        with_texts: Whether samples' texts, and paths as they are, go along.

    Raises:
        QkovError: for a run that is not finished, an id that is none, and whatever the hub or the network refuses.
    """
    target.check()
    path = heatmap_path(place)
    run = load_run(path)
    with TemporaryDirectory(prefix="qkov-push-") as folder:
        if with_texts:
            file = path
        else:
            run, file = without_texts(run), Path(folder) / HEATMAP_FILE
            say("writing a copy without samples' texts")
            run.save(file)
        files: Files = {HEATMAP_FILE: file, **pages_of(run), **_more_files(run, say)}
        say(f"uploading {', '.join(files)} and a card to the {target.repo_type} {target.repo_id}")
        with _hub_errors(target):
            return _commit(files, run, target, with_texts=with_texts)


def _more_files(run: Found, say: Say) -> Files:
    """Figures, where they can be drawn, and the configuration, where the file knows it."""
    files: dict[str, Path | bytes] = {}
    config = run.attributes.get("config")
    if isinstance(config, Mapping):
        files["config.yaml"] = yaml.safe_dump(config, allow_unicode=True, sort_keys=False).encode()
    try:
        files |= {f"figures/{name}.png": content for name, content in pictures(run).items()}
    except ModuleNotFoundError as error:
        say(f"no figures: {error.name} is not installed. Run: pip install 'qkov-dist[report]'")
    return files


def _commit(files: Files, run: Found, target: Target, *, with_texts: bool) -> str:
    """Make the repository where there is none, and all files in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo_type, branch = HfApi(), target.repo_type, target.revision
    private = True if target.is_private else None
    repository = api.create_repo(target.repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if branch is not None:
        api.create_branch(repository.repo_id, branch=branch, repo_type=repo_type, exist_ok=True)
    card = make_card(run, repository.repo_id, repo_type, branch, has_texts=with_texts)
    contents = {**files, "README.md": card.encode()}
    api.create_commit(
        repository.repo_id,
        [CommitOperationAdd(name, content) for name, content in contents.items()],
        commit_message=f"Heatmap of {run.title}",
        repo_type=repo_type,
        revision=branch,
    )
    return str(repository)


@contextmanager
def _hub_errors(target: Target) -> Iterator[None]:
    """What the hub or the network refuses, as one message."""
    from huggingface_hub.errors import HfHubHTTPError

    of_requests: Any = HfHubHTTPError.__mro__[1]  # of httpx, whichever the hub's library uses
    try:
        yield
    except (of_requests, OSError, RuntimeError, ValueError) as error:
        raise _refused(target, error) from error


def _refused(target: Target, error: BaseException) -> QkovError:
    """By the status of the answer, of the first error that has one."""
    causes = [error, *filter(None, [error.__cause__, error.__context__])]
    status = next((code for cause in causes if (code := _status(cause)) is not None), None)
    got = readable(" ".join(str(getattr(error, "server_message", None) or error).split()))
    where = f"{target.repo_type} {target.repo_id}"
    login = "Run `hf auth login`, or set HF_TOKEN to a token that may write."
    expected, remedy = {
        401: ("a token that the hub knows", login),
        403: ("a token that may write there", f"{login} Or name a repository of your own."),
        404: ("a repository that there is, or that may be made", "Check HUB_ID, --repo-type and --revision."),
        None: ("the hub to answer", "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."),
    }.get(status, ("the hub to take the files", "See what it says."))
    answer = got if status is None else f"{status}: {got}"
    return QkovError(where, expected=expected, got=answer, remedy=f"{remedy} The run's folder is as it was.")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)

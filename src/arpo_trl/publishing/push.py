"""Pushing a run to the Hub: known to work before training, never able to harm it, and repeatable afterwards.

    start   the repository is made, or found, and may be written to; else `ConfigError`
    saves   with `hub_strategy` other than "end": a snapshot goes up in the background; a failure is a warning
    end     model, card and the rest are on disk before anything is sent; a failure is a `HubError` with the command
            that pushes later

What goes up is a snapshot: files of a finished save, held by hard links, so that neither training nor the rotation of
checkpoints changes them on the way. Nothing goes up that contains the value of a secret from the environment.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import stamina
from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http as hub_client

from arpo_trl.errors import ArpoError, ConfigError, DataError, HubError
from arpo_trl.net.http_client import without
from arpo_trl.publishing.model_card import ADAPTER_CONFIG_NAME, CURVES_FOLDER, Card
from arpo_trl.publishing.trajectory_dataset import dataset_card, export_rows
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

http: Any = getattr(hub_client, "httpx2", None) or hub_client.httpx
"""What the Hub's client is made of, and raises the errors of: httpx2 from huggingface_hub 2.0 on, httpx before."""
ANSWER_TIMEOUT_S = 180.0
"""Longest silence of the Hub; its client would wait for ever."""
ATTEMPTS = 3
_WAIT_S = 2.0
_KEPT_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".md", ".yaml", ".py"}
_KEPT_FOLDERS = (CURVES_FOLDER, "additional_chat_templates", "runs")  # the last is TensorBoard's
_DROPPED = {"training_args.bin"}  # a pickle that training_config.yaml says in words
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_SHORTEST_SECRET = 8


# Repositories --------------------------------------------------------------------------------------------------------


def prepare_repo(
    name: str, *, setting: str, private: bool | None = None, kind: str = "model", token: str | None = None
) -> str:
    """The full id of the repository `name`, which exists from now on and may be written to.

    Raises:
        ConfigError: it does not; names `setting`, which asked for it.
    """
    api = HfApi(token=token)
    try:
        repo_id: str = _retried(lambda: api.create_repo(name, repo_type=kind, private=private, exist_ok=True).repo_id)
        # Creating one that exists passes without the right to write to it.
        _retried(lambda: api.auth_check(repo_id, repo_type=kind, write=True))
        return repo_id
    except Exception as error:  # whatever the client comes up with: the run must not start
        raise ConfigError(
            f"{setting} asks for the {kind} repository {name!r}, but {reason_of(error)}. Set HF_TOKEN to a token that "
            f"may write there (or log in with `hf auth login`), set {setting} to a repository of yours, or train "
            "without pushing and run `arpo-trl push` afterwards."
        ) from None


def _retried(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, tried again while it fails in a way that may pass."""
    _limit_silence()
    for attempt in stamina.retry_context(
        on=_may_pass, attempts=ATTEMPTS, timeout=None, wait_initial=_WAIT_S, wait_max=30.0
    ):
        with attempt:
            return ask()
    raise AssertionError("unreachable")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # how the client reports a file's upload
        return _may_pass(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    # A gateway's page in place of an answer is no JSON.
    return isinstance(error, (http.TransportError, json.JSONDecodeError))


@functools.cache
def _limit_silence() -> None:
    """Gives the Hub's client, which has no time limit of its own, one for silence: once, for the whole process."""

    def make() -> Any:
        client = hub_client.default_client_factory()
        client.timeout = http.Timeout(ANSWER_TIMEOUT_S)
        return client

    set_client_factory(make)


def reason_of(error: BaseException) -> str:
    """Why the Hub did not do what it was asked; without its answer's text, which can quote what it was sent."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return reason_of(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        meaning = {
            401: "the token is missing or not valid",
            403: "the token may not write there",
            404: "it does not exist, or this token does not see it",
        }
        return f"the Hub answered {status}" + (f": {meaning[status]}" if status in meaning else "")
    if isinstance(error, http.TransportError):
        return f"the Hub could not be reached ({type(error).__name__})"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub answered with something else than JSON"
    text = str(error)
    for secret in _secrets().values():
        text = without(secret, text)
    return f"{type(error).__name__}: {text}"


def _secrets() -> dict[str, str]:
    """What must be told to nobody, by the name of where it comes from."""
    found = {name: value.strip() for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    found["HF_TOKEN or `hf auth login`"] = get_token() or ""
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST_SECRET}


# Snapshots -----------------------------------------------------------------------------------------------------------


class Snapshot:
    """A folder in `run` with what a push sends: the model in `model`, and what `run` says of itself.

    Args:
        checkpoint: A checkpoint to send whole, and the folder in the repository it goes to.

    Raises:
        HubError: It cannot be written, for want of space say.
    """

    def __init__(self, run: Path, model: Path, checkpoint: tuple[Path, str] | None = None) -> None:
        self.run = run
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=".push-", dir=run))
            self._fill(model, checkpoint)
        except OSError as error:
            for left in run.glob(".push-*"):
                shutil.rmtree(left, ignore_errors=True)
            raise HubError(f"There is no snapshot of {model} to push: {error}.") from error

    def _fill(self, model: Path, checkpoint: tuple[Path, str] | None) -> None:
        run = self.run
        for source in dict.fromkeys((model, run)):
            for path in _top_files(source):
                # A file of the run's own folder may be of another save than the model's, which came first.
                if not (self.folder / path.name).exists() and (source == model or path.suffix not in _WEIGHTS):
                    _take(path, self.folder / path.name)
        if (run / "README.md").is_file():  # the run's card, not the one that peft writes into checkpoints
            _take(run / "README.md", self.folder / "README.md")
        for kept in _KEPT_FOLDERS:
            _take_tree(run / kept, self.folder / kept)
        if checkpoint is not None:
            _take_tree(checkpoint[0], self.folder / checkpoint[1])

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _top_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in _KEPT_SUFFIXES
        and path.name not in _DROPPED
        and not path.name.startswith(("_", "."))
    ]


def _take_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in _DROPPED:
            _take(path, target / path.relative_to(source))


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _WEIGHTS:  # large, and never written to again; other files may be, so they are copied
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without hard links
            pass
    shutil.copyfile(source, target)


def refuse_secrets(paths: Iterable[Path]) -> None:
    """Returns if none of these files, weights aside, contains a secret: the Hub's token or one of the environment.

    Raises:
        HubError: one does; names the file and where the secret comes from.
    """
    secrets = {name: value.encode() for name, value in _secrets().items()}
    for path in paths:
        content = b"" if path.suffix in _WEIGHTS or not path.is_file() else path.read_bytes()
        for name, value in secrets.items():
            if value in content:
                raise HubError(
                    f"{path.name} contains the secret in {name}, so nothing was pushed. "
                    "Remove it from the file, and find out how it got there."
                )


# Pushes --------------------------------------------------------------------------------------------------------------


def push_snapshot(
    repo_id: str, snapshot: Snapshot, *, message: str, token: str | None = None, revision: str | None = None
) -> Any:
    """The commit that has the snapshot, which is then removed.

    Raises:
        HubError: It could not be made; with what to do.
    """
    run = snapshot.run
    try:
        with snapshot as folder:
            refuse_secrets(folder.rglob("*"))
            return _retried(
                lambda: HfApi(token=token).upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision
                )
            )
    except ArpoError:
        raise
    except Exception as error:  # whatever the client comes up with: the run is whole on disk all the same
        raise HubError(
            f"Pushing to {repo_id} failed: {reason_of(error)}. The run is whole in {run}; push it later with: "
            f"arpo-trl push {shlex.quote(str(run))} --repo {shlex.quote(repo_id)}"
        ) from None


def push_trajectories(repo_id: str, run: Path, token: str | None = None) -> Any:
    """The commit that has the run's logged trajectories as a dataset, one row per leaf; None where none were logged.

    Raises:
        HubError: It could not be made; with what to do.
    """
    folder = run / "trajectories"
    logs = sorted(folder.glob("*-rank*.jsonl"))
    if not logs:
        return None
    command = f"arpo-trl push {shlex.quote(str(run))} --trajectories {shlex.quote(repo_id)}"
    try:
        refuse_secrets(logs)
        with tempfile.TemporaryDirectory(prefix=".push-", dir=run) as name:
            splits = export_rows(logs, Path(name) / "data")
            (Path(name) / "README.md").write_text(dataset_card(repo_id, splits), "utf-8")
            return _retried(
                lambda: HfApi(token=token).upload_folder(
                    repo_id=repo_id, repo_type="dataset", folder_path=name, commit_message="Trajectories"
                )
            )
    except ArpoError:
        raise
    except Exception as error:
        raise HubError(
            f"Pushing trajectories to {repo_id} failed: {reason_of(error)}. They are in {folder}; push them later "
            f"with: {command}"
        ) from None


def push_run(
    run: Path,
    repo: str | None,
    trajectories: str | None,
    *,
    evaluation: str | None = None,
    private: bool | None = None,
) -> list[str]:
    """The addresses of the commits that have a finished run's folder in `repo`, its trajectories in `trajectories`.

    Args:
        evaluation: A Markdown table of results for the card.

    Raises:
        DataError: there is nothing to push, or no card to put `evaluation` into.
        ConfigError: neither repository is named, or one cannot be written to.
        HubError: a push failed.
    """
    if repo is None and trajectories is None:
        raise ConfigError("There is nowhere to push to. Give --repo, --trajectories or both.")
    if repo is not None and not any((run / name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME)):
        raise DataError(f"{run} holds no model and no adapter. Give the output_dir of a run that has been saved.")
    if trajectories is not None and not list((run / "trajectories").glob("*.jsonl")):
        raise DataError(f"{run / 'trajectories'} holds no .jsonl file. Was trajectory_log_rate 0?")
    urls = []
    if repo is not None:
        repo_id = prepare_repo(repo, setting="--repo", private=private)
        card = Card.of(run, repo_id)
        if card is not None:
            dataclasses.replace(card, evaluation=evaluation or card.evaluation).write(run)
        elif evaluation is not None:
            raise DataError(f"{run} holds no training_config.yaml to make a card from. Leave out --evaluation.")
        urls.append(str(push_snapshot(repo_id, Snapshot(run, run), message="Upload a run").commit_url))
    if trajectories is not None:
        repo_id = prepare_repo(trajectories, setting="--trajectories", private=private, kind="dataset")
        urls.append(str(push_trajectories(repo_id, run).commit_url))
    return urls


class BackgroundPush:
    """One push at a time on a thread of its own, which ends with the process and whose failure is a warning."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, push: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                push()
            except Exception as error:  # training goes on
                logger.warning(f"{error} Training goes on; the next save tries again.")

        self.wait()
        self._thread = threading.Thread(target=run, name="arpo-push", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

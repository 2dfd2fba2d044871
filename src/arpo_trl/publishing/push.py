"""Pushes a run to the Hub. Access is checked before training. A failed push never stops training and can be repeated.

    start   creates or finds the repository and its branch, and checks write access; otherwise `ConfigError`
    saves   with `hub_strategy` other than "end": pushes a snapshot in the background; a failure is a warning
    end     saves all files to disk, then pushes; a failure is a `HubError` with the command that pushes later

A push sends a snapshot: copies of the files of a finished save, or hard links to them. So neither training nor the
rotation of checkpoints changes files during a push. A push fails if a file contains a secret of the environment.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import _http as hub_client

from arpo_trl.common.files import write_whole
from arpo_trl.common.retries import retry
from arpo_trl.common.run_files import ADAPTER_CONFIG, CURVES, EVALUATION, PICKLED_ARGUMENTS, TRAJECTORIES
from arpo_trl.errors import ArpoError, ConfigError, DataError, HubError
from arpo_trl.logs.trajectories import log_files
from arpo_trl.net.http_client import without
from arpo_trl.publishing.model_card import Card, drop_paths
from arpo_trl.publishing.trajectory_dataset import SPLITS, dataset_card, export_rows
from arpo_trl.visible import (
    SHORTEST_SECRET,
    forms_of,
    get_logger,
    is_ordinary,
    secrets_of_environment,
    without_secrets,
)

logger = get_logger(__name__)

http: Any = getattr(hub_client, "httpx2", None) or hub_client.httpx
"""The HTTP library of the Hub's client: httpx2 since huggingface_hub 2.0, httpx before. The client raises its
errors."""
ANSWER_TIMEOUT_S = 180.0
"""Timeout in seconds for each read from the Hub. Its client has none by default."""
ATTEMPTS = 3
_WAIT_S = 2.0
_KEPT_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".md", ".yaml", ".py"}
_KEPT_FOLDERS = (CURVES, "additional_chat_templates", "runs")  # the last is TensorBoard's
_STATE_OF_TRAINING = re.compile(
    rf"{re.escape(PICKLED_ARGUMENTS)}|arpo_state\.json|zero_to_(fp32|torch)\.py|(optimizer|pytorch_model_fsdp).*\.bin"
)
"""The files of a checkpoint that have a kept suffix and are not part of the model. FSDP saves the last two kinds."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
LAST_CHECKPOINT = "last-checkpoint"
"""The folder of the repository for the checkpoint that `hub_strategy: checkpoint` pushes."""
_REPLACED = [
    *(ADAPTER_CONFIG, EVALUATION),
    *(
        f"{name}{part}"
        for name, suffix in itertools.product(("model", "pytorch_model", "adapter_model"), ("safetensors", "bin"))
        for part in (f".{suffix}", f"-?????-of-?????.{suffix}", f".{suffix}.index.json")
    ),
]
"""Patterns of the files of an earlier model in a repository, which would be loaded with a new one, or instead of it.
They have no *, which also matches the / of other folders."""


# Repositories --------------------------------------------------------------------------------------------------------


def prepare_repo(
    name: str, *, setting: str, private: bool | None = None, kind: str = "model", token: str | None = None
) -> str:
    """Creates the repository `name` if it does not exist, and checks write access. Returns its full id.

    Raises:
        ConfigError: The repository cannot be created or is not writable. Names `setting`, which requires it.
    """
    api = HfApi(token=token)
    try:
        repo_id: str = _retried(lambda: api.create_repo(name, repo_type=kind, private=private, exist_ok=True).repo_id)
        # `create_repo` succeeds for an existing repository even without write access.
        _retried(lambda: api.auth_check(repo_id, repo_type=kind, write=True))
        return repo_id
    except HFValidationError as error:
        raise ConfigError(
            f"{setting} requires the {kind} repository {name!r}, which is no valid id ({str(error).rstrip('.')}). Set "
            f"{setting} to letters, digits, '-', '_' and '.', such as me/my-policy."
        ) from None
    except Exception as error:  # after any error of the client the run must not start
        raise ConfigError(
            f"{setting} requires the {kind} repository {name!r}, but {reason_of(error)}. Set HF_TOKEN to a token with "
            f"write access to it (or log in with `hf auth login`), set {setting} to your own repository, or train "
            "without pushing and run `arpo-trl push` afterwards."
        ) from None


def prepare_branch(repo_id: str, branch: str, *, setting: str, token: str | None = None) -> None:
    """Creates `branch`, from main, if the model repository has neither a branch nor a reference of this name.

    Raises:
        ConfigError: It cannot be created. Names `setting`, which requires it.
    """
    api = HfApi(token=token)
    try:
        if not _retried(lambda: api.revision_exists(repo_id, branch)):
            _retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    except Exception as error:  # any error of the client means no branch, as in `prepare_repo`
        raise ConfigError(
            f"{setting} requires the branch {branch!r} of {repo_id}, which cannot be created: {reason_of(error)}. Set "
            f"{setting} to the name of a branch, or omit it to push to main."
        ) from None


def _retried(ask: Callable[[], Any]) -> Any:
    """Returns the result of `ask`. Retries after temporary errors."""
    _limit_silence()

    @retry(on=_may_pass, attempts=ATTEMPTS, timeout=None, wait_initial=_WAIT_S, wait_max=30.0)
    def attempt() -> Any:
        return ask()

    return attempt()


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client wraps errors of file uploads
        return _may_pass(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    # A gateway may answer with an HTML page instead of JSON.
    return isinstance(error, (http.TransportError, json.JSONDecodeError))


@functools.cache
def _limit_silence() -> None:
    """Sets a timeout on the Hub's client, which has none by default. Applies once, to the whole process."""

    def make() -> Any:
        client = hub_client.default_client_factory()
        client.timeout = http.Timeout(ANSWER_TIMEOUT_S)

        def limit(request: Any) -> None:  # some requests, such as lists of files, set None themselves
            if request.extensions.get("timeout", {}).get("read") is None:
                request.extensions["timeout"] = client.timeout.as_dict()

        client.event_hooks["request"].append(limit)
        return client

    set_client_factory(make)


def reason_of(error: BaseException) -> str:
    """The reason why a request to the Hub failed. Omits the text of the response, which can quote the request."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return reason_of(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        meaning = {
            401: "the token is missing or not valid",
            403: "the token has no write access to it",
            404: "it does not exist, or this token has no access to it",
        }
        return f"the Hub answered {status}" + (f": {meaning[status]}" if status in meaning else "")
    if isinstance(error, http.TransportError):
        return f"the Hub could not be reached ({type(error).__name__})"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub's response was not JSON"
    text = without(_token(), without_secrets(str(error)))
    return f"{type(error).__name__}: {text}"


def _secrets() -> dict[str, str]:
    """The secrets of this process that no ordinary text contains, and the Hub's token, by the name of the source."""
    token = _token()
    secrets = {name: value for name, value in secrets_of_environment().items() if not is_ordinary(value)}
    return secrets | ({"HF_TOKEN or `hf auth login`": token} if token else {})


def _token() -> str:
    """The Hub's token; empty if there is none, or only a placeholder."""
    token = get_token() or ""
    return token if len(token) >= SHORTEST_SECRET else ""


# Snapshots -----------------------------------------------------------------------------------------------------------


class Snapshot:
    """A folder in `run` with the files to push: the model in `model`, and the run's card, curves and settings.

        with Snapshot(run=Path("output"), model=Path("output/checkpoint-20")) as folder:
            ...

    Args:
        checkpoint: A checkpoint to push with all its files, and its folder in the repository.
        card: Written to the snapshot instead of the run's card. `run` stays unchanged, because it may be a checkpoint,
            which is incomplete if a file changes.

    Raises:
        HubError: The folder cannot be written, for example because the disk is full.
    """

    def __init__(
        self, *, run: Path, model: Path, checkpoint: tuple[Path, str] | None = None, card: Card | None = None
    ) -> None:
        self.run, self.model = run, model
        try:
            self._made = _PushFolder(run)
            self.folder = Path(self._made.name)
            try:
                self._fill(model, checkpoint)
                if card is not None:
                    card.write(self.folder)
                elif (self.folder / "README.md").is_file():
                    drop_paths(self.folder / "README.md")
            except OSError:
                self._made.cleanup()
                raise
        except OSError as error:
            raise HubError(f"The snapshot of {model} for a push could not be written: {error}.") from error

    def _fill(self, model: Path, checkpoint: tuple[Path, str] | None) -> None:
        run = self.run
        for source in dict.fromkeys((model, run)):
            for path in _top_files(source):
                # Files of the model's folder take precedence. Those of the run's folder may be from another save.
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
        self._made.cleanup()


class _PushFolder(tempfile.TemporaryDirectory[str]):
    """A new folder `.push-…` in `run`, locked until it is removed: `remove_left_snapshots` leaves it."""

    def __init__(self, run: Path):
        super().__init__(prefix=".push-", dir=run, ignore_cleanup_errors=True)
        self._lock = _locked(self.name)

    def cleanup(self) -> None:
        super().cleanup()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def remove_left_snapshots(run: Path) -> None:
    """Removes the snapshots, which can contain old weights, that killed processes have left in `run`."""
    for left in run.glob(".push-*"):
        try:
            lock = _locked(left)
        except OSError:  # of a push that still runs
            continue
        shutil.rmtree(left, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: str | Path) -> int | None:
    """A descriptor of `folder`, which is locked until it is closed or this process ends. None: no locks on Windows.

    Raises:
        BlockingIOError: Another one has it locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        pass
    return descriptor


def _top_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in _KEPT_SUFFIXES
        and not _STATE_OF_TRAINING.fullmatch(path.name)
        and not path.name.startswith(("_", "."))
    ]


def _has_weights(folder: Path) -> bool:
    """Whether the folder has the weights of a model or of an adapter."""
    return any(path.suffix in _WEIGHTS for path in _top_files(folder))


def _take_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != PICKLED_ARGUMENTS:
            _take(path, target / path.relative_to(source))


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _WEIGHTS:  # large and never changed later; other files may change, so they are copied
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without hard links
            pass
    shutil.copyfile(source, target)


def refuse_secrets(paths: Iterable[Path]) -> None:
    """Checks that none of these files contains the Hub's token or a secret of the environment, in any of its forms
    (`forms_of`). Skips weights, and secrets that ordinary text may contain (`is_ordinary`), except the token.

    Raises:
        HubError: A file contains one. Names the file and the source of the secret.
    """
    secrets = {
        name: [form.encode("utf-8", "surrogateescape") for form in forms_of(value)]
        for name, value in _secrets().items()
    }
    for path in paths:
        content = b"" if path.suffix in _WEIGHTS or not path.is_file() else path.read_bytes()
        for name, forms in secrets.items():
            if any(form in content for form in forms):
                raise HubError(
                    f"{path.name} contains the secret in {name}, so nothing was pushed. Remove it from the file, and "
                    "find out how it got there. If the value is no secret, unset the variable."
                )


# Pushes --------------------------------------------------------------------------------------------------------------


def push_snapshot(
    repo_id: str, snapshot: Snapshot, *, message: str, token: str | None = None, revision: str | None = None
) -> Any:
    """Pushes the snapshot, removes it, and returns the commit. Of an earlier model in the repository, it deletes the
    weights that the snapshot does not have.

    Raises:
        HubError: There are no weights, or the push failed. For a finished run, the message gives the command to push
            later.
    """
    run = snapshot.run
    try:
        with snapshot as folder:
            if not _has_weights(folder):
                raise HubError(
                    f"{snapshot.model} contains no weights, so nothing was pushed; expected files .safetensors or "
                    ".bin. Save the model there first."
                )
            refuse_secrets(folder.rglob("*"))
            replaced = [*_REPLACED, *([f"{LAST_CHECKPOINT}/*"] if (folder / LAST_CHECKPOINT).is_dir() else [])]
            return _retried(
                lambda: HfApi(token=token).upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=message,
                    revision=revision,
                    delete_patterns=replaced,  # of these, the client keeps the files that the snapshot has too
                )
            )
    except ArpoError:
        raise
    except Exception as error:  # any error of the client; everything is on disk
        kept = f"The files are in {snapshot.model}."
        if snapshot.model == run:
            kept = f"The run is complete in {run}; push it later with: {command_to_push(run, repo_id, revision)}"
        raise HubError(f"Pushing to {repo_id} failed: {reason_of(error)}. {kept}") from None


def command_to_push(run: Path, repo_id: str, revision: str | None = None, trajectories: str | None = None) -> str:
    """The command that pushes a finished run."""
    flags = {"--repo": repo_id, "--revision": revision, "--trajectories": trajectories}
    given = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    return shlex.join(["arpo-trl", "push", str(run), *given])


def push_trajectories(repo_id: str, run: Path, token: str | None = None) -> Any:
    """Pushes the run's logged trajectories as a dataset with one row per leaf. Returns the commit; None without a log.

    Raises:
        HubError: The push failed. The message gives the command to push later.
    """
    folder = run / TRAJECTORIES
    logs = log_files(run)
    if not logs:
        return None
    command = f"arpo-trl push {shlex.quote(str(run))} --trajectories {shlex.quote(repo_id)}"
    try:
        refuse_secrets([log.path for log in logs])
        with _PushFolder(run) as name:
            splits = export_rows(logs, Path(name) / "data")
            (Path(name) / "README.md").write_text(dataset_card(repo_id, splits), "utf-8")
            return _retried(
                lambda: HfApi(token=token).upload_folder(
                    repo_id=repo_id,
                    repo_type="dataset",
                    folder_path=name,
                    commit_message="Trajectories",
                    delete_patterns=[f"data/{split}.parquet" for split in SPLITS],  # those of an earlier run
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
    revision: str | None = None,
    evaluation: str | None = None,
    private: bool | None = None,
) -> list[str]:
    """Pushes the folder of a finished run to `repo` and its trajectories to `trajectories`; returns the commits' URLs.

    Args:
        revision: The branch of `repo`. None: main.
        evaluation: A Markdown table of results for the card.

    Raises:
        DataError: There is nothing to push, or there is no card for `evaluation`.
        ConfigError: Neither repository is given, one is not writable, the branch cannot be created, or `revision` or
            `evaluation` is given without `repo`.
        HubError: A push failed.
    """
    if repo is None and trajectories is None:
        raise ConfigError("No repository is given. Pass --repo, --trajectories or both.")
    if evaluation is not None and repo is None:
        raise ConfigError(
            "--evaluation is given without --repo, but its table belongs to the card of a model repository. Pass "
            "--repo, or omit --evaluation."
        )
    if revision is not None and repo is None:
        raise ConfigError(
            "--revision is given without --repo, but it is a branch of a model repository. Pass --repo, or omit "
            "--revision."
        )
    configured = any((run / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if repo is not None and not (configured and _has_weights(run)):
        raise DataError(
            f"{run} contains no model and no adapter; expected config.json or {ADAPTER_CONFIG}, and weights "
            "(.safetensors or .bin). Pass the output_dir of a run that has been saved."
        )
    if trajectories is not None and not log_files(run):
        raise DataError(
            f"{run / TRAJECTORIES} contains no logged trees. Set trajectory_log_rate above 0 to log trajectories."
        )
    if evaluation is not None and repo is not None and Card.of(run, repo) is None:
        raise DataError(f"{run} has no training_config.yaml, which the card needs. Omit --evaluation.")
    urls = []
    if repo is not None:
        repo_id = prepare_repo(repo, setting="--repo", private=private)
        if revision is not None:
            prepare_branch(repo_id, revision, setting="--revision")
        card = Card.of(run, repo_id)
        if evaluation is not None and card is not None:
            card = dataclasses.replace(card, evaluation=evaluation)
            write_whole(run / EVALUATION, evaluation.strip() + "\n")  # for later pushes
        snapshot = Snapshot(run=run, model=run, card=card)
        urls.append(str(push_snapshot(repo_id, snapshot, message="Upload a run", revision=revision).commit_url))
    if trajectories is not None:
        repo_id = prepare_repo(trajectories, setting="--trajectories", private=private, kind="dataset")
        urls.append(str(push_trajectories(repo_id, run).commit_url))
    return urls


_JOIN_S = 0.2


class Unfinished(Exception):
    """A push did not end before its caller stopped waiting."""


def _fulfil(pushed: Future[Any], push: Callable[[], Any]) -> None:
    try:
        pushed.set_result(push())
    except BaseException as error:
        pushed.set_exception(error)


class BackgroundPush:
    """Runs one push at a time on a daemon thread. A failure is logged as a warning."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, push: Callable[[], Any], *, after_failure: str = "") -> None:
        """Waits for the current push, then starts this one. `after_failure` ends the warning about its failure."""

        def run() -> None:
            try:
                push()
            except Exception as error:  # a failed push must not end training
                logger.warning(f"{error} {after_failure}".rstrip())

        self.wait()
        self._thread = threading.Thread(target=run, name="arpo-push", daemon=True)
        self._thread.start()

    def result(self, push: Callable[[], Any], stops: Callable[[], bool]) -> Any:
        """Waits for the current push, then runs this one and returns its result. Its error is raised.

        Raises:
            Unfinished: `stops` has returned True before its end.
        """
        if self.wait(stops) and not stops():
            pushed: Future[Any] = Future()
            self.start(lambda: _fulfil(pushed, push))
            if self.wait(stops):
                return pushed.result()
        raise Unfinished

    def wait(self, stops: Callable[[], bool] = lambda: False) -> bool:
        """Waits for the current push, until `stops` returns True. Returns whether no push is running."""
        while self._thread is not None and self.is_running and not stops():
            self._thread.join(_JOIN_S)
        return not self.is_running

    def wait_at_exit(self) -> None:
        """Makes the end of the program wait for the current push."""
        # `atexit` is too late: its functions run when thread pools accept no more work, and the client uploads in one.
        threading._register_atexit(self.wait)  # type: ignore[attr-defined]

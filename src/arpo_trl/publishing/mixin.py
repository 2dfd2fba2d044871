"""`Publishing`: decides the contents and times of a trainer's pushes to the Hub. `push.py` and `model_card.py` run
them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from trl import GRPOTrainer

from arpo_trl.config import ARPOConfig
from arpo_trl.data.layouts import shared_system_prompt
from arpo_trl.errors import HubError, Interrupted
from arpo_trl.publishing.model_card import Card, as_path, describe, write_settings
from arpo_trl.publishing.push import (
    LAST_CHECKPOINT,
    BackgroundPush,
    Snapshot,
    Unfinished,
    command_to_push,
    prepare_branch,
    prepare_repo,
    push_snapshot,
    push_trajectories,
    reason_of,
    remove_left_snapshots,
)
from arpo_trl.tools.builtin import ToolArguments
from arpo_trl.trl_seam import get_config_model_id
from arpo_trl.visible import get_logger, without_credentials

logger = get_logger(__name__)

_PLACES = ("model_name_or_path", "dataset", "eval_dataset")
"""The settings that name a path or a repository on the Hub."""


class Publishing(GRPOTrainer):
    """A `GRPOTrainer` with its own model card, early checks of access to the Hub, and pushes whose failure does not
    stop a run.

    A mixin, independent of the others. `_push_from_checkpoint` pushes the given checkpoint.

    It replaces the pushes of `Trainer`, which ignores exceptions in its push threads, sends all files in `output_dir`
    even while they are being written, and waits for the Hub without a timeout.
    """

    args: ARPOConfig
    evaluation: str | None = None
    """Markdown with the last benchmark results, for the card."""
    other_settings: Sequence[Any] = ()
    """Dataclasses with settings of this run, in addition to `args`."""

    def prepare_repositories(self, args: Any, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repositories and the branch in the settings, and checks write access. Runs only on the main
        process.

        Raises:
            ConfigError: A repository is not writable, or the branch cannot be created.
        """
        if args.process_index != 0:
            return
        if private is None:
            private = args.hub_private_repo
        self._repo_id = prepare_repo(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            setting="hub_model_id",
            private=private,
            token=token,
        )
        if args.hub_revision is not None:
            prepare_branch(self._repo_id, args.hub_revision, setting="hub_revision", token=token)
        if args.hub_trajectories_id is not None:
            args.hub_trajectories_id = prepare_repo(
                args.hub_trajectories_id,
                setting="hub_trajectories_id",
                private=private,
                kind="dataset",
                token=token,
            )
        remove_left_snapshots(Path(args.output_dir))
        self._push = BackgroundPush()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not hasattr(self, "_push"):
            self.prepare_repositories(self.args, token, private)
        self.hub_model_id = getattr(self, "_repo_id", None)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Saves the model and its card, then pushes them and, with `hub_trajectories_id`, the trajectories.

        Call it on all ranks; the main process pushes. `card` is passed to `create_model_card`. With `blocking` it
        returns the commit. Otherwise it returns None, the push runs in the background, the end of the program waits
        for it, and a failure is a warning.

        Raises:
            ConfigError: The branch `revision` does not exist and cannot be created. Everything is saved.
            HubError: The push failed. Everything is saved, and the message contains the command to push later.
            Interrupted: As in `push_saved`.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.state.save_to_json(os.path.join(self.args.output_dir, TRAINER_STATE_NAME))
        return self.push_saved(commit_message, blocking, token, revision, **card)

    def push_saved(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Any:
        """`push_to_hub` without saving the model and the log, which are on disk. Runs only on the main process.

        Raises:
            Interrupted: A signal has come to a run that listens to signals. The message contains the command to push
                later.
        """
        if not self.is_world_process_zero():
            return None
        self._say_push_begins()
        self.create_model_card(**card)
        run, repo_id = Path(self.args.output_dir), str(self.hub_model_id)
        if revision is None:
            revision = self.args.hub_revision
        else:
            prepare_branch(repo_id, revision, setting="revision", token=token)

        def push() -> Any:
            snapshot = Snapshot(run=run, model=run)
            commit = push_snapshot(
                repo_id, snapshot, message=commit_message or "Model", token=token, revision=revision
            )
            if self.args.hub_trajectories_id is not None:
                push_trajectories(self.args.hub_trajectories_id, run, token=token)
            return commit

        if blocking:
            try:
                return self._push.result(push, self._is_interrupted)
            except Unfinished:
                later = self.command_to_push(revision)
                raise Interrupted(
                    self._interrupts.told,
                    f"Interrupted before the push to {repo_id} was finished. The run is complete in {run}; push it "
                    f"later with: {later}",
                ) from None
        self._push.start(push)
        self._push.wait_at_exit()
        return None

    def command_to_push(self, revision: str | None = None) -> str:
        """The command that pushes the saved run as `push_to_hub` does, for users."""
        args = self.args
        return command_to_push(
            Path(args.output_dir), str(self.hub_model_id), revision or args.hub_revision, args.hub_trajectories_id
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy is HubStrategy.END:
            return
        if self._push.is_running and not self.args.hub_always_push:
            return
        self._say_push_begins()
        model, run, repo_id = Path(checkpoint_folder), Path(self.args.output_dir), str(self.hub_model_id)
        places = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: model.name}
        checkpoint = (model, places[strategy]) if strategy in places else None
        if not self._push.wait(self._is_interrupted):
            return
        try:
            snapshot = Snapshot(run=run, model=model, checkpoint=checkpoint)
        except HubError as error:
            logger.warning(f"{error} Training continues.")
            return
        message = f"Step {self.state.global_step}"
        self._push.start(
            lambda: push_snapshot(repo_id, snapshot, message=message, revision=self.args.hub_revision),
            after_failure="Training continues, and the next save retries the push.",
        )

    def _say_push_begins(self) -> None:
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # trackio sends its own data to the Hub at this point
            logger.warning(f"A tracker failed before a push: {reason_of(error)}. The push continues without it.")

    def _finish_current_push(self) -> None:
        """Saves the final model, then waits for the current push. `Trainer` calls it on all ranks after training."""
        if self.args.push_to_hub and HubStrategy(self.args.hub_strategy) is not HubStrategy.END:
            self.save_model(_internal_call=True)
        if hasattr(self, "_push"):
            self._push.wait(self._is_interrupted)

    def _is_interrupted(self) -> bool:
        interrupts = getattr(self, "_interrupts", None)  # a trainer of demonstrations has none
        return interrupts is not None and interrupts.active and interrupts.told is not None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; if the user's script calls it for `output_dir` of the run, also its card."""
        super().save_model(output_dir, _internal_call)
        folder, run = Path(output_dir or self.args.output_dir), Path(self.args.output_dir)
        # Internal calls, and the push of `super`, are followed by a card of their own.
        if not _internal_call and not self.args.push_to_hub and folder.absolute() == run.absolute():
            self.create_model_card()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Also saves the settings of the run beside each saved model. So a checkpoint, or a copy of it, is evaluated,
        merged and pushed with them."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # in transformers 5.24 all ranks call this method
            write_settings(Path(output_dir or self.args.output_dir), self._settings())

    def _settings(self) -> dict[str, Any]:
        """The content of the run's `training_config.yaml`."""
        settings = describe(*self.other_settings, self.args)
        settings.setdefault("model_name_or_path", get_config_model_id(self.model.config))
        if not self.tools:
            settings["tools"] = []
        elif not any(isinstance(group, ToolArguments) for group in self.other_settings):  # passed in Python
            settings["tools"] = [
                f"{tool.__module__}:{getattr(tool, '__qualname__', type(tool).__qualname__)}" for tool in self.tools
            ]
        if (shared := self._shared_system_prompt) is not None:
            settings.setdefault("system_prompt", shared)
        return settings | {name: as_path(settings[name]) for name in _PLACES if name in settings}

    @functools.cached_property
    def _shared_system_prompt(self) -> str | None:
        """The system message of all rows as the setting `system_prompt`, for evaluation; None if rows have several. An
        address with credentials stays out of the settings, as in `describe`."""
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        datasets = [each for each in (self.train_dataset, *evaluated) if each is not None]
        if not all(isinstance(each, Dataset) and "prompt" in each.column_names for each in datasets):
            return None
        shared = shared_system_prompt(prompt for each in datasets for prompt in each["prompt"])
        return shared if shared is not None and without_credentials(shared) == shared else None

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Writes card, training curves and settings to `output_dir`. Runs only on the main process."""
        if not self.is_world_process_zero():
            return
        settings = self._settings()
        if dataset_name is not None:
            settings["dataset"] = as_path(dataset_name)
        given = (tags,) if isinstance(tags, str) else tuple(tags or ())
        Card(
            repo_id=self.hub_model_id or Path(self.args.output_dir).absolute().name,
            title=model_name,
            settings=settings,
            history=self.state.log_history,
            base_model=get_config_model_id(self.model.config),
            is_adapter=is_peft_model(self.model),
            best_step=self.state.best_global_step,
            evaluation=self.evaluation,
            extra_tags=(*given, *(getattr(self.model, "model_tags", None) or ())),
        ).write(Path(self.args.output_dir))

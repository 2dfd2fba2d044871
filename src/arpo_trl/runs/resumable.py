"""`Resumable`: a trainer that can stop at any point and later resume with the same results."""

from __future__ import annotations

import io
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from trl import GRPOTrainer

from arpo_trl.common.full_disk import cause_and_remedy, is_full_disk
from arpo_trl.common.run_files import ADAPTER_CONFIG, TRAINER_STATE
from arpo_trl.common.user_files import read_json
from arpo_trl.common.working_folder import return_to, working_folder
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ArpoError, CheckpointError, ConfigError, Interrupted
from arpo_trl.runs.checkpoints import Checkpoints, SavedState, changed_versions
from arpo_trl.runs.identity import RunIdentity, dataset_identity, deciding_settings, frozen_weights, model_identity
from arpo_trl.runs.interrupts import Interrupts, until_the_run_ends
from arpo_trl.runs.output_folder import wants_to_resume
from arpo_trl.runs.shared_folder import check_shared, found_by_all
from arpo_trl.runs.tied_weights import without_tied_keys
from arpo_trl.trl_seam import get_callable_name
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

_FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
"""The decisions of callbacks in transformers' `TrainerControl`."""
_IN_PYTHON = ", in a script of your own with trainer.train(resume_from_checkpoint=True)"


class Resumable(GRPOTrainer):
    """A `GRPOTrainer` with complete checkpoints that contain all state of the next step and identify their run.

    A mixin, independent of the others. When a checkpoint is complete, it calls `_push_from_checkpoint` once.

    It changes the following parts of `GRPOTrainer`, and no others:

    - `train`: finds and checks the checkpoint to resume from. SIGTERM and Ctrl-C stop it with a checkpoint.
    - `training_step`, `_evaluate`: check for interrupts. A subclass may check at more places.
    - `evaluate`, `predict`: an interrupt restores the state at their begin.
    - `_maybe_log_save_evaluate`, `_evaluate`: what a callback decides on one rank, all ranks do.
    - `_save_checkpoint`, `_get_output_dir`, `_push_from_checkpoint`: write a checkpoint to a temporary folder, then
      move it to its final path and push it.
    - `_get_dataloader`: a SIGTERM to all processes of a job does not end its workers.
    - `_load_from_checkpoint`: also loads the trained adapter of a model with several.
    - `_load_best_model`: counts, as `train` does, for engines with a copy of the weights.
    - `_issue_warnings_after_load`: a checkpoint has tied weights under one of their names.
    - `_save_rng_state`, `_load_rng_state`: also save and load the trainer's state in memory between two steps.
    - `_run_epoch`: a resumed epoch has the same order of rows, and a finished run takes no further step.
    - `_finalize_training`: a run that resumes at its end has the state in memory, too, and its last evaluation.
    """

    args: ARPOConfig
    _interrupts: Interrupts
    """Set before `__init__` runs, since functions that are passed to `__init__` use it."""
    _buffered_inputs: list[dict[str, Any]] | None
    started_in: str | None = None
    """The working folder at the start of training, on which a relative `output_dir` depends; None outside of training.
    Rollouts ahead may run functions that change it at any time."""
    loads = 0
    """How many times training has begun or a checkpoint has replaced the weights. With the step, it identifies the
    weights: the step begins anew with each training."""
    _evaluation_is_owed = False
    _evaluates = False
    """Whether an evaluation runs."""
    _is_restored = True
    """Whether the state in memory is that of the checkpoint, in a run that resumes from one."""
    _passes = 0
    """The epoch, which is the number of complete passes over the training rows."""
    _pass_began_at = 0
    """The global step at which the pass began."""
    _sampler: Any = None
    """The sampler of the training rows; None for a streamed dataset, which has none."""
    _starts_epoch = False
    _epoch_generators: dict[str, Any] | None = None
    """The random generators' states before the epoch's first batch. A checkpoint between two epochs contains these."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._checkpoints = Checkpoints(Path(self.args.output_dir))
        self._resumed: SavedState | None = None
        self._model_identity = model_identity(self.model)
        """Computed before the model is prepared for training: FSDP2 changes its class and perhaps its dtype."""
        frozen = self.model if is_peft_model(self.model) else self.ref_model
        # Under FSDP a rank may have no weights yet.
        self._frozen_weights = None if frozen is None or self.is_fsdp_enabled else frozen_weights(frozen)
        self._dataset_identity: dict[str, Any] | None = None
        """Computed at most once per training, at first use, since it reads every row."""
        self._moment: dict[str, Any] | None = None
        self._saved_step: int | None = None
        self._writing = False
        self.add_callback(_StepBegins(self._remember_moment))

    # State that a subclass extends -----------------------------------------------------------------------------------

    @property
    def tools_parameters(self) -> dict[str, Any]:
        """The JSON schema of each tool's parameters, without descriptions, by the tool's name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state in memory between two steps that transformers does not save, as plain data."""
        state: dict[str, Any] = {
            "micro_step": self._step,
            "buffered": None if self._is_between_generations() else self._buffered_inputs,
            "metrics": {mode: {k: list(v) for k, v in metrics.items()} for mode, metrics in self._metrics.items()},
            "loss": self._tr_loss.detach().cpu().clone(),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }
        if self.use_adaptive_entropy:
            state["entropy_control"] = (self.entropy_coef, self._last_world_entropy)
        if self.log_completions:
            state["completions"] = {
                name: {key: list(column) for key, column in value.items()} if isinstance(value, dict) else list(value)
                for name, value in self._logs.items()
                if name != "images"
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._step = state["micro_step"]
        self._buffered_inputs = state["buffered"]
        for mode, metrics in state["metrics"].items():
            self._metrics[mode] = defaultdict(list, {name: list(values) for name, values in metrics.items()})
        self._tr_loss = state["loss"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = state["total_loss"], state["logged_step"]
        if "entropy_control" in state:
            self.entropy_coef, self._last_world_entropy = state["entropy_control"]
        for name, value in state.get("completions", {}).items():
            columns = value if isinstance(value, dict) else {None: value}
            for key, column in columns.items():
                log = self._logs[name] if key is None else self._logs[name][key]
                log.clear()
                log.extend(column)

    def _begin_logs(self) -> None:
        """Called when a new run begins. A subclass overrides it."""

    def _forget_from(self, step: int, *, evaluated: bool) -> None:
        """Removes the log files of steps, from `step` on, that the resumed run repeats. A subclass overrides it.

        Args:
            evaluated: Whether the evaluation at `step` is complete and will not be repeated.
        """

    # Training --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, like `Trainer.train`.

        Args:
            resume_from_checkpoint: True: resume from the last complete checkpoint in `output_dir`, or start a new run
                if there is none. So a job can be restarted with the same command. A path: resume from that
                checkpoint. None or False: start a new run; `output_dir` must not contain checkpoints.

        Raises:
            CheckpointError: The checkpoint is incomplete.
            ConfigError: Another run wrote the checkpoint, or it does not exist. Or `output_dir` is not the same folder
                on all ranks.
            Interrupted: SIGTERM or Ctrl-C was received. A checkpoint of the last finished step is written.
        """
        resume_from_checkpoint = wants_to_resume(resume_from_checkpoint)
        if self.args.should_save:
            self._checkpoints.clear()
        self.accelerator.wait_for_everyone()
        check_shared(Path(self.args.output_dir), self.accelerator)
        self._resumed = found_by_all(self._checkpoints, resume_from_checkpoint, self.accelerator)
        self._dataset_identity = None
        self._moment, self._saved_step, self._evaluation_is_owed = None, None, False
        self._is_restored = self._resumed is None
        self._passes, self._pass_began_at = 0, 0
        if self._resumed is not None:
            self._check_resumable(self._resumed)
            self._passes = self._resumed.passes
            self._pass_began_at = self._resumed.step - self._resumed.steps_in_pass
            if self._resumed.folder.resolve() == self._checkpoints.place(self._resumed.step).resolve():
                self._saved_step = self._resumed.step
            logger.info(f"Resuming from {self._resumed.folder}.", main_process_only=True)
        elif resume_from_checkpoint:
            logger.warning(f"There is no checkpoint in {self.args.output_dir} yet. A new run starts.")
        if resume_from_checkpoint and self.args.should_save:
            step = self._resumed.step if self._resumed else 0
            self._forget_from(step, evaluated=self._resumed is not None and not self._resumed.owes_evaluation)
        elif self.args.should_save:
            self._begin_logs()
        folder = None if self._resumed is None else str(self._resumed.folder)
        self.started_in, self.loads = working_folder(), self.loads + 1
        self._forget_training()
        try:
            with self._interrupts.listening():
                try:
                    return super().train(folder, *args, **kwargs)
                except Interrupted as interrupted:
                    Interrupts.stopped = True
                    raise Interrupted(interrupted.signum, self._stop(interrupted)) from None
        finally:
            self.started_in = None
            self._end_training()

    def _end_training(self) -> None:
        """Called at the end of each training, also after an error. A subclass overrides it."""

    def _forget_training(self) -> None:
        """Removes what an earlier `train` of this trainer has left, perhaps in the middle of a step. What a resumed
        run continues comes from its checkpoint."""
        self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
        for gathered in (*self._metrics.values(), self._pending_metrics, self._pending_extra_logs):
            gathered.clear()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        dtypes = {name: weight.dtype for name, weight in self.model.named_parameters() if weight.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT saves the adapter "default" at the top of the checkpoint and each other one, such as TRL's "ref", in a
        # subfolder. transformers loads only the subfolders if there are any. Under FSDP it does load the active one,
        # and under DeepSpeed it does not call this method.
        trained = self.model
        has_others = not self.is_fsdp_enabled and is_peft_model(trained) and len(trained.peft_config) > 1
        if has_others and trained.active_adapters == ["default"]:
            trained.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        # PEFT loads an adapter in float32, but TRL trains that of a quantized model in bfloat16.
        for name, weight in trained.named_parameters():
            if weight.dtype != dtypes.get(name, weight.dtype):
                weight.data = weight.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.loads += 1

    def _check_resumable(self, state: SavedState) -> None:
        state.check_same_run(self._identity())
        if self.args.ignore_data_skip:
            raise ConfigError(
                "ignore_data_skip is set, but a resumed run must skip the rows that were already used. Unset it."
            )
        if self.args.sync_ref_model:
            raise ConfigError(
                "sync_ref_model is set, but checkpoints do not contain the reference model that it updates. "
                + state.new_run
            )
        if self._memory_file(state.folder, 0).name not in state.files:
            raise CheckpointError(
                f"{state.folder} contains only the model (save_only_model), so a run cannot resume from it. "
                + state.new_run
            )
        if None in (state.identity.get("frozen_weights"), self._frozen_weights):
            self._warn_of_another_base(state.folder)
        if changes := changed_versions(state.versions):
            logger.warning(
                f"{state.folder} was written with other versions ({', '.join(changes)}): results may differ."
            )

    def _warn_of_another_base(self, folder: Path) -> None:
        config = folder / ADAPTER_CONFIG
        if not is_peft_model(self.model) or not config.exists():
            return
        then = read_json(config).get("base_model_name_or_path")
        now = self.model.active_peft_config.base_model_name_or_path
        if then != now:
            logger.warning(
                f"The adapter in {folder} was trained on {then}, and this run puts it on {now}. If their weights "
                "differ, restore the old model_name_or_path.",
                main_process_only=True,
            )

    def _identity(self) -> RunIdentity:
        if self._dataset_identity is None:
            self._dataset_identity = dataset_identity(self.train_dataset)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        sharding = f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin is not None else None
        return RunIdentity(
            settings=deciding_settings(self.args),
            model=self._model_identity,
            dataset=self._dataset_identity,
            tools=list(self.tools_parameters),
            tools_parameters=self.tools_parameters,
            rewards=[getattr(function, "origin", get_callable_name(function)) for function in self.reward_funcs],
            processes=self.accelerator.num_processes,
            sharding="FSDP" if self.is_fsdp_enabled else sharding,
            frozen_weights=self._frozen_weights,
            reward_settings={
                function.__name__: settings
                for function in self.reward_funcs
                if (settings := getattr(function, "reward_settings", None)) is not None
            },
        )

    def _run_epoch(self, **loop: Any) -> None:
        resumed, loop = self._resumed, self._in_pass(loop)
        epoch = loop["epoch"]
        is_first = resumed is not None and epoch == loop["epochs_trained"]
        if is_first:
            # The sampler draws each epoch's order from a separate generator. Advance it past the earlier epochs.
            sampler = self._sampler
            for _ in range(epoch if getattr(sampler, "shuffle", False) else 0):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        # transformers would train one more step, or more epochs for those that a callback has ended early.
        if self.state.global_step >= self.state.max_steps or epoch >= self.state.num_train_epochs:
            self.control.should_training_stop = True
            return
        self._starts_epoch = not (is_first and loop["steps_trained_in_current_epoch"])
        self._passes = epoch
        skipped = loop["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps if is_first else 0
        self._pass_began_at = self.state.global_step - skipped
        self._epoch_generators = _generators() if self._starts_epoch else None
        super()._run_epoch(**loop)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._resumed is not None and not self._is_restored:  # no epoch, or no step, was left
            self._load_rng_state(str(self._resumed.folder))
        self._place_best()
        return super()._finalize_training(*args, **kwargs)

    def _in_pass(self, loop: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an epoch, at the pass and the step in it of the checkpoint. Given its own result, it
        returns the same.

        transformers computes them from the number of steps. So it takes all steps for steps of the first pass over a
        stream, whose length is unknown, and those after a pass that a callback has ended early for the rest of it.
        """
        resumed = self._resumed
        if resumed is None:
            return loop
        passes, steps = resumed.passes, resumed.steps_in_pass
        if steps >= loop["num_update_steps_per_epoch"]:
            passes, steps = passes + 1, 0
        return loop | {
            "epoch": loop["epoch"] + passes - loop["epochs_trained"],
            "epochs_trained": passes,
            "steps_trained_in_current_epoch": steps * self.args.gradient_accumulation_steps,
        }

    def _load_callback_state(self) -> None:
        """Restores the state of callbacks that export it, such as the patience of early stopping. transformers does so
        only on request, and then replaces the callbacks."""
        by_class: dict[str, list[ExportableState]] = defaultdict(list)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                by_class[type(callback).__name__].append(callback)
        for name, callbacks in by_class.items():
            saved = self.state.stateful_callbacks.get(name, [])
            states = saved if isinstance(saved, list) else [saved]
            # Each save appends the states of several callbacks of a class to those of earlier saves.
            for callback, state in zip(callbacks, states[-len(callbacks) :], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # accelerate's own class passes attributes on, but does not take them
        inner.worker_init_fn = until_the_run_ends(inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.stop_together()
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.from_this_moment():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self.from_this_moment():
            return super().predict(*args, **kwargs)

    @contextmanager
    def from_this_moment(self) -> Iterator[None]:
        """A context for an evaluation, perhaps of a user's callback, of which others may be parts. During training, an
        interrupt in it restores the state at its begin."""
        # A resumed run's `eval_on_start` comes before its state is restored.
        if self.started_in is None or self._evaluates or not self._is_restored:
            yield
            return
        self._remember_moment()
        self._evaluates = True
        try:
            yield
        finally:
            self._evaluates = False

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluation_is_owed = True
        metrics = super()._evaluate(*args, **kwargs)
        self._evaluation_is_owed = False
        self._decide_together()
        return metrics

    # Decisions of callbacks ------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._decide_together()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._decide_together()  # callbacks have seen the log and the checkpoint, and may stop the run

    def _decide_together(self) -> None:
        """Sets each flag of `control`, such as `should_save`, that is set on any rank. A collective.

        Saving, evaluating and training are collectives: a rank that did one of them alone would wait for the others.
        """
        if self.accelerator.num_processes == 1:
            return
        own = torch.tensor([[int(getattr(self.control, flag)) for flag in _FLAGS]], device=self.accelerator.device)
        for flag, is_set in zip(_FLAGS, self.accelerator.gather(own).any(dim=0).tolist(), strict=True):
            setattr(self.control, flag, is_set)

    # Interrupts ------------------------------------------------------------------------------------------------------

    @property
    def interrupts(self) -> Interrupts:
        """The signals to this run. A program that listens to them also after `train` can save the model first."""
        return self._interrupts

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context. If its code is interrupted on a rank, or fails on it after a signal, all ranks raise
        `Interrupted` at its end. A collective."""
        with suppress(Interrupted), self._interrupts.over_errors():
            yield
        self.stop_together()

    def stop_together(self) -> None:
        """Raises `Interrupted` on all ranks if one of them has received a signal. A collective."""
        self._interrupts.stop_together(self.accelerator)

    def _remember_moment(self) -> None:
        """Stores the state that an interrupt of the next step or evaluation restores."""
        self._moment = {
            "memory": self.state_dict(),
            "generators": self._epoch_generators or _generators(),
            "tokens": self.state.num_input_tokens_seen,
            "flos": (self.current_flos, self.state.total_flos),
            "logged": len(self.state.log_history),
            "owed": self._evaluation_is_owed or self.control.should_evaluate,
        }
        self._epoch_generators = None

    def _stop(self, interrupted: Interrupted) -> str:
        """Saves the last finished step. Returns a message with the path and with instructions to resume."""
        told = str(interrupted)
        moment, step = self._moment, self.state.global_step
        if moment is None and self._resumed is not None:
            return f"{told} No step was finished since {self._resumed.folder}. To resume, run the same command again."
        if moment is None or step == 0:
            return f"{told} No step was finished yet, so there is no checkpoint to resume from."
        if self._saved_step != step or moment["owed"]:
            self.load_state_dict(moment["memory"])
            _set_generators(moment["generators"])
            self.state.num_input_tokens_seen = moment["tokens"]
            self.current_flos, self.state.total_flos = moment["flos"]
            del self.state.log_history[moment["logged"] :]
            self._evaluation_is_owed = moment["owed"]
            with self._saving_all():
                self._save_checkpoint(self.model_wrapped, None)
        saved = f"{told} Step {step} is saved in {self._checkpoints.place(step)}."
        if self.args.sync_ref_model:
            return f"{saved} A run with sync_ref_model cannot resume; use its weights in a new run."
        return f"{saved} To resume, run the same command with --resume_from_checkpoint true{_IN_PYTHON}."

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _saving_all(self) -> Iterator[None]:
        """A context in which checkpoints can be resumed from, also with `save_only_model`."""
        only_model, self.args.save_only_model = self.args.save_only_model, False
        try:
            yield
        finally:
            self.args.save_only_model = only_model

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._checkpoints.unfinished) if self._writing else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        return_to(self.started_in)
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._writing = False
            self._place_best(step)
            if self.args.should_save:
                self.state.save_to_json(str(self._checkpoints.unfinished / f"checkpoint-{step}" / TRAINER_STATE))
                ended = self.control.should_epoch_stop
                self._checkpoints.finish(
                    step,
                    identity=self._identity(),
                    between_generations=self._is_between_generations(),
                    owes_evaluation=self._evaluation_is_owed,
                    passes=self._passes + ended,
                    steps_in_pass=0 if ended else step - self._pass_began_at,
                )
        except (ArpoError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise self._could_not_save(step, error) from error
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        self._saved_step = None if self.args.save_only_model else step
        folder = str(self._checkpoints.place(step))
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _place_best(self, saved: int | None = None) -> None:
        """Names the best checkpoint by its place in this run's folder, if it is there or has just been `saved`.

        transformers records a temporary path, or keeps that of a folder which has since been moved, or is now given
        relative to another one. Then it would remove the best checkpoint, or not load it.
        """
        step = self.state.best_global_step
        if step and (step == saved or self._checkpoints.place(step).is_dir()):
            self.state.best_model_checkpoint = str(self._checkpoints.place(step))

    def _could_not_save(self, step: int, error: Exception) -> CheckpointError:
        shutil.rmtree(self._checkpoints.unfinished, ignore_errors=True)
        last, _ = self._checkpoints.last()
        kept = f"{last.folder} is complete" if last else "There is no earlier checkpoint"
        cause, remedy = "", "Correct the cause"
        if is_full_disk(error):
            cause, remedy = cause_and_remedy(error, self.args.output_dir)
            cause = f"; {cause}"
        elif isinstance(error, torch.distributed.DistError) or "gloo" in str(error):  # gloo raises RuntimeError
            remedy = "Another process has ended or lost its connection: see its output. Correct the cause there"
        return CheckpointError(
            f"checkpoint-{step} could not be written to {self.args.output_dir} ({type(error).__name__}: {error})"
            f"{cause}. {kept}. {remedy}, then resume with --resume_from_checkpoint true{_IN_PYTHON}."
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _is_between_generations(self) -> bool:
        return (
            self._buffered_inputs is None or self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(without_tied_keys(self.model, load_result))

    @staticmethod
    def _memory_file(folder: Path, rank: int) -> Path:
        return folder / f"arpo_memory_{rank}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.state_dict(), self._memory_file(Path(output_dir), self.accelerator.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Also restores the trainer's state in memory, and repeats an interrupted evaluation. transformers calls it
        once, right before the first step."""
        super()._load_rng_state(checkpoint)
        self._epoch_generators = None
        state = self._resumed
        if state is None:
            return
        same = state.identity["processes"] == self.accelerator.num_processes
        file = self._memory_file(state.folder, self.accelerator.process_index if same else 0)
        try:
            memory = torch.load(file, map_location=self.args.device, weights_only=True)
        except Exception as error:  # torch's own errors, and those of pickle, the zip file and the file system
            raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}).") from error
        if not same:
            there = state.identity["settings"]["steps_per_generation"]
            memory["micro_step"] = memory["micro_step"] * self.args.steps_per_generation // there
        self.load_state_dict(memory)
        self._is_restored = True
        if state.owes_evaluation:
            # The checkpoint is replaced by one with the evaluation, which can be the best one.
            self.control.should_evaluate, self.control.should_save, self.control.should_log = True, True, False
            epoch = self.state.epoch or 0.0
            with self._saving_all():
                self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, epoch, None, 0.0)
        if self._starts_epoch:
            self._epoch_generators = _generators()


def _on_a_numbered_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# On a CPU, the device of a rank is "cpu:0". transformers loads the optimizer to it, but torch does not support that
# name.
torch.serialization.register_package(100, lambda storage: None, _on_a_numbered_cpu)


def readable(state: Any, what: str) -> Any:
    """Returns `state` if it can be read back from a checkpoint. It is written and read, so call it only when saving.

    Raises:
        ConfigError: It contains other objects than plain data and tensors. `what` names it.
    """
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle and torch raise many types
        raise ConfigError(
            f"{what} cannot be read back from a checkpoint ({type(error).__name__}). Expected numbers of Python, "
            "texts, lists, dicts and tensors."
        ) from error
    return state


class _StepBegins(TrainerCallback):
    def __init__(self, called: Callable[[], None]):
        self._called = called

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._called()


def _generators() -> dict[str, Any]:
    """The states of this process's random generators."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state_all()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.random.set_rng_state_all(states["cuda"])

"""Common code of the training scripts: the model's name, short errors for mistakes that other packages detect, and for
a full disk at the end."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import ModelConfig

from arpo_trl.command_line import keeps_tracebacks
from arpo_trl.common.full_disk import cause_and_remedy, is_full_disk
from arpo_trl.common.settings import Range, changed, check_fields
from arpo_trl.common.user_files import model_name
from arpo_trl.common.waiting import is_first_rank
from arpo_trl.errors import ArpoError, CheckpointError, ConfigError, Interrupted
from arpo_trl.runs.interrupts import Interrupts
from arpo_trl.runs.output_folder import last_whole_checkpoint, remove_earlier_run
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

PYTHON = "Python"
STARTING = (ValueError, TypeError, ArithmeticError, OSError, ImportError, RuntimeError)
"""The built-in types of errors that packages raise for unusable settings. Many packages also define their own."""


MODEL_SETTINGS = {
    "lora_r": {"range": Range(at_least=1)},
    "lora_alpha": {"range": Range(at_least=1)},
    "lora_dropout": {"range": Range(at_least=0, at_most=1)},
}
"""The accepted values of TRL's settings of the model; see `check_fields`."""


def loading_arguments(config: Any, model_config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments for loading the model: `model_init_kwargs`, and those of the model's settings."""
    return {
        **(config.model_init_kwargs or {}),
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
    }


def overwrite(config: TrainingArguments) -> None:
    """Removes the files of an earlier run, before another rank of this one writes."""
    with config.main_process_first(local=False):
        remove_earlier_run(config.output_dir)


def required_model(model_config: ModelConfig) -> str:
    """The model to train, with the path in place of ~, in the settings too. Warns about settings of LoRA without
    `use_peft`, and makes a single target module a list.

    Raises:
        ConfigError: `model_name_or_path` is not set, or is no text, or another setting of the model is not valid.
        DataError: It is in the home directory of an unknown user.
    """
    name: Any = model_config.model_name_or_path
    expected = "expected a folder or a Hub id of the model to train."
    if not name:
        raise ConfigError(f"model_name_or_path is not set; {expected}")
    if not isinstance(name, str):
        raise ConfigError(f"model_name_or_path is {name!r}; {expected}")
    model_config.model_name_or_path = name = model_name(name, "model_name_or_path")
    check_fields(model_config, MODEL_SETTINGS)
    modules: Any = model_config.lora_target_modules
    if isinstance(modules, str) and modules.isidentifier():
        # TRL makes a text of a list of one name, which peft would match with the whole path of a layer.
        model_config.lora_target_modules = [modules]
    unused = [setting for setting in changed(model_config) if setting.startswith("lora_")]
    if unused and not model_config.use_peft and is_first_rank():
        logger.warning(
            f"{' and '.join(unused)} {'are' if len(unused) > 1 else 'is'} set, but use_peft is not, so all weights "
            "are trained. Set use_peft: true for LoRA."
        )
    return name


@contextmanager
def start_errors(starting: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """A context in which, while `starting()` is true, a mistake that another package detects becomes a ConfigError.

    The scripts print it in one line. It converts the types of errors that packages raise for unusable settings:
    `STARTING`, and types that the package defines, such as a tracker's for a missing key. Unintended errors of this
    package's own code keep their traceback.
    """
    try:
        yield
    except ArpoError:
        raise
    except SafetensorError as error:
        if is_full_disk(error):
            raise
        raise ConfigError(
            f"The weights of the model cannot be read ({error}): a file is truncated or not a safetensors file. Copy "
            "or download the model again."
        ) from error
    except Exception as error:
        package = _package_of(error)
        intended = isinstance(error, STARTING) or (type(error).__module__ != "builtins" and package != PYTHON)
        known = package == "arpo_trl" or is_full_disk(error)  # `report_errors` reports a full disk
        if not (intended and starting()) or known or keeps_tracebacks():
            raise
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"Training cannot start. {package} says: {told} (Set ARPO_TRACEBACK=1 to see where it was raised.)"
        ) from error


class _Begun(TrainerCallback):
    """Whether a step has begun."""

    yet = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.yet = True


@contextmanager
def until_first_step(trainer: Trainer) -> Iterator[None]:
    """Like `start_errors`, until the trainer begins a step. Optimizer, scheduler and data loader are created before
    it."""
    begun = _Begun()
    trainer.add_callback(begun)
    with start_errors(lambda: not begun.yet):
        yield


@contextmanager
def finished_first(trainer: Trainer, interrupts: Interrupts, hint: str = "") -> Iterator[None]:
    """A context for the final save. SIGTERM or Ctrl-C in it, or since the last step, ends the run after it, on all
    ranks. A second Ctrl-C ends it at once.

    Args:
        hint: Ends the message of `Interrupted`, which says where the model is.
    """
    with interrupts.listening():
        interrupts.plan = "stopping when the model is saved"
        yield
        try:
            interrupts.stop_together(trainer.accelerator)
        except Interrupted as interrupted:
            Interrupts.stopped = True
            saved = f"{interrupted} The trained model is saved in {trainer.args.output_dir}. {hint}".rstrip()
            raise Interrupted(interrupted.signum, saved) from None


@contextmanager
def final_save(output_dir: str) -> Iterator[None]:
    """A context that saves the trained model to `output_dir`. A full disk becomes a CheckpointError, which names the
    last checkpoint."""
    try:
        yield
    except ArpoError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        last, _ = last_whole_checkpoint(Path(output_dir))
        cause, remedy = cause_and_remedy(error, output_dir)
        way_out = (
            f"The last checkpoint is {last}. {remedy}, then resume with --resume_from_checkpoint true, which saves "
            "the model."
            if last
            else f"There is no checkpoint, so the model is lost. {remedy}, and set save_strategy to steps or epoch "
            "before you train again."
        )
        raise CheckpointError(
            f"The trained model could not be saved to {output_dir} ({type(error).__name__}: {error}); "
            f"{cause}. {way_out}"
        ) from error


def _package_of(error: BaseException) -> str:
    """The package whose code raised the error, `PYTHON` for code outside packages."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    folders = [*file.parts[:-1], file.stem]
    for parent in ("site-packages", "src"):
        if parent in folders[:-1]:
            return folders[len(folders) - folders[::-1].index(parent)]
    return PYTHON

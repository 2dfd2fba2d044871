"""Cold start on tool-using trajectories: `accelerate launch sft.py --config configs/quickstart_sft.yaml`.

Without a checkout of the project: `arpo-trl sft --config quickstart_sft`.

Runs TRL's `SFTTrainer` on rows of {messages} or {prompt, text}. Only tokens of the model contribute to the loss:
prompts and tool results are masked. RL's tool protocol encodes the turns.
"""

from __future__ import annotations

import atexit
import copy
import glob
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from arpo_trl.command_line import parse_settings, report_errors
from arpo_trl.common.adapters import check_adapter, of_revision
from arpo_trl.common.build_locks import remove_left_build_locks
from arpo_trl.common.full_disk import naming
from arpo_trl.common.hub_cache import cache_remedy, can_write
from arpo_trl.common.pretrained import causal_config, check_complete, load_pretrained
from arpo_trl.common.settings import changed, check_fields, setting, template_arguments
from arpo_trl.common.trl_settings import OF_TRLS_ENCODING
from arpo_trl.common.user_files import is_url, model_name, refuse_pipe, user_path
from arpo_trl.common.waiting import is_first_rank
from arpo_trl.config import (
    INHERITED,
    refuse_best_without_evaluation,
    refuse_missing_deepspeed_config,
    refuse_token,
    take_the_cpu_if_alone,
)
from arpo_trl.data.demonstrations import encode_dataset, has_text_prompts
from arpo_trl.data.files import read_file
from arpo_trl.errors import CheckpointError, ConfigError, DataError
from arpo_trl.logs.progress import closed_bars, show_compactly
from arpo_trl.publishing.model_card import is_hub_id
from arpo_trl.rollout.engines.compute_dtype import warn_of_lost_steps
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.runs.interrupts import Interrupts, follow_launcher
from arpo_trl.runs.output_folder import check_output, last_whole_checkpoint, sole_run, wants_to_resume
from arpo_trl.runs.tied_weights import without_tied_keys
from arpo_trl.runs.whole_models import WholeModels
from arpo_trl.scripts.start import (
    final_save,
    finished_first,
    loading_arguments,
    overwrite,
    required_model,
    start_errors,
    until_first_step,
)
from arpo_trl.training.preflight import check_quantized_training, warn_of_learning_rate
from arpo_trl.trl_seam import checked_loading
from arpo_trl.visible import get_logger

logger = get_logger(__name__)


@dataclass
class ColdStartArguments:
    """The trajectories for training."""

    dataset: str = setting(MISSING, "Trajectories: Hub id, or .jsonl or .parquet file.")
    dataset_split: str = setting("train", "Split of dataset.")
    max_tool_result_tokens: int | None = setting(
        None,
        "Length limit of a tool result, as in training. The head and tail of a longer one are kept. None: no limit.",
        at_least=16,
        unit="tokens",
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, 'Arguments for the chat template, as in training, as JSON such as {"enable_thinking": false}.'
    )
    overwrite_output_dir: bool = setting(
        False,
        "Remove the model and the checkpoints of an earlier run from output_dir. Without it, such a "
        "folder is an error.",
    )

    def __post_init__(self) -> None:
        check_fields(self, {"chat_template_kwargs": {"options": True}})
        self.chat_template_kwargs = template_arguments(self.chat_template_kwargs)


@dataclass
class ColdStartConfig(SFTConfig):
    """TRL's `SFTConfig`, with `use_cpu` set if there is no accelerator.

    Raises:
        ConfigError: A value is not of its field's type, or the setting would have no effect.
    """

    def __post_init__(self) -> None:
        check_fields(self, INHERITED)
        if unused := [name for name in changed(self) if name in OF_TRLS_ENCODING]:
            raise ConfigError(
                f"{unused[0]} is {getattr(self, unused[0])!r}, but arpo-trl sft encodes the demonstrations itself, "
                "each as a whole, with the loss on the model's turns. Remove the setting."
            )
        take_the_cpu_if_alone(self)
        refuse_missing_deepspeed_config(self)
        remove_left_build_locks(self.deepspeed)
        super().__post_init__()
        refuse_best_without_evaluation(self)


class ColdStartTrainer(WholeModels, SFTTrainer):
    """TRL's `SFTTrainer`. It saves whole models, warns of a learning rate that stays 0, and does not warn of tied
    weights that a checkpoint has under one of their names."""

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.lr_scheduler is None:
            warn_of_learning_rate(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(without_tied_keys(self.model, load_result))


SETTINGS = (ColdStartArguments, ColdStartConfig, ModelConfig)


def _settings_of_train() -> tuple[str, Sequence[type[Any]]]:
    from arpo_trl.scripts import train

    return "train", train.SETTINGS


def load_rows(name: str, split: str) -> Dataset:
    """The rows of a file, a folder or a dataset on the Hub. `split` does not apply to files.

    Raises:
        DataError: There are none, or they cannot be read.
    """
    path = user_path(name, "dataset")
    loader = {".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
    missing = f"dataset {name} does not exist. Check the path."
    refuse_pipe(path, f"dataset {name}")
    _refuse_special_path(path)
    cache = _cache_of_local_files() if path.exists() else None
    try:
        if loader is None:
            return load_dataset(name, split=split, cache_dir=cache)
        if is_url(name):
            return load_dataset(loader, data_files=name, split="train")
        if not path.is_file():
            raise DataError(missing)
        # The library takes the path for a pattern, also the current folder, which it puts before a relative path.
        return load_dataset(loader, data_files=glob.escape(str(path.absolute())), split="train", cache_dir=cache)
    except DataError:
        raise
    except FileNotFoundError as error:
        if path.is_file():
            raise DataError(f"dataset {name} is no .jsonl or .parquet file. Convert it.") from error
        raise DataError(missing) from error
    except StopIteration as error:  # the library reads the first row to determine the columns
        raise DataError(f"dataset {name} contains no rows; expected at least one.") from error
    except Exception as error:  # the library raises its own errors, and those of pyarrow, the Hub and the file system
        if loader and path.is_file():
            deque(read_file(path), maxlen=0)  # names the line that is broken, which the library does not
        cause = error.__cause__ or error
        remedy = cache_remedy(error) or "Expected a .jsonl or .parquet file, or a Hub id."
        raise DataError(f"dataset {name} cannot be read ({type(cause).__name__}: {cause}). {remedy}") from error


def _cache_of_local_files() -> str | None:
    """Where the library converts local files to Arrow, from which they are read while training. None: in its cache,
    where a later run finds them. If that cannot be written: in a folder of this rank, which is removed at exit."""
    if can_write(datasets.config.HF_DATASETS_CACHE):
        return None
    folder = tempfile.mkdtemp(prefix="arpo-trl-sft-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _refuse_special_path(path: Path) -> None:
    """Check that `load_dataset` opens `path` itself. It expands environment variables in a path, splits it at "::",
    and searches for the files of a folder with a pattern that begins with the folder's unescaped path.

    Raises:
        DataError: It would open another path.
    """
    if not path.exists():
        return
    whole = str(path.resolve() if path.is_dir() else path.absolute())
    if path.is_dir() and (special := [character for character in "*?[" if character in whole]):
        raise DataError(
            f"dataset {path} is a folder whose path contains {special[0]!r}, which can stand for the names of other "
            "folders. Rename the folder, or give the path of a file in it."
        )
    if "::" in whole or os.path.expandvars(whole) != whole:
        raise DataError(
            f"The path of dataset {path}, {whole}, contains '::' or the name of an environment variable after '$', "
            "which the datasets library replaces. Rename the file or folder."
        )


def as_saved(tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with `eos_token` and the template of `chat_template_path`, as the trained model is saved with it.

    TRL sets both on `tokenizer` itself, but after the demonstrations are encoded. This returns a copy, because TRL
    trains the embeddings of only those new tokens that it adds.

    Raises:
        ConfigError: `eos_token` is not in the vocabulary, or there is no chat template at `chat_template_path`.
    """
    eos, path = config.eos_token, config.chat_template_path
    if eos is None and path is None:
        return tokenizer
    tokenizer, vocabulary = copy.deepcopy(tokenizer), tokenizer.get_vocab()
    if eos is not None:
        if eos not in vocabulary:
            raise ConfigError(
                f"eos_token is {eos!r}, which is not in the vocabulary of {tokenizer.name_or_path}; expected one of "
                "its tokens. Correct it, or remove it."
            )
        tokenizer.eos_token = eos
    if path is None:
        return tokenizer
    config.chat_template_path = path = model_name(path, "chat_template_path")
    if path.endswith((".jinja", ".j2")) and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text("utf-8")
        return tokenizer
    template = load_pretrained("chat template", path, AutoTokenizer.from_pretrained)
    if template.chat_template is None:
        raise ConfigError(
            f"chat_template_path is {path!r}, a tokenizer without a chat template; expected a tokenizer with one, or "
            "a .jinja file."
        )
    tokenizer.chat_template = template.get_chat_template()
    tokenizer.add_tokens([new for new in template.added_tokens_decoder.values() if new.content not in vocabulary])
    tokenizer.eos_token = template.eos_token
    return tokenizer


@report_errors
def main() -> None:
    follow_launcher()
    with start_errors():  # transformers reads the files that some settings name
        arguments, config, model_config = parse_settings(SETTINGS, elsewhere=_settings_of_train)
    refuse_token(config)
    with sole_run(config.output_dir):
        _train(arguments, config, model_config)


def _train(arguments: ColdStartArguments, config: ColdStartConfig, model_config: ModelConfig) -> None:
    name = required_model(model_config)
    check_output(
        config.output_dir,
        resume=config.resume_from_checkpoint,
        overwrite=arguments.overwrite_output_dir,
        model=name,
    )
    quantization, adapter = get_quantization_config(model_config), get_peft_config(model_config)
    if quantization is not None:
        check_quantized_training(adapter)
    source = {"revision": model_config.model_revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_pretrained("tokenizer", name, AutoTokenizer.from_pretrained, **source)
    load_pretrained("configuration", name, causal_config, **source)  # detects a wrong model early
    protocol = TagProtocol(
        as_saved(tokenizer, config),
        {},
        max_result_tokens=arguments.max_tool_result_tokens,
        chat_template_kwargs=template_arguments(arguments.chat_template_kwargs),
    )
    rows = load_rows(arguments.dataset, arguments.dataset_split)
    if protocol.tokenizer.chat_template is not None and has_text_prompts(rows):
        logger.warning(
            f"Prompts of {arguments.dataset} are text, which is encoded without the chat template. arpo-trl train, "
            "ask and eval make a user message of a text, by default after a system message. Give messages as prompts, "
            "so that the model learns the form that they use."
        )
    dataset, too_long = encode_dataset(rows, protocol, config.max_length, arguments.dataset)
    if too_long:
        logger.warning(
            f"{too_long} of {len(rows)} trajectories are longer than max_length ({config.max_length} tokens) and are "
            "left out."
        )
    config.dataset_kwargs = {"skip_prepare_dataset": True}  # ids and labels are final
    config.model_init_kwargs = loading_arguments(config, model_config)
    with start_errors(), checked_loading(check_complete):
        trainer = ColdStartTrainer(
            model=name,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            quantization_config=quantization,
            peft_config=of_revision(adapter, model_config.model_revision),
        )
    check_adapter(trainer.model, trainer.accelerator)
    warn_of_lost_steps(trainer.model, trainer.accelerator, config)
    if arguments.overwrite_output_dir:
        overwrite(config)
    show_compactly(trainer)
    resume = wants_to_resume(config.resume_from_checkpoint)
    if resume is True:
        resume = _whole_checkpoint(Path(config.output_dir))
    with closed_bars(trainer), naming(Path(config.output_dir)), until_first_step(trainer):
        trainer.train(resume_from_checkpoint=resume)
    with finished_first(trainer, Interrupts()), final_save(config.output_dir):
        if config.push_to_hub:
            named = arguments.dataset if is_hub_id(arguments.dataset) else None  # the Hub rejects cards with paths
            trainer.push_to_hub(dataset_name=named)  # also saves the model
        else:
            trainer.save_model(config.output_dir)


def _whole_checkpoint(output: Path) -> str | bool:
    """The last complete checkpoint in `output`; False if there is no checkpoint. transformers would take the last one,
    also if a kill has left it incomplete.

    Raises:
        CheckpointError: All are incomplete.
    """
    whole, faults = last_whole_checkpoint(output)
    if whole is None and faults:
        raise CheckpointError(
            f"No checkpoint in {output} is complete. {faults[0]} Delete its checkpoint folders to start a new run."
        )
    for fault in faults if is_first_rank() else ():
        logger.warning(f"A checkpoint is not used: {fault}")
    return False if whole is None else str(whole)


if __name__ == "__main__":
    main()

"""Checks of the datasets' rows and prompts at start-up, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import length_hint
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from arpo_trl.config import ARPOConfig
from arpo_trl.data.layouts import why_rejected
from arpo_trl.data.loading import EMPTY, validate_rows
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.options import ProtocolKind
from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.rollout.engines.base import lacks_embedding
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.runs.identity import dataset_identity
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

Protocols = Callable[[Dataset], Iterable[ToolProtocol]]
"""Dataset → the protocol of each of its rows."""
Form = tuple[tuple[Any, ...], ...]
LONGER = ", or give vLLM a longer context (vllm_max_model_length, or a server's --max-model-len)"
_COMPARED_ROWS = 64
"""The number of rows, spread over a dataset, that ranks compare; with their remainder, up to twice as many."""


def check_enough_prompts(train_dataset: Any, args: ARPOConfig) -> None:
    """Checks that the training data fills a generation batch. TRL drops incomplete ones, and would take no step.

    Reads the rows of one batch from a streamed dataset.

    Raises:
        DataError: It has too few rows.
    """
    size = args.generation_batch_size
    assert size is not None
    prompts = size // args.num_generations
    if isinstance(train_dataset, IterableDataset):
        rows = sum(1 for _ in train_dataset.take(prompts))
    else:
        rows = length_hint(train_dataset, prompts)  # torch's streams have no length
    if rows < prompts:
        raise DataError(
            f"The training dataset has {rows} rows, but a generation batch has {prompts} prompts: {size} completions "
            f"÷ num_generations {args.num_generations}. So no step would be taken. Add rows, or lower "
            "per_device_train_batch_size or steps_per_generation."
        )


def check_rows(datasets: Iterable[Any], reward_funcs: Collection[Any]) -> None:
    """Checks that all rows have a usable prompt and the columns for the reward functions. Skips None. Of a streamed
    dataset it only checks that there is a row; see `streams.checked_stream`.

    A reward function that needs a column has a method `check_dataset(dataset)`, which raises `DataError`.

    Raises:
        DataError: A row has no usable prompt, or lacks data that a reward function needs.
    """
    for dataset in datasets:
        if isinstance(dataset, IterableDataset) and next(iter(dataset.take(1)), None) is None:
            raise DataError(EMPTY)
        if not isinstance(dataset, Dataset):
            continue
        validate_rows(dataset)
        for function in reward_funcs:
            if (check := getattr(function, "check_dataset", None)) is not None:
                check(dataset)


def check_encoding(datasets: Sequence[Any], protocols: Protocols, embeddings: int) -> None:
    """Checks that the chat template writes each prompt, and that the model has an embedding for each token of it.

    A chat template may reject roles or their order, or leave messages out. The check tries each sequence of roles
    once. It skips streamed datasets and None.

    Raises:
        DataError: A prompt cannot be used. Names the row.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            _check_roles(dataset, protocols)
            _check_embeddings(dataset, protocols, embeddings)


def _form(prompt: Any) -> Form:
    """The role, the type of the content, and the filled fields of each message, on which a template's own text
    depends. Empty for plain text."""
    messages = [] if isinstance(prompt, str) else prompt
    return tuple(
        (message["role"], type(message["content"]), *(field for field, value in message.items() if value))
        for message in messages
    )


def _check_roles(dataset: Dataset, protocols: Protocols) -> None:
    tried = set()
    for i, (prompt, protocol) in enumerate(zip(dataset["prompt"], protocols(dataset), strict=False)):
        form = _form(prompt)
        if form in tried:
            continue
        tried.add(form)
        try:
            protocol.check_shown(prompt)
        except ConfigError:
            raise
        except DataError as error:
            raise DataError(f"Dataset row {i}: {error}") from error
        except Exception as error:  # a template can raise anything
            raise DataError(f"Dataset row {i}: {why_rejected(prompt, error)}") from error


def _check_embeddings(dataset: Dataset, protocols: Protocols, embeddings: int) -> None:
    tokenizer = next(iter(protocols(dataset))).tokenizer
    prompts = dataset["prompt"] if max(tokenizer.get_vocab().values()) >= embeddings else ()
    for i, (prompt, protocol) in enumerate(zip(prompts, protocols(dataset), strict=False)):
        if (last := max(protocol.encode_prompt(prompt), default=-1)) >= embeddings:
            raise DataError(f"Dataset row {i}: its prompt {lacks_embedding(tokenizer, last, embeddings)}")


def check_same_rows(datasets: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Checks that all ranks have the same rows in the same order. A collective.

    Compares the lengths and up to `_COMPARED_ROWS` rows; of a streamed dataset, the first 4 rows.

    Args:
        datasets: Name for errors → dataset.

    Raises:
        ConfigError: They do not. A batch is dealt to the ranks by the rows' indices, so some rows would never be
            used, or be used twice. With other lengths, a rank would wait for the others forever.
    """
    if accelerator.num_processes == 1:
        return
    ranks = gather_object([{name: _rows_seen(dataset) for name, dataset in datasets.items()}])
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        if all(rank.get(name) == ranks[0].get(name) for rank in ranks):
            continue
        if isinstance(datasets.get(name), IterableDataset):
            raise ConfigError(
                f"The processes read the streamed {name} in different orders, so that they would not share its rows, "
                "and a resumed run would read others. Give its `shuffle` a seed, as in dataset.shuffle(seed=42)."
            )
        raise ConfigError(
            f"The processes have different rows in {name}, so that they would not share its rows. All of them need "
            "all rows, in the same order. Give `shuffle` and `train_test_split` a seed, as in "
            "dataset.train_test_split(test_size=0.1, seed=42)."
        )


def _rows_seen(dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset):
        return repr(list(dataset.take(4)))
    if not isinstance(dataset, Dataset):
        return length_hint(dataset, 0)
    rows = len(dataset)
    some = sorted({*range(0, rows, max(1, rows // _COMPARED_ROWS)), rows - 1}) if rows else []
    return rows, dataset_identity(dataset.select(some))


def check_requests(prompts: Sequence[Any], requests: Sequence[GroupRequest], context: int) -> None:
    """Checks that each prompt of a rollout fits the context, since `check_prompts` cannot check streamed rows.

    Raises:
        ConfigError: A prompt leaves no token for a completion.
    """
    for prompt, request in zip(prompts, requests, strict=True):
        if (length := len(request.prompt_ids)) >= context:
            raise ConfigError(
                f"A prompt has {length} tokens, but the context is {context}, which leaves no room for a completion. "
                f"Shorten or drop its row. It begins with {str(prompt)[:200]!r}."
            )


def check_prompts(
    datasets: Sequence[Any], args: ARPOConfig, protocols: Protocols, context: int, tools: Collection[str]
) -> None:
    """Checks that each prompt fits the context. Warns if the training prompts do not explain the tools' tags.

    Args:
        datasets: The training dataset first, then the evaluation datasets. Streamed datasets and None are not checked.
        context: The maximum number of tokens of prompt and completion together.
        tools: The tools' names.

    Raises:
        ConfigError: A prompt leaves no token for a completion.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            _check_prompts_fit(dataset, protocols, context, LONGER if args.use_vllm else "")
    if args.tool_protocol == ProtocolKind.TAGS:
        _warn_of_unexplained_tags(tools, datasets[0])


def _check_prompts_fit(dataset: Dataset, protocols: Protocols, context: int, advice: str) -> None:
    most = context - 1
    # The length of the shortest encoded prompt of a form: the template's own text has no more tokens.
    shortest: dict[tuple[ToolProtocol, Form], int] = {}
    for i, (prompt, protocol) in enumerate(zip(dataset["prompt"], protocols(dataset), strict=False)):
        alike = protocol, _form(prompt)
        parts = [prompt] if isinstance(prompt, str) else [str(message) for message in prompt]
        # A token covers at least one byte, so only prompts with that many bytes need tokenization.
        if alike in shortest and shortest[alike] + sum(len(part.encode()) for part in parts) <= most:
            continue
        length = len(protocol.encode_prompt(prompt))
        shortest[alike] = min(length, shortest.get(alike, length))
        if length > most:
            raise ConfigError(
                f"Dataset row {i}: its prompt has {length} tokens, but the context is {context}, which leaves no room "
                f"for a completion. Shorten or drop the row{advice}."
            )


def _warn_of_unexplained_tags(tools: Collection[str], dataset: Any) -> None:
    """Warns if the first prompt does not name all tools as tags. For a streamed dataset, it warns always."""
    prompt = str(dataset[0]["prompt"]) if isinstance(dataset, Dataset) else ""
    missing = [name for name in tools if f"<{name}>" not in prompt]
    if missing:
        logger.warning(
            f"tool_protocol is 'tags', which adds no tools to the prompt, and the first prompt does not name "
            f"{', '.join(f'<{name}>' for name in missing)}. The model must already know that it calls a tool with "
            f"<{missing[0]}>…</{missing[0]}> and reads the result in <result>…</result>: from demonstrations (sft.py) "
            "or from a system prompt. arpo_trl.tags_system_prompt(tools) writes one for these tools; "
            "set it as system_prompt in the YAML file, or pass it to load_arpo_dataset as system_prompt. If the model "
            "has learned the tags without such a prompt, ignore this warning. For a model that was trained to call "
            "tools in its own format, set tool_protocol to 'chat_template'."
        )

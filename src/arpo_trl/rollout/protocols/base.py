"""The base class of the tool protocols.

The wrapper and the content of a tool result are encoded separately. The content's encoder has no special or added
tokens, so any content stays text, even if a page contains `<|im_end|>` or `</result><answer>`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _get_template_variables

from arpo_trl.common.user_files import is_deeper, shown
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.rollout.protocols.parsers import AUTO
from arpo_trl.rollout.protocols.sample import Template
from arpo_trl.rollout.text import control_tokens, decode_exactly
from arpo_trl.rollout.tree import Leaf, NodeKind
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.spec import ToolSpec
from arpo_trl.trl_seam import parse_response


@dataclass(frozen=True, slots=True, kw_only=True)
class BadCall:
    """A malformed tool call: the kind of fault, and the text that explains it to the model.

    BadCall(fault="empty", text="Error: the search call is empty. Write <search>…</search>.")
    """

    fault: str
    text: str


class ContentEncoder:
    """Encodes any text to ids without special or added tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"The tokenizer {type(tokenizer).__name__} has no fast backend, so text in tool results could become "
                "control tokens. Use a fast tokenizer."
            )
        state = json.loads(backend.to_str())
        state["added_tokens"] = []
        state["post_processor"] = None
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._backend.no_truncation()
        self._control_ids = frozenset(control_tokens(tokenizer))

    def __call__(self, text: str) -> list[int]:
        encoded = self._backend.encode(text, add_special_tokens=False)
        ids = encoded.ids
        if self._control_ids.isdisjoint(ids):
            return ids
        # A vocabulary may contain its control tokens as plain words, too. These are written character by character.
        written: list[int] = []
        for token, (start, end) in zip(ids, encoded.offsets, strict=True):
            written += self._characters(text[start:end]) if token in self._control_ids else [token]
        is_same = self._backend.decode(written, skip_special_tokens=False) == self._backend.decode(
            ids, skip_special_tokens=False
        )
        return written if is_same else self._characters(text)

    def _characters(self, text: str) -> list[int]:
        return [token for char in text for token in self._backend.encode(char, add_special_tokens=False).ids]


ARGUMENT_DEPTH = 50
"""The most nested arguments of a call. Files with trees are read up to a depth of 100."""
_MESSAGE_DEPTH = ARGUMENT_DEPTH + 4
"""That of a message with such a call: in its list of calls, under function and arguments."""


def with_guarded_parser(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or if it parses responses, a copy that raises a ValueError for each that it cannot parse.

    TRL continues after this error only, but a deep list in a model's text raises a RecursionError.
    """
    if not _parses(tokenizer):
        return tokenizer
    parse, guarded = tokenizer.parse_response, copy.copy(tokenizer)

    def parse_response(*args: Any, **kwargs: Any) -> Any:
        try:
            parsed = parse(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"the response cannot be parsed: {type(error).__name__}") from error
        if is_deeper(parsed, _MESSAGE_DEPTH):
            raise ValueError("the response has a value that is too deep")
        return parsed

    guarded.parse_response = parse_response
    return guarded


def _parses(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can parse responses."""
    return any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))


def message_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int], schemas: Any
) -> dict[str, Any]:
    """Return a turn as a message, parsed by the tokenizer's response template if it has one and can read the turn."""
    if _parses(tokenizer):
        with suppress(Exception):  # the parser is foreign code, and the model may write anything
            message: dict[str, Any] = parse_response(tokenizer, list(ids), prefix=list(before), tools=schemas)
            if not is_deeper(message, _MESSAGE_DEPTH):
                return message
    return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}


def filled(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without the fields that only others have.

    A dataset gives each message all fields, with None or an empty list for those that it lacks. Some templates read
    these as values.
    """
    kept = ("role", "content")
    return [{key: each[key] for key in each if key in kept or each[key] not in (None, [])} for each in messages]


THOUGHT = "<think>"
_OPENING_TOKENS = 16
"""The most tokens that the tag of a thought, with white space after it, takes."""


def _check_template_arguments(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any], schemas: Any) -> None:
    """Checks that the chat template, if there is one, reads each of the settings `given`: it ignores others.

    Raises:
        ConfigError: It does not read one.
    """
    if not given or tokenizer.chat_template is None:
        return
    read = _get_template_variables(tokenizer.get_chat_template(tools=schemas or None))
    of_all = inspect.signature(tokenizer.apply_chat_template).parameters
    if unread := [name for name in given if name not in read and name not in of_all]:
        known = sorted(read - {"messages", *of_all, *tokenizer.special_tokens_map})
        near = difflib.get_close_matches(unread[0], known, 1)
        raise ConfigError(
            f"chat_template_kwargs has {unread[0]!r}, which the tokenizer's chat template does not read"
            + (f"; did you mean {near[0]!r}? " if near else ". ")
            + (f"Its variables are {', '.join(known)}. Correct" if known else "It reads no settings. Remove")
            + " the setting, or use a template that reads it."
        )


class ToolProtocol(ABC):
    """The interface of a tool protocol.

    Args:
        tokenizer: A fast tokenizer with an EOS token and, for conversational prompts, a chat template.
        tools: The tools by name.
        max_result_tokens: Longer results are cut in the middle, with a mark at the cut. None: no limit.
        chat_template_kwargs: Passed to the chat template with every prompt.
        eos_ids: The ids at which the model stops, in addition to the tokenizer's EOS, from its generation config.
        tool_parser: Name of the parser for the calls of a chat template, see `parsers.py`.

    Raises:
        ConfigError: The tokenizer has no EOS token or no fast backend, or changes text of the protocol, or its chat
            template does not read one of `chat_template_kwargs`.
    """

    stop_strings: tuple[str, ...] = ()
    """Strings that end a turn, in addition to `eos_ids`."""
    results_open_turns: bool = True
    """Whether an observation ends with the text that opens the next turn, as the prompt does."""
    eos_ids: tuple[int, ...]
    """Ids that end a turn: the tokenizer's EOS, the model's, and the token with which the chat template ends answers.
    The first one closes a turn if an engine does not report which id ended it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Mapping[str, ToolSpec],
        *,
        max_result_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        eos_ids: Sequence[int] = (),
        tool_parser: str = AUTO,
    ):
        if tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no EOS token, so no turn could end. Set `tokenizer.eos_token`.")
        self.tokenizer = tokenizer
        self.tools = tools
        self.max_result_tokens = max_result_tokens
        self._wanted_parser = tool_parser
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._parser = tokenizer
        self._schemas = [spec.schema for spec in tools.values()]
        _check_template_arguments(tokenizer, self.chat_template_kwargs, self._schemas)
        self._template = Template(tokenizer=tokenizer, tools=self._schemas, settings=self.chat_template_kwargs)
        known = dict.fromkeys((int(tokenizer.eos_token_id), *eos_ids))
        self._known_ends = tuple(tokenizer.convert_ids_to_tokens(list(known)))
        self._answer_end = None if tokenizer.chat_template is None else self._template.end_of_answer(self._known_ends)
        if self._answer_end is not None:
            known[int(tokenizer.convert_tokens_to_ids(self._answer_end))] = None
        self.eos_ids = tuple(known)
        self._encode_text = ContentEncoder(tokenizer)
        self._cut_mark = self._encode_text("\n[… cut …]\n")

    @abstractmethod
    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the prompt's ids. Each path starts with them."""

    def check_shown(self, prompt: str | Sequence[Mapping[str, Any]]) -> None:
        """Check that the chat template writes each message of a prompt, such as a system message with the tools.

        The model's own earlier messages are not checked: many templates leave thoughts out.

        Raises:
            DataError: It leaves a message out: the prompt has the same ids with another text there.
        """
        if isinstance(prompt, str):
            return
        ids = self.encode_prompt(prompt)
        for i, message in enumerate(prompt):
            content = message["content"]
            if message["role"] in ("assistant", "tool") or not isinstance(content, str) or not content.strip():
                continue
            if (
                self.encode_prompt([*prompt[:i], {**message, "content": f"{content}\nand more"}, *prompt[i + 1 :]])
                == ids
            ):
                raise DataError(
                    f"the tokenizer's chat template leaves out the {message['role']} message {shown(content)}, so the "
                    "model would not see it. Use a role that the template writes (for example, put a system message "
                    "at the start of the first user message), or another template."
                )

    @abstractmethod
    def parse_turn(self, text: str, end: int | None = None) -> Sequence[ToolCall | BadCall]:
        """Return the tool calls in the turn `text`, in order; empty if there are none.

        `end` is the last id of the turn. None, or an id outside `eos_ids`: the turn ended without one.
        """

    def continues_after(self, text: str) -> bool:
        """Whether the stop string at the end of `text`, a turn so far, is only text, so that the turn continues."""
        return False

    @abstractmethod
    def encode_observation(self, results: Sequence[tuple[str, str]], end: int | None = None) -> list[int]:
        """Return the ids that the model sees after a turn. `results`: (tool name, text) for each call in the turn.

        `end` is the last id of the turn, as in `parse_turn`.
        """

    def decode_turn(self, ids: Sequence[int]) -> str:
        """Return the turn's text with tags and special tokens, without a final id of `eos_ids`."""
        end = len(ids) - (1 if ids and ids[-1] in self.eos_ids else 0)
        return decode_exactly(self.tokenizer, ids[:end])

    def without_calls(self, text: str, end: int | None = None) -> str:
        """Return the turn without the text inside calls that the chat template marks, which may contain any tags.

        Calls that could not be read are calls too. Calls by tags stay: their tags are part of the format.

        Args:
            text: The turn, without its last id.
            end: Its last id, as in `parse_turn`.
        """
        return text

    def whole_turns(self, prompt_ids: Sequence[int], leaf: Leaf, *, calls: bool = True) -> list[str]:
        """Return the text of each turn of a path. A turn whose thought was opened before it, by the template's text
        after a prompt or result, begins with that `<think>`. Without `calls`, the turns are those of
        `without_calls`."""
        turns, before = [], prompt_ids
        for node in leaf.nodes:
            if node.kind is NodeKind.TURN:
                text = node.text if calls else self.without_calls(node.text, node.ids[-1] if node.ids else None)
                turns.append(THOUGHT * self.opens_thought(before) + text)
            before = node.ids
        return turns

    def opens_thought(self, ids: Sequence[int]) -> bool:
        """Return whether the ids of a prompt or a result end with an open `<think>`, as some chat templates end."""
        return self.tokenizer.decode(ids[-_OPENING_TOKENS:]).rstrip().endswith(THOUGHT)

    def as_message(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any]:
        """Return the turn as TRL's tool loop passes it to rewards: role, content and, if it has calls, `tool_calls`.

        The content has no special tokens and no final EOS. `before` are the ids that open the turn: those of the
        prompt, or of the observation above the turn. Empty, if it does not open a turn (`results_open_turns`).
        """
        return message_of(self._parser, ids, before, self._schemas or None)

    def limit_notice(self) -> str:
        """The text that tells the model to answer without further calls."""
        return "No tool calls are left. Write the final answer now."

    def tool_limit_notice(self, name: str) -> str:
        """The text that tells the model to continue without the tool `name`."""
        return f"No {name} calls are left. Go on without them."

    def _encode(self, text: str) -> list[int]:
        """Encode text of the protocol, with special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_exactly(self, text: str) -> list[int]:
        """Like `_encode`, for text that every turn or result contains.

        Raises:
            ConfigError: The tokenizer changes the text on its way to ids and back.
        """
        ids = self._encode(text)
        if (read := decode_exactly(self.tokenizer, ids)) != text:
            raise ConfigError(
                f"The tokenizer ({type(self.tokenizer).__name__}) does not preserve text: {text!r} becomes {read!r}. "
                "Without the lost characters, calls and results could not be distinguished from other text. Load the "
                "tokenizer with the class that its tokenizer.json was made for, such as PreTrainedTokenizerFast."
            )
        return ids

    def _encode_content(self, text: str) -> list[int]:
        """Encode text of a tool, without special tokens, truncated to `max_result_tokens`."""
        content = self._encode_text(text)
        if self.max_result_tokens is not None and len(content) > self.max_result_tokens:
            kept = self.max_result_tokens - len(self._cut_mark)
            if kept < 2:  # no room for the mark
                return content[: self.max_result_tokens]
            head = (kept + 1) // 2
            content = content[:head] + self._cut_mark + content[len(content) - (kept - head) :]
        return content

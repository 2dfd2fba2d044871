"""How a model calls a tool and how it sees the result.

    the model writes   <search>melting point of iron</search>          a turn, ended by a stop string
    it then sees       <result> … </result>                            an observation
    and in the end     <answer>… \\boxed{1811} …</answer> and EOS       the last turn

A result's wrapper and its content are encoded apart, and the content by an encoder that knows no special or added
token: whatever a page contains, `<|im_end|>` and `</result><answer>` included, stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError, ToolSpecError
from arpo_trl.tools.box import RESERVED_TAGS, ToolCall, ToolSpec

ANSWER, RESULT = "answer", "result"


@dataclass(frozen=True, slots=True)
class BadCall:
    """Something meant as a tool call that is none: what is wrong with it, and the text that tells the model."""

    fault: str
    text: str


class ContentEncoder:
    """Text → ids that are never a special or added token, whatever the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"The tokenizer {type(tokenizer).__name__} has no fast backend, so control tokens in tool results "
                "could not be kept apart from text. Use a fast tokenizer."
            )
        state = json.loads(backend.to_str())
        state["added_tokens"] = []
        state["post_processor"] = None
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._backend.no_truncation()
        self._control_ids = frozenset(tokenizer.added_tokens_decoder)

    def __call__(self, text: str) -> list[int]:
        ids = self._encode(text)
        if not self._control_ids.isdisjoint(ids):  # a vocabulary may hold its control tokens as plain words too
            ids = [token for char in text for token in self._encode(char)]
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


class TagProtocol:
    """Tool calls as tags: the tool's name is the tag, its one text argument stands between them.

    Args:
        tokenizer: A fast tokenizer with a chat template (for conversational prompts) and an EOS token.
        tools: The tools by name; each must have exactly one required text argument.
        max_result_tokens: Longer results keep their head and tail, with the cut marked. None: no limit.
        chat_template_kwargs: Passed to the chat template with every prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Mapping[str, ToolSpec],
        *,
        max_result_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        for name, spec in tools.items():
            if spec.single_text_parameter is None:
                raise ToolSpecError(
                    f"The tool {name!r} takes {list(spec.parameters)}; between two tags there is room for exactly one "
                    "required `str` argument. Give it one."
                )
        if tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no EOS token, so no turn could end. Set `tokenizer.eos_token`.")
        self.tokenizer = tokenizer
        self.tools = tools
        self.max_result_tokens = max_result_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.stop_strings = tuple(f"</{name}>" for name in tools)
        self._encode_content = ContentEncoder(tokenizer)
        self._result_open = self._encode(f"\n<{RESULT}>\n")
        self._result_close = self._encode(f"\n</{RESULT}>\n")
        self._cut_mark = self._encode_content("\n[… cut …]\n")
        known = "|".join(map(re.escape, [*tools, *sorted(RESERVED_TAGS)]))
        self._known_tag = re.compile(rf"</?({known})>")
        self._tool_open = re.compile("|".join(f"<{re.escape(name)}>" for name in tools) or r"(?!)")
        self._tool_close = re.compile("|".join(f"</{re.escape(name)}>" for name in tools) or r"(?!)")
        self._unknown_call = re.compile(rf"<(?!/|(?:{known})>)([A-Za-z_]\w*)>[^<]*</\1>")

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids a path starts from: messages through the chat template, plain text as it is."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "The dataset's prompts are messages but the tokenizer has no chat template. Set "
                "`tokenizer.chat_template`, or give the prompts as text."
            )
        return self.tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_dict=False, **self.chat_template_kwargs
        )

    def encode_turn(self, text: str, *, last: bool) -> list[int]:
        """A demonstration's turn as the model should write it: special tokens on, EOS after the last turn."""
        return self._encode(text) + ([self.tokenizer.eos_token_id] if last else [])

    def encode_observation(self, text: str) -> list[int]:
        """A tool result as the model sees it: wrapper and content encoded apart, the content capped."""
        content = self._encode_content(text)
        if self.max_result_tokens is not None and len(content) > self.max_result_tokens:
            kept = max(self.max_result_tokens - len(self._cut_mark), 2)
            head = (kept + 1) // 2
            content = content[:head] + self._cut_mark + content[len(content) - (kept - head) :]
        return self._result_open + content + self._result_close

    def decode_turn(self, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
        """What the model wrote, tags and other special tokens included, without a final EOS."""
        end = len(ids) - (1 if ids and ids[-1] in eos_ids else 0)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def parse_turn(self, text: str) -> ToolCall | BadCall | None:
        """The call that `text` ends in, a `BadCall`, or None when the turn asks for nothing."""
        if not (closes := list(self._tool_close.finditer(text))):
            return self._missing_close(text)
        close = closes[-1]
        name = close.group()[2:-1]
        before, opened, body = text[: close.start()].rpartition(f"<{name}>")
        if not opened:
            return BadCall("unopened", f"Error: </{name}> came without <{name}>. {self._usage(name)}")
        if self._known_tag.search(body) or self._is_open(before):
            return BadCall("nested", f"Error: tags must not be nested. {self._usage(name)}")
        if not body.strip():
            return BadCall("empty", f"Error: the {name} call is empty. {self._usage(name)}")
        return ToolCall(name, {str(self.tools[name].single_text_parameter): body.strip()})

    def limit_notice(self) -> str:
        """The observation that tells a path to answer without further calls."""
        return f"No tool calls are left. Write the final answer now: <{ANSWER}>…</{ANSWER}>"

    def _missing_close(self, text: str) -> BadCall | None:
        if f"</{ANSWER}>" in text:
            return None
        if (opened := self._tool_open.search(text)) is not None:
            name = opened.group()[1:-1]
            return BadCall("unclosed", f"Error: <{name}> was not closed. {self._usage(name)}")
        if self.tools and (unknown := self._unknown_call.search(text)) is not None:
            names = ", ".join(self.tools)
            return BadCall("unknown_tool", f"Error: there is no tool {unknown.group(1)[:40]!r}. Tools: {names}.")
        return None

    def _is_open(self, text: str) -> bool:
        """Whether a tool's tag is still open at the end of `text`."""
        return any(text.count(f"<{name}>") > text.count(f"</{name}>") for name in self.tools)

    def _usage(self, name: str) -> str:
        return f"Write <{name}>…</{name}>."

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

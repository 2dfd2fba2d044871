"""`TagProtocol`, the paper's tool protocol, for any model: the tool's name is a tag.

the model writes   <search>melting point of iron</search>          a turn, ended by a stop string
it then sees       <result> … </result>                            an observation
and finally writes <answer>… \\boxed{1811} …</answer> and EOS       the last turn
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError, ToolSpecError
from arpo_trl.rollout.protocols.base import BadCall, ToolProtocol
from arpo_trl.rollout.text import decode_exactly
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.toolbox import RESERVED_TAGS, ToolSpec

ANSWER, RESULT = "answer", "result"


class TagProtocol(ToolProtocol):
    """Tool calls as tags: the tool's name is the tag, and its one text argument is the text between the tags.

    Raises:
        ToolSpecError: A tool does not have exactly one required text argument.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, ToolSpec], **settings: Any):
        for name, spec in tools.items():
            if spec.single_text_parameter is None:
                raise ToolSpecError(
                    f"The tool {name!r} takes {list(spec.parameters)}; a call between tags has exactly one required "
                    "`str` argument. Change the tool's signature to that."
                )
        super().__init__(tokenizer, tools, **settings)
        self.stop_strings = tuple(f"</{name}>" for name in tools)
        self._result_open = self._encode(f"\n<{RESULT}>\n")
        self._result_close = self._encode(f"\n</{RESULT}>\n")
        known = "|".join(map(re.escape, [*tools, *sorted(RESERVED_TAGS)]))
        self._known_tag = re.compile(rf"</?({known})>")
        self._tool_open = re.compile("|".join(f"<{re.escape(name)}>" for name in tools) or r"(?!)")
        self._tool_close = re.compile("|".join(f"</{re.escape(name)}>" for name in tools) or r"(?!)")
        self._unknown_call = re.compile(rf"<(?!/|(?:{known})>)([A-Za-z_]\w*)>[^<]*</\1>")

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the prompt's ids: messages with the chat template, plain text unchanged."""
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
        """Return the ids of a demonstration's turn, with special tokens, and with EOS after the last turn."""
        return self._encode(text) + ([self.tokenizer.eos_token_id] if last else [])

    def encode_observation(self, results: Sequence[tuple[str, str]]) -> list[int]:
        ids: list[int] = []
        for _, text in results:
            ids += self._result_open + self._encode_content(text) + self._result_close
        return ids

    def parse_turn(self, text: str) -> Sequence[ToolCall | BadCall]:
        """Return the call at the end of `text`. A turn has at most one, since the closing tag ends the turn."""
        call = self._parse_call(text)
        return () if call is None else (call,)

    def as_message(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any]:
        """Return the turn as TRL's tool loop does, but with the tags in the content: they are plain text here."""
        message = super().as_message(ids, before)
        calls = self.parse_turn(decode_exactly(self.tokenizer, ids))
        if made := [call for call in calls if isinstance(call, ToolCall)]:
            functions = [{"name": call.name, "arguments": call.arguments} for call in made]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message

    def limit_notice(self) -> str:
        return f"{super().limit_notice()[:-1]}: <{ANSWER}>…</{ANSWER}>"

    def _parse_call(self, text: str) -> ToolCall | BadCall | None:
        if not (closes := list(self._tool_close.finditer(text))):
            return self._missing_close(text)
        close = closes[-1]
        name = close.group()[2:-1]
        before, opened, body = text[: close.start()].rpartition(f"<{name}>")
        if not opened:
            return BadCall(fault="unopened", text=f"Error: </{name}> came without <{name}>. {self._usage(name)}")
        if self._known_tag.search(body) or self._is_open(before):
            return BadCall(fault="nested", text=f"Error: tags must not be nested. {self._usage(name)}")
        if not body.strip():
            return BadCall(fault="empty", text=f"Error: the {name} call is empty. {self._usage(name)}")
        return ToolCall(name=name, arguments={str(self.tools[name].single_text_parameter): body.strip()})

    def _missing_close(self, text: str) -> BadCall | None:
        if f"</{ANSWER}>" in text:
            return None
        if (opened := self._tool_open.search(text)) is not None:
            name = opened.group()[1:-1]
            return BadCall(fault="unclosed", text=f"Error: <{name}> was not closed. {self._usage(name)}")
        if self.tools and (unknown := self._unknown_call.search(text)) is not None:
            names = ", ".join(self.tools)
            return BadCall(
                fault="unknown_tool", text=f"Error: there is no tool {unknown.group(1)[:40]!r}. Tools: {names}."
            )
        return None

    def _is_open(self, text: str) -> bool:
        """Whether a tool's tag is open at the end of `text`."""
        return any(text.count(f"<{name}>") > text.count(f"</{name}>") for name in self.tools)

    def _usage(self, name: str) -> str:
        return f"Write <{name}>…</{name}>."

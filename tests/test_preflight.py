from itertools import repeat

import pytest
from datasets import Dataset

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocols import ChatTemplateProtocol
from arpo_trl.tools.spec import tool_spec
from arpo_trl.training.row_checks import _check_prompts_fit
from support import python, search, with_template


@pytest.mark.parametrize("first", [10, 400], ids=["short", "long"])
def test_a_long_conversation_is_not_encoded_if_the_template_and_its_bytes_fit(monkeypatch, first):
    protocol = ChatTemplateProtocol(
        with_template("qwen3"), {tool.__name__: tool_spec(tool) for tool in (search, python)}
    )
    encode, encoded = protocol.encode_prompt, []
    monkeypatch.setattr(protocol, "encode_prompt", lambda prompt: encoded.append(prompt) or encode(prompt))

    def talk(words: int, messages: int = 11) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": "x " * words} for i in range(messages)]

    room = len(encode(talk(10))) + sum(len(str(message)) for message in talk(10)) + 1
    rows = [{"prompt": talk(first)}, *[{"prompt": talk(10)}] * 30, *[{"prompt": talk(10, 9)}] * 30]
    context = max(room, len(encode(talk(first))) + 1)
    _check_prompts_fit(Dataset.from_list(rows), lambda _: repeat(protocol), context, "")
    # The first of each number of messages. After a long one, one more, whose template's share is known better.
    assert len(encoded) == (2 if first == 10 else 3)
    rows.append({"prompt": talk(first * 9)})
    with pytest.raises(ConfigError, match=r"row 61: its prompt has \d+ tokens, but the context is"):
        _check_prompts_fit(Dataset.from_list(rows), lambda _: repeat(protocol), context, "")

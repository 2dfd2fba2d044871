"""Tests every chat template that TRL ships, with its family's special tokens and each EOS of its models.

tests/cases/templates.jsonl contains the expected reading of each template, or the reason for its rejection.
"""

import copy
import json
import re
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from arpo_trl.errors import ConfigError, DataError
from arpo_trl.rollout.protocols import BadCall, ChatTemplateProtocol, TagProtocol
from arpo_trl.rollout.protocols.sample import Template
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.spec import tool_spec
from arpo_trl.training.row_checks import _check_prompts_fit, check_encoding
from support import cases, python, search, tokenizer, with_template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ROWS = cases("templates")
BY_NAME = {row["template"]: row for row in ROWS}


def each(rows: list[dict[str, Any]]) -> list[Any]:
    """One test for each template and EOS; those that only vLLM can parse are marked."""
    return [
        pytest.param(row, eos, id=f"{row['template']}-{eos}", marks=[pytest.mark.vllm] if row.get("vllm") else [])
        for row in rows
        for eos in row["eos"]
    ]


def family_tokenizer(row: dict[str, Any], eos: str) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tokenizer())
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in row["tokens"]])
    made.add_special_tokens({"eos_token": eos, "bos_token": row["tokens"][0]})
    made.chat_template = (TEMPLATES / f"{row['template']}.jinja").read_text("utf-8")
    return made


def protocol_of(name: str, eos: str, **settings: Any) -> ChatTemplateProtocol:
    return ChatTemplateProtocol(family_tokenizer(BY_NAME[name], eos), {"search": tool_spec(search)}, **settings)


def exchange(call_name: str, arguments: dict[str, Any], form: Any, result: str) -> list[dict[str, Any]]:
    call = {"id": "call00000", "type": "function", "function": {"name": call_name, "arguments": form(arguments)}}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": call_name, "tool_call_id": "call00000", "content": result},
    ]


def turn_with_call(protocol: ChatTemplateProtocol, row: dict[str, Any], name: str, arguments: dict[str, Any]) -> str:
    """A turn as the template writes it. Also checks what follows it."""
    made = protocol.tokenizer
    form = json.dumps if row["template"] == "deepseekv3" else dict
    messages = exchange(name, arguments, form, "facts")
    whole = made.apply_chat_template(messages, tools=protocol._schemas, tokenize=False, add_generation_prompt=True)
    observation = made.decode(
        protocol.encode_observation([(name, "facts")], made.convert_tokens_to_ids(row["call_end"]))
    )
    assert whole.endswith(row["call_end"] + observation)  # all that follows, each exactly once
    prompt = made.decode(protocol.encode_prompt(messages[:1]))
    shared = next(i for i in range(len(whole)) if whole[: i + 1] != prompt[: i + 1])
    turn = whole[whole.rfind("<", 0, shared + 1) if whole[shared - 1] == "<" else shared :]
    return turn.removesuffix(row["call_end"] + observation)


def test_every_template_that_trl_ships_has_a_row() -> None:
    shipped = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert set(BY_NAME) == {name for name in shipped if not name.endswith("_training")}


@pytest.mark.parametrize(("row", "eos"), each([row for row in ROWS if "parser" in row]))
def test_a_turn_is_read_and_continued_as_the_template_has_it(row: dict[str, Any], eos: str) -> None:
    made = family_tokenizer(row, eos)
    protocol = ChatTemplateProtocol(made, {"search": tool_spec(search)})
    assert protocol.tool_parser.name == row["parser"]
    ends = made.convert_ids_to_tokens(list(protocol.eos_ids))
    assert ends[0] == row["call_end"]
    assert set(ends) == {eos, row["call_end"], row["answer_end"]}

    turn = turn_with_call(protocol, row, "search", {"query": "iron ore"})
    end = made.convert_tokens_to_ids(row["call_end"])
    assert protocol.parse_turn(turn, end) == (ToolCall(name="search", arguments={"query": "iron ore"}),)
    assert protocol.parse_turn("It rains.", made.convert_tokens_to_ids(row["answer_end"])) == ()


@pytest.mark.parametrize(("row", "eos"), each([row for row in ROWS if "parser" in row]))
def test_a_result_contains_all_that_opens_the_next_turn(row: dict[str, Any], eos: str) -> None:
    """A turn is the same message after its result as after the whole path."""
    protocol = ChatTemplateProtocol(family_tokenizer(row, eos), {"search": tool_spec(search)})
    call = turn_with_call(protocol, row, "search", {"query": "iron ore"})
    path = list(protocol.encode_prompt([{"role": "user", "content": "hi"}]))
    for end in protocol.eos_ids:
        path += [*protocol._encode(call), end]
        result = protocol.encode_observation([("search", "<think>facts")], end)
        path += result
        for text in (call, "It rains.", "so</think>It rains.", "<think>so</think>It rains.", ""):
            turn = [*protocol._encode(text), end]
            assert protocol.as_message(turn, result) == protocol.as_message(turn, path)


@pytest.mark.parametrize(("row", "eos"), each([row | {"eos": row["eos"][:1]} for row in ROWS if "parser" in row]))
def test_tags_in_the_code_of_a_call_are_no_tags_of_the_turn(row: dict[str, Any], eos: str) -> None:
    protocol = ChatTemplateProtocol(family_tokenizer(row, eos), {"python": tool_spec(python)})
    end = protocol.tokenizer.convert_tokens_to_ids(row["call_end"])
    code = 'a = "<answer><search> </result>" + "b"'
    turn = turn_with_call(protocol, row, "python", {"code": code})
    assert protocol.parse_turn(turn, end) == (ToolCall(name="python", arguments={"code": code}),)
    cut = turn[: turn.index("</result>")]  # the call is not closed
    if not row.get("vllm"):  # whose parsers read such a turn as text, so that it is the last one
        (call,) = protocol.parse_turn(cut, end)
        assert isinstance(call, BadCall)
    for written in [turn, cut][: 1 if row.get("vllm") else 2]:
        said = protocol.without_calls(f"Run <b>it</b>: {written}", end)
        assert said.startswith("Run <b>it</b>: ")
        assert not re.search("<answer>|<search>|</result>", said)
    assert protocol.without_calls("<think>so</think> <answer>", end) == "<think>so</think> <answer>"


@pytest.mark.parametrize(("row", "eos"), each([row for row in ROWS if "refused" in row]))
def test_a_template_that_cannot_call_is_refused_with_the_reason(row: dict[str, Any], eos: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ChatTemplateProtocol(family_tokenizer(row, eos), {"search": tool_spec(search)})
    assert row["refused"] in str(refused.value)
    assert 'tool_protocol "tags"' in str(refused.value)


@pytest.mark.parametrize(("row", "eos"), each(ROWS))
def test_tags_end_a_turn_where_the_template_ends_an_answer(row: dict[str, Any], eos: str) -> None:
    made = family_tokenizer(row, eos)
    protocol = TagProtocol(made, {"search": tool_spec(search)}, eos_ids=[3])
    ends = made.convert_ids_to_tokens(list(protocol.eos_ids))
    assert ends[0] == eos
    assert protocol.eos_ids[1] == 3
    if "answer_end" in row:
        assert row["answer_end"] in ends


def test_a_call_that_ends_with_another_eos_is_one_too() -> None:
    # Llama's <|eom_id|> says that a result is awaited; its template writes <|eot_id|>
    protocol = protocol_of("llama3_1", "<|eom_id|>")
    end = protocol.tokenizer.convert_tokens_to_ids("<|eom_id|>")
    turn = '{"name": "search", "parameters": {"query": "iron"}}'
    assert protocol.parse_turn(turn, end) == (ToolCall(name="search", arguments={"query": "iron"}),)
    assert protocol.decode_turn([*protocol.tokenizer.encode(turn), end]) == turn


def test_a_result_that_the_ending_token_opens_is_opened_where_another_ended_the_turn() -> None:
    protocol = protocol_of("glm4moe", "<|endoftext|>")
    made = protocol.tokenizer
    observed = {
        token: made.decode(protocol.encode_observation([("search", "R")], made.convert_tokens_to_ids(token)))
        for token in ("<|observation|>", "<|endoftext|>")
    }
    assert observed["<|observation|>"] == "\n<tool_response>\nR\n</tool_response><|assistant|>"
    assert observed["<|endoftext|>"] == "<|observation|>" + observed["<|observation|>"]


def test_a_call_with_the_end_token_of_an_answer_becomes_an_error_for_the_model() -> None:
    protocol = protocol_of("gptoss", "<|return|>")
    turn = ' to=functions.search<|channel|>commentary json<|message|>{"query": "a"}'
    ends = {token: protocol.tokenizer.convert_tokens_to_ids(token) for token in ("<|call|>", "<|return|>")}
    assert protocol.parse_turn(turn, ends["<|call|>"]) == (ToolCall(name="search", arguments={"query": "a"}),)
    (bad,) = protocol.parse_turn(turn, ends["<|return|>"])
    assert isinstance(bad, BadCall)
    assert bad.fault == "malformed"


@pytest.mark.parametrize("case", cases("turns"), ids=lambda case: f"{case['template']}: {case['text'][:40]!r}")
def test_the_call_or_the_fault_of_a_turn(case: dict[str, Any]) -> None:
    """Calls in thoughts that are not closed, and calls with other headers than the template's."""
    protocol = protocol_of(case["template"], BY_NAME[case["template"]]["eos"][0])
    end = protocol.tokenizer.convert_tokens_to_ids(case.get("end", BY_NAME[case["template"]]["call_end"]))
    calls = protocol.parse_turn(case["text"], end)
    if "fault" in case:
        (bad,) = calls
        assert isinstance(bad, BadCall)
        assert bad.fault == case["fault"]
        assert case["says"] in bad.text
    else:
        assert calls == tuple(ToolCall(name="search", arguments={"query": query}) for query in case["calls"])


def delete_files(older_than_days: int = 0, kind: str = "all") -> str:
    """Delete files.

    Args:
        older_than_days: Only older ones.
        kind: Which.
    """
    return f"deleted {kind} older than {older_than_days}"


@pytest.mark.parametrize("case", cases("arguments"), ids=lambda case: f"{case['template']}: {case['text'][-60:]!r}")
def test_a_call_runs_only_with_all_arguments_that_it_has(case: dict[str, Any]) -> None:
    row = BY_NAME[case["template"]]
    protocol = ChatTemplateProtocol(
        family_tokenizer(row, row["eos"][0]), {"delete_files": tool_spec(delete_files)}, tool_parser=row["parser"]
    )
    (read,) = protocol.parse_turn(case["text"], protocol.tokenizer.convert_tokens_to_ids(row["call_end"]))
    if "arguments" in case:
        assert read == ToolCall(name="delete_files", arguments=case["arguments"])
    else:
        assert isinstance(read, BadCall)
        assert read.fault == "malformed"
        assert case["says"] in read.text


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("template", "parser", "end"),
    [
        ("qwen3_5_nothink", "qwen3_coder", "</function>\n</tool_call>"),
        ("muse_glimmer", "muse_glimmer", "</atem:invoke>\n</atem:function_calls>"),
    ],
)
def test_vllms_parsers_lose_no_argument(template: str, parser: str, end: str) -> None:
    row = BY_NAME[template]
    protocol = ChatTemplateProtocol(
        family_tokenizer(row, row["eos"][0]), {"delete_files": tool_spec(delete_files)}, tool_parser=parser
    )
    starts, opens, closes = {
        "qwen3_coder": ("<tool_call>\n<function=delete_files>\n", "<parameter=older_than_days>", "</parameter>"),
        "muse_glimmer": (
            ' to=delete_files<|message|><atem:function_calls>\n<atem:invoke name="delete_files">\n',
            '<atem:parameter name="older_than_days">',
            "</atem:parameter>",
        ),
    }[parser]
    eos = protocol.tokenizer.convert_tokens_to_ids(row["call_end"])
    whole = ToolCall(name="delete_files", arguments={"older_than_days": 365})
    assert protocol.parse_turn(f"{starts}{opens}365{closes}\n{end}", eos) == (whole,)
    assert protocol.parse_turn(f"{starts}{end}", eos) == (ToolCall(name="delete_files", arguments={}),)
    for wrong in (f"{opens}365\n", f"{opens}365{closes}".replace("parameter", "param")):
        (bad,) = protocol.parse_turn(f"{starts}{wrong}{end}", eos)
        assert isinstance(bad, BadCall)
        assert "It opens 1 arguments, and 0 could be read" in bad.text


def test_a_tokenizer_without_the_templates_tokens_is_refused() -> None:
    row = BY_NAME["llama3_1"] | {"tokens": ["<|begin_of_text|>"]}
    with pytest.raises(ConfigError, match="no token of the tokenizer that could end the turn"):
        ChatTemplateProtocol(family_tokenizer(row, "<|im_end|>"), {"search": tool_spec(search)})


def test_a_difference_between_template_and_rollout_shows_both() -> None:
    # an ending token that takes the white space after it, as Phi's do: the template's newline is lost, ours is not
    made = family_tokenizer(BY_NAME["qwen2_5"] | {"tokens": ["<|im_start|>"]}, "<|stop|>")
    made.add_tokens([AddedToken("<|halt|>", special=True, rstrip=True, normalized=False)])
    made.chat_template = made.chat_template.replace("<|im_end|>", "<|halt|>")
    with pytest.raises(ConfigError, match="different ids in a rollout") as refused:
        ChatTemplateProtocol(made, {"search": tool_spec(search)})
    assert "The template: " in str(refused.value)
    assert "The rollout: " in str(refused.value)


def test_a_parser_can_be_named() -> None:
    assert protocol_of("qwen3", "<|im_end|>", tool_parser="hermes").tool_parser.name == "hermes"
    with pytest.raises(ConfigError, match=r"tool_parser is 'gemma4', and no parser reads .*gemma4: read \[\]"):
        protocol_of("qwen3", "<|im_end|>", tool_parser="gemma4")
    with pytest.raises(ConfigError, match='tool_protocol is "tags"'):
        TagProtocol(tokenizer(), {}, tool_parser="hermes")


def test_an_unknown_parser_is_rejected_with_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"expected auto, tokenizer, hermes, qwen3_xml, .* with vLLM installed"):
        protocol_of("qwen3", "<|im_end|>", tool_parser="hermse")


@pytest.mark.vllm
def test_vllms_parsers_can_be_named() -> None:
    assert protocol_of("qwen3_8", "<|im_end|>", tool_parser="qwen3_coder").tool_parser.name == "qwen3_coder"


@pytest.mark.parametrize("name", ["other words", "some words", "calls other words twice"])
def test_a_model_may_call_a_tool_by_the_words_of_the_sample_call(name: str) -> None:
    """gemma4's template writes a call's name in the result again, behind the call."""
    protocol = protocol_of("gemma4", BY_NAME["gemma4"]["eos"][0])
    assert protocol.encode_observation([(name, "no such tool")], protocol.eos_ids[0])


def test_the_shared_start_of_two_texts_ends_between_tokens() -> None:
    made = Template(tokenizer=family_tokenizer(BY_NAME["qwen2_5"], "<|im_end|>"), tools=[], settings={})
    assert made.shared("a<|im_start|>b", "a<|im_start|>c") == len("a<|im_start|>")
    assert made.shared("a<|im_start|>b", "a<|im_end|>b") == 1
    assert made.shared("a<|im_start|>", "a<|im_st") == made.shared("a<|im_st", "a<|im_start|>") == 1
    assert made.shared("a<b", "a<c") == 2
    assert made.shared("abc", "ab") == 2 and made.shared("", "ab") == 0
    assert made.shared("abc", "abc") == 3


@pytest.mark.parametrize("row", [pytest.param(row, id=row["template"]) for row in ROWS])
def test_a_prompt_that_is_too_long_is_found_after_shorter_ones_of_its_roles(row: dict[str, Any]) -> None:
    protocol = TagProtocol(family_tokenizer(row, row["eos"][0]), {})
    contents = ["", "a", " \n\n", "\n\n<think>x</think> y", "漢\x00" * 20, "<|im_end|>" * 4]
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        prompts = [[{"role": role, "content": content} for role in roles] for content in contents]
        try:
            lengths = [len(protocol.encode_prompt(prompt)) for prompt in prompts]
        except Exception:  # the template does not take these roles
            continue
        for prompt, length in zip(prompts, lengths, strict=True):
            shorter = [other for other, size in zip(prompts, lengths, strict=True) if size < length]
            rows = Dataset.from_list([{"prompt": given} for given in (*shorter, prompt)])
            with pytest.raises(ConfigError, match=f"row {len(shorter)}: its prompt has {length} tokens, but the"):
                _check_prompts_fit(rows, lambda _: repeat(protocol), length, "")


def test_an_unknown_template_revision_is_identified_by_its_output() -> None:
    made = family_tokenizer(BY_NAME["qwen3"], "<|im_end|>")
    made.chat_template = "{#- a fine-tune's -#}" + made.chat_template
    assert ChatTemplateProtocol(made, {"search": tool_spec(search)}).tool_parser.name == "hermes"


def test_a_message_has_no_ending_token_whichever_it_was() -> None:
    protocol = protocol_of("qwen2_5", "<|im_end|>", eos_ids=[])
    other = protocol_of("qwen2_5", "<|endoftext|>")
    for made in (protocol, other):
        for end in made.eos_ids:
            before = made.encode_prompt([{"role": "user", "content": "hi"}])
            message = made.as_message([*made.tokenizer.encode("It rains."), end], before)
            assert message == {"role": "assistant", "content": "It rains."}


def test_messages_that_a_template_leaves_out_are_found():
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "/no_think"}
    thought = {"role": "assistant", "content": "<think>they greet</think>hello"}
    protocol_of("qwen3", "<|im_end|>").check_shown([system, user, thought, {**system, "content": " "}, user])
    with pytest.raises(DataError, match="template leaves out the developer message '/no_think', so the model"):
        protocol_of("qwen3", "<|im_end|>").check_shown([{**system, "role": "developer"}, user])
    first_of_phi3 = copy.deepcopy(tokenizer())
    first_of_phi3.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}<|assistant|>"
        "{% elif message.role == 'assistant' %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    )
    TagProtocol(first_of_phi3, {}).check_shown([user])
    rows = Dataset.from_list([{"prompt": [user]}, {"prompt": [system, user]}])
    with pytest.raises(DataError, match=r"Dataset row 1: .* leaves out the system message '/no_think'"):
        check_encoding([rows], lambda rows: [TagProtocol(first_of_phi3, {})] * len(rows), 10_000)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("qwen3", {"enable_thinking": False}, None),
        ("qwen3", {"documents": [], "continue_final_message": False}, None),  # apply_chat_template's own
        ("llama3_1", {"date_string": "1 May"}, None),  # the template sets it if it is not given
        ("gptoss", {"reasoning_effort": "low"}, None),  # read in a macro
        ("qwen3", {"enable_thinkng": False}, "'enable_thinkng', .* did you mean 'enable_thinking'"),
        ("qwen3", {"thinking": False}, "'thinking', .* did you mean 'enable_thinking'"),
        ("phi3", {"enable_thinking": False}, "does not read. It reads no settings. Remove the setting"),
    ],
)
def test_settings_that_a_template_does_not_read_are_refused(name, given, expected):
    if expected is None:
        TagProtocol(with_template(name), {}, chat_template_kwargs=given)
        return
    with pytest.raises(ConfigError, match=expected):
        TagProtocol(with_template(name), {}, chat_template_kwargs=given)

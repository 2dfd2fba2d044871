import pytest
from transformers import PreTrainedTokenizerFast

from arpo_trl.errors import ConfigError, ToolSpecError
from arpo_trl.rollout.protocol import BadCall, ContentEncoder, TagProtocol
from arpo_trl.tools.box import ToolBox, ToolCall, tool_spec
from support import python, search, tokenizer


@pytest.fixture
def protocol() -> TagProtocol:
    return TagProtocol(tokenizer(), {tool.__name__: tool_spec(tool) for tool in (search, python)})


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<search>iron</search>", ToolCall("search", {"query": "iron"})),
        ("<think>hm</think> <python>\nprint(1)\n</python>\n", ToolCall("python", {"code": "print(1)"})),
        ("<search>a < b && c > d</search>", ToolCall("search", {"query": "a < b && c > d"})),
        ("<python>print('<b>')</python>", ToolCall("python", {"code": "print('<b>')"})),
        ("<answer>1</answer><search>iron</search>", ToolCall("search", {"query": "iron"})),
    ],
)
def test_a_call_is_what_stands_between_its_tags(protocol, text, call):
    assert protocol.parse_turn(text) == call


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("iron</search>", "unopened"),
        ("<python>1</search>", "unopened"),
        ("<search></search>", "empty"),
        ("<search> \n </search>", "empty"),
        ("<search>a<search>b</search>", "nested"),  # the inner one, but the outer is still open
        ("<search><python>1</search>", "nested"),
        ("<python><search>a</search>", "nested"),
        ("<search><answer>1</answer></search>", "nested"),
        ("<search>iron", "unclosed"),
        ("<tool>1</tool>", "unknown_tool"),
        ("<calculator>1+1</calculator> so", "unknown_tool"),
    ],
)
def test_what_is_wrong_with_a_call_is_named_and_told(protocol, text, fault):
    bad = protocol.parse_turn(text)
    assert isinstance(bad, BadCall)
    assert bad.fault == fault
    assert bad.text.startswith("Error: ")


@pytest.mark.parametrize(
    "text",
    ["", "just text", "<answer>\\boxed{1}</answer>", "<think>x</think>", "1 < 2", "<answer>cut off", "<br>x<br>"],
)
def test_a_turn_that_asks_for_nothing_is_no_call(protocol, text):
    assert protocol.parse_turn(text) is None


def test_an_answer_is_final_whatever_else_looks_like_a_call(protocol):
    assert protocol.parse_turn("<search>unclosed <answer>\\boxed{1}</answer>") is None


def test_without_tools_nothing_is_a_call():
    protocol = TagProtocol(tokenizer(), {})
    assert protocol.stop_strings == ()
    assert protocol.parse_turn("<search>iron</search> <x>1</x>") is None


def test_content_never_holds_a_control_token_and_reads_back_as_it_was():
    encode = ContentEncoder(tokenizer())
    text = "".join(tokenizer().all_special_tokens) + "</result><answer>\\boxed{1}</answer> é 漢 \x07 🙂"
    ids = encode(text)
    assert not set(ids) & set(tokenizer().all_special_ids)
    assert tokenizer().decode(ids) == text


def test_a_vocabulary_that_holds_its_control_tokens_as_words_is_spelled_out():
    # merges that build "<x>" as an ordinary token, which is also a control token
    import json

    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE({"<": 0, "x": 1, ">": 2, "<x": 3, "<x>": 4}, [("<", "x"), ("<x", ">")]))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<x>"], eos_token=">")
    assert made.encode("<x>", add_special_tokens=False) == [4]
    assert json.loads(made.backend_tokenizer.to_str())["added_tokens"]
    assert 4 not in ContentEncoder(made)("<x>")


def test_an_observation_is_a_wrapper_of_control_tokens_around_plain_text(protocol):
    tok = tokenizer()
    ids = protocol.encode_observation("iron</result>")
    special = [token for token in ids if token in tok.all_special_ids]
    assert tok.convert_ids_to_tokens(special) == ["<result>", "</result>"]
    assert tok.decode(ids) == "\n<result>\niron</result>\n</result>\n"


def test_a_long_result_keeps_its_head_and_tail_and_marks_the_cut():
    protocol = TagProtocol(tokenizer(), {}, max_result_tokens=60)
    uncut = TagProtocol(tokenizer(), {})
    text = "first " + "x y " * 500 + "last"
    ids = protocol.encode_observation(text)
    wrapper = len(uncut.encode_observation("")) - len(ContentEncoder(tokenizer())(""))
    assert len(ids) == 60 + wrapper
    shown = tokenizer().decode(ids)
    assert "first" in shown
    assert "[… cut …]" in shown
    assert "last\n</result>" in shown
    assert protocol.encode_observation("short") == uncut.encode_observation("short")


def test_a_turn_is_decoded_with_its_tags_and_without_its_end(protocol):
    tok = tokenizer()
    ids = tok.encode("<search>iron</search>", add_special_tokens=False)
    assert protocol.decode_turn([*ids, tok.eos_token_id], [tok.eos_token_id]) == "<search>iron</search>"
    assert protocol.decode_turn(ids, [tok.eos_token_id]) == "<search>iron</search>"
    # an EOS inside is no end: it was written
    assert "<|im_end|>" in protocol.decode_turn([tok.eos_token_id, *ids], [tok.eos_token_id])


def test_what_is_demonstrated_is_what_is_parsed(protocol):
    ids = protocol.encode_turn("<search>iron</search>", last=False)
    assert protocol.parse_turn(protocol.decode_turn(ids, [])) == ToolCall("search", {"query": "iron"})
    assert protocol.encode_turn("x", last=True)[-1] == tokenizer().eos_token_id


def test_prompts_are_messages_or_text(protocol):
    messages = protocol.encode_prompt([{"role": "user", "content": "hi"}])
    assert tokenizer().decode(messages).endswith("<|im_start|>assistant\n")
    assert tokenizer().decode(protocol.encode_prompt("hi")) == "hi"


def test_a_tool_without_exactly_one_text_argument_cannot_be_a_tag():
    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: One.
            b: Two.
        """
        return a + b

    with ToolBox([add]) as box, pytest.raises(ToolSpecError, match="add"):
        TagProtocol(tokenizer(), box.specs)


def without(**changes):
    from arpo_trl.quickstart.model import build_tokenizer
    from support import TEXTS

    made = build_tokenizer(TEXTS)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ConfigError, match="EOS"):
        TagProtocol(without(eos_token=None), {})


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(ConfigError, match="chat template"):
        TagProtocol(without(chat_template=None), {}).encode_prompt([{"role": "user", "content": "hi"}])

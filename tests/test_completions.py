from typing import Any

from arpo_trl.rollout.protocols import ChatTemplateProtocol, TagProtocol, ToolProtocol
from arpo_trl.rollout.tree import ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource
from arpo_trl.tools.spec import tool_spec
from arpo_trl.training.completions import completion_messages
from arpo_trl.trl_seam import qwen3_template
from support import search, with_template

SPECS = {"search": tool_spec(search)}
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "iron"}}\n</tool_call>'


def path_of(protocol: ToolProtocol, turns: list[str], branches: int = 0) -> RolloutTree:
    """A path whose turns are each followed by a result, except the last, of which there are 1 + `branches`."""
    tree = RolloutTree(protocol.encode_prompt([{"role": "user", "content": "hi"}]))
    parent, end = 0, protocol.eos_ids[0]

    def turn(text: str) -> int:
        ids = [*protocol.tokenizer.encode(text, add_special_tokens=False), end]
        return tree.add_turn(parent, ids, text, [-0.5] * len(ids), []).index

    for text in turns[:-1]:
        written = turn(text)
        call = ExecutedCall(
            name="search", arguments={}, text="hot", failure=None, seconds=0.0, source=CallSource.EXECUTED
        )
        parent = tree.add_observation(
            written, protocol.encode_observation([("search", "hot")], end), [call], call.text
        ).index
    for i in range(1 + branches):
        tree.end(turn(turns[-1]), (0, 1, i) if i else (0,), StopReason.EOS)
    return tree


def messages_of(protocol: ToolProtocol, tree: RolloutTree) -> list[list[dict[str, Any]]]:
    leaves = tree.leaves()
    return completion_messages([tree.root.ids] * len(leaves), leaves, [protocol] * len(leaves))


def test_a_path_is_decoded_once_however_many_turns_it_has(monkeypatch):
    protocol = ChatTemplateProtocol(with_template("qwen3"), SPECS)
    parser, decoded = protocol._parser, []
    decode = parser.decode
    monkeypatch.setattr(parser, "decode", lambda ids, **how: decoded.append(len(ids)) or decode(ids, **how))
    tree = path_of(protocol, [CALL] * 20 + ["It melts."])
    (messages,) = messages_of(protocol, tree)
    assert sum(decoded) == sum(len(node.ids) for node in tree.nodes)
    assert [message["role"] for message in messages] == ["assistant", "tool"] * 20 + ["assistant"]
    (call,) = messages[-3]["tool_calls"]
    assert call["function"] == {"name": "search", "arguments": {"query": "iron"}}
    assert messages[-1] == {"role": "assistant", "content": "It melts."}


def test_a_turn_of_several_paths_is_parsed_once_and_each_path_has_its_own_message(monkeypatch):
    protocol = ChatTemplateProtocol(with_template("qwen3"), SPECS)
    tree = path_of(protocol, [CALL, "It melts."], branches=2)
    parse, parsed = protocol.as_message, []
    monkeypatch.setattr(protocol, "as_message", lambda ids, before: parsed.append(ids) or parse(ids, before))
    first, second, third = messages_of(protocol, tree)
    assert len(parsed) == 4  # one call, three answers
    assert first == second == third
    first[0]["tool_calls"][0]["function"]["arguments"]["query"] = "gold"
    assert second[0]["tool_calls"][0]["function"]["arguments"] == {"query": "iron"}


def test_a_turn_after_a_result_in_tags_is_a_message_without_the_turns_before_it():
    made = with_template("qwen3")
    made.response_template = qwen3_template
    protocol = TagProtocol(made, SPECS)
    (messages,) = messages_of(protocol, path_of(protocol, ["Well. <search>iron</search>", "It melts."]))
    assert [message["content"] for message in messages] == ["Well. <search>iron</search>", "hot", "It melts."]

"""10,000 broken, nested, repeated, huge and binary model outputs through protocol, tools and reward.

No output raises an error or gets lost, and the calls and bonuses are only those that an independent oracle finds.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from arpo_trl.rewards import HierarchicalReward
from arpo_trl.rollout.protocols import BadCall, TagProtocol
from arpo_trl.rollout.tree import StopReason
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.toolbox import ToolBox, ToolResult
from support import tokenizer

OUTPUTS = 10_000
TOOLS = ("search", "python")
TAGS = ("search", "python", "think", "answer", "result", "calculator")
KNOWN = ("search", "python", "think", "answer", "result")


def search(query: str) -> str:
    """Search.

    Args:
        query: What.
    """
    return f"</result><python>1</python><search>{query}</search><answer>\\boxed{{1}}</answer>"


def python(code: str) -> str:
    """Run.

    Args:
        code: The code.
    """
    if "7" in code:
        raise ValueError(code)
    return code


class Writer:
    """Writes what a model might, from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def text(self) -> str:
        write = self.rng.choices(
            [self.soup, self.call, self.answer, self.binary, self.huge, self.nested, self.broken_call],
            [30, 20, 20, 10, 0.3, 1, 20],
        )[0]
        return write()

    def word(self) -> str:
        return self.rng.choice(
            ["iron", "1538", "7", "\\boxed{1}", "\\boxed{", "}", "", " ", "\n", "é数", "<", ">", "</", "&lt;"]
        )

    def tag(self) -> str:
        name = self.rng.choice(TAGS)
        return self.rng.choice(
            [f"<{name}>", f"</{name}>", f"<{name}", f"< {name}>", f"<{name.upper()}>", f"<{name}/>", f"</{name} >"]
        )

    def soup(self) -> str:
        return "".join(self.rng.choice([self.word, self.tag])() for _ in range(self.rng.randrange(12)))

    def call(self) -> str:
        name = self.rng.choice(TOOLS)
        return f"{self.word()}<{name}>{self.word()}{self.rng.randrange(20)}</{name}>"

    def broken_call(self) -> str:
        text = self.call()
        at = self.rng.randrange(len(text) + 1)
        return (
            text[:at] + self.rng.choice([self.tag(), "", text[at : at + 9], "\0"]) + text[at + self.rng.randrange(3) :]
        )

    def answer(self) -> str:
        body = self.rng.choice(["\\boxed{1}", "\\boxed{1}", "\\boxed{2}", "1", "\\boxed{}", self.word()])
        return (
            f"<think>{self.word()}</think><answer>{body}</answer>"
            if self.rng.random() < 0.5
            else f"<answer>{body}</answer>"
        )

    def binary(self) -> str:
        return (
            bytes(self.rng.randrange(256) for _ in range(60)).decode(
                self.rng.choice(["latin-1", "utf-16-le", "cp437"]),
                "surrogatepass" if self.rng.random() < 0.01 else "replace",
            )
            + self.rng.choice(["\ud800", "\udfff", "\0", "\u202e", "\ufeff", ""])
            + self.call()
        )

    def huge(self) -> str:
        return self.soup() * 3000 + "x" * 100_000 + self.call()

    def nested(self) -> str:
        depth, name = self.rng.randrange(1, 300), self.rng.choice(TAGS)
        return f"<{name}>" * depth + self.word() + f"</{name}>" * (depth - self.rng.randrange(2))


def is_mention(text: str, start: int, end: int, name: str) -> bool:
    """Whether words precede this opening tag on its line, and a call that this tag does not open follows it."""
    words = text[text.rfind("\n", 0, start) + 1 : start].rstrip(" \t")
    if not words or words.endswith(">"):
        return False
    reopens, closes = text.find(f"<{name}>", end), text.find(f"</{name}>", end)
    if closes >= 0:
        return 0 <= reopens < closes
    others = [tool for tool in TOOLS if tool != name]
    return any(0 <= text.find(f"<{tool}>", end) < text.rfind(f"</{tool}>") for tool in others)


def tags_that_count(text: str) -> list[tuple[int, int, bool, str]]:
    """(start, end, closing, name) of each known tag but mentions and the tags in code."""
    found = [(m.start(), m.end(), m[1] == "/", m[2]) for m in re.finditer(r"<(/?)([a-z]+)>", text) if m[2] in KNOWN]
    kept, is_open = [], ""
    for start, end, closing, name in found:
        if is_open == "python" and (closing, name) != (True, "python"):
            continue
        if name in TOOLS and not closing and is_mention(text, start, end, name):
            continue
        if name in TOOLS and closing == (is_open == name) and (closing or not is_open):
            is_open = "" if closing else name
        kept.append((start, end, closing, name))
    return kept


def expected_call(text: str) -> tuple[str, str] | None:
    """(tool, argument) if `text` ends in a call: found by walking its tags, where the protocol searches and counts."""
    tags = tags_that_count(text)
    closes = [i for i, (_, _, closing, name) in enumerate(tags) if closing and name in TOOLS]
    if not closes:
        return None
    last = closes[-1]
    _, end, _, name = tags[last]
    if any(f"</{tool}>" in text[end:] for tool in TOOLS):  # the turn ended later, in code that is not closed
        return None
    if last == 0 or tags[last - 1][2] or tags[last - 1][3] != name:  # what stands before it has to be its opening
        return None
    depth: Counter[str] = Counter()
    for _, _, closing, tag in tags[: last - 1]:
        depth[tag] += -1 if closing else 1
    argument = text[tags[last - 1][1] : tags[last][0]].strip()
    if not argument or any(depth[tool] > 0 for tool in TOOLS):
        return None
    return name, argument


def is_well_formed(turns: list[str]) -> bool:
    """The format as the paper has it: one closed answer with something boxed, at the end of the last turn."""
    tags = [(closing, name) for turn in turns for _, _, closing, name in tags_that_count(turn)]
    if tags.count((False, "answer")) != 1 or any(name == "result" for _, name in tags):
        return False
    end = re.search(r"<answer>(.*)</answer>\s*\Z", turns[-1], re.DOTALL)
    if end is None or "\\boxed{" not in end[1]:
        return False
    open_tags: list[str] = []
    for closing, name in tags:
        if not closing:
            open_tags.append(name)
        elif not open_tags or open_tags.pop() != name:
            return False
    return not open_tags


def random_value(rng: random.Random) -> Any:
    return rng.choice(
        [None, True, 7, 1.5, float("nan"), [], {"a": [1]}, "", "\ud800", b"x", object(), {1, 2}, "x" * 1000]
    )


def check_result(result: ToolResult) -> None:
    assert 0 < len(result.text) <= 2000
    result.text.encode("utf-8")
    assert "\0" not in result.text
    assert result.ok == (result.failure is None)


@pytest.mark.slow
def test_no_output_raises_an_error_or_gets_an_undeserved_reward() -> None:
    writer = Writer(0)
    rng = writer.rng
    reward = HierarchicalReward()
    counts: Counter[str] = Counter()
    with ToolBox([search, python], concurrency=4, max_chars=2000) as box:
        protocol = TagProtocol(tokenizer(), box.specs, max_result_tokens=64)
        texts = [writer.text() for _ in range(OUTPUTS)]
        tickets: dict[int, tuple[int, ToolCall]] = {}
        for i, text in enumerate(texts):
            call = next(iter(protocol.parse_turn(text)), None)
            expected = expected_call(text)
            if isinstance(call, ToolCall):
                counts["call"] += 1
                assert expected == (call.name, next(iter(call.arguments.values()))), text[:300]
                tickets[box.submit(call)] = (i, call)
            else:
                assert expected is None, text[:300]
                if isinstance(call, BadCall):
                    counts["bad call"] += 1
                    call.text.encode("utf-8")
            if i % 5 == 0:  # and calls that no protocol would make
                names = ["search", "python", "", "rm -rf", "\ud800", "__init__"]
                arguments = {
                    rng.choice(["query", "code", "self", "\ud800"]): random_value(rng) for _ in range(rng.randrange(3))
                }
                odd = ToolCall(name=rng.choice(names), arguments=arguments)
                tickets[box.submit(odd)] = (-1, odd)
        done: dict[int, ToolResult] = {}
        while len(done) < len(tickets):
            arrived = box.poll(timeout_s=30)
            assert arrived, "a ticket was lost"
            done.update(arrived)

        executed: dict[int, list[dict[str, Any]]] = {}
        for ticket, (i, call) in tickets.items():
            result = done[ticket]
            check_result(result)
            assert result.ok == could_succeed(call), (call, result)
            if i % 20 == 0:  # the encoder is the slow part
                ids = protocol.encode_observation([(call.name, result.text)])
                controls = [token for token in ids if token in tokenizer().added_tokens_decoder]
                assert len(controls) == 2  # the wrapper's own, whatever the result holds
            executed.setdefault(i, []).append({"name": call.name, "ok": result.ok, "text": result.text})

    for _ in range(OUTPUTS):
        picked = [rng.randrange(OUTPUTS) for _ in range(rng.randrange(1, 4))]
        turns = [texts[i] for i in picked]
        if rng.random() < 0.3:  # enough that are right for the rest to mean something
            picked = [
                i for i in picked if i in executed and is_well_formed([texts[i] + "<answer>\\boxed{1}</answer>"])
            ]
            turns = [*(texts[i] for i in picked), "<answer>\\boxed{1}</answer>"]
        calls = [call for i in picked for call in executed.get(i, [])]
        [score] = reward.scores(
            turns=[turns],
            tool_calls=[calls],
            stop_reason=rng.choices(list(StopReason), [8, 1, 1]),
            answer=[rng.choice(["1", ["2", "1"], "iron"])],
            task=["qa"],
        )
        right = score.accuracy is not None and score.accuracy > 0
        both = {call["name"] for call in calls if call["ok"]} >= set(TOOLS)
        if score.fault is None:
            counts["well formed"] += 1
            assert is_well_formed(turns), turns
            assert score.accuracy is not None and 0 <= score.accuracy <= 1
            bonus = score.reward - score.accuracy
            assert abs(bonus - (0.1 if right and both else 0.0)) < 1e-9, (turns, calls, score)
            counts["bonus"] += bonus > 0
            counts["right without"] += right and bonus == 0
        else:
            assert (score.reward, score.accuracy) == (-1.0, None)
    # The outputs were of every kind.
    assert all(counts[kind] > 50 for kind in ("call", "bad call", "well formed", "bonus", "right without")), counts


def could_succeed(call: ToolCall) -> bool:
    """Whether the two tools above accept it and return: one text argument, under its own name."""
    wanted = {"search": "query", "python": "code"}.get(call.name)
    if wanted is None or set(call.arguments) != {wanted} or not isinstance(call.arguments[wanted], str):
        return False
    return call.name == "search" or "7" not in call.arguments["code"]


def test_the_oracles_tell_right_from_wrong() -> None:
    assert expected_call("a <search>iron</search>") == ("search", "iron")
    assert expected_call("<python><search>iron</search>") is None  # nested
    assert expected_call("<search> </search>") is None
    assert expected_call("<search>a</search><python>b</search>") is None
    assert is_well_formed(["<search>a</search>", "<think>b</think><answer>\\boxed{1}</answer>"])
    assert not is_well_formed(["<answer>\\boxed{1}</answer>", "more"])
    assert not is_well_formed(["<think><answer>\\boxed{1}</answer>"])
    assert not could_succeed(ToolCall(name="python", arguments={"code": "7"}))
    assert could_succeed(ToolCall(name="python", arguments={"code": "1"}))

"""The Python examples of the README and of the pages run as printed, with small models and data of their own."""

from __future__ import annotations

import functools
import json
import re
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import Script, ScriptedEngine, ScriptedTurn
from arpo_trl.tools.builtin import ToolArguments, build_tools
from loopback import Loopback, Reply
from support import ANSWER, ON_CPU, Scripted, tiny_model, with_template

ROOT = Path(__file__).parents[1]


def example(page: str, part: str) -> str:
    """The example of that page with this part."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    (code,) = [block for block in found if part in block]
    return code


def run(code: str, **names: Any) -> dict[str, Any]:
    """All names after the example has run with these."""
    exec(code, names)
    return names


def read_after(tool: Any, *turns: str) -> list[str]:
    """The results that a path reads which makes these calls, one per turn, and answers."""
    made = Scripted(lambda request, context: [*turns, ANSWER][request.key[-1]], leaves=2, at_root=2, tools=[tool])
    leaf, _ = made().trees[0].leaves()
    return [call.text for call in leaf.calls]


def test_the_tool_of_the_readme_can_be_called() -> None:
    weather = run(example("README.md", "def weather"), lookup=lambda city: f"rain in {city}")["weather"]
    assert read_after(weather, "<weather>Oslo</weather>") == ["rain in Oslo"]


def test_the_tool_with_a_connection_runs_in_the_thread_of_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with sqlite3.connect("prices.sqlite") as filled:
        filled.execute("CREATE TABLE prices (metal TEXT, price REAL)")
        filled.execute("INSERT INTO prices VALUES ('iron', 0.5)")
    filled.close()
    names = run(example("docs/tools.md", "def price"))
    assert read_after(names["price"], "<price>iron</price>", "<price>gold</price>") == ["0.5", "not traded"]
    names["db"].close()


def test_the_search_service_is_found_by_its_name_and_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pages = [{"name": "Iron", "href": "https://a.test/", "body": "Melts at 1538 °C."}]
    with Loopback(lambda asked: Reply({"pages": pages})) as server:
        code = example("docs/tools.md", "class Library").replace("http://127.0.0.1:9000", server.url)
        of_python = run(code, __name__="library")["library_search"]()
        (of_settings,) = build_tools(ToolArguments(tools=["search"], search_provider="library"))
        found = "Page 1: Iron (https://a.test/): Melts at 1538 °C."
        assert [search("melting point of iron") for search in (of_python, of_settings)] == [found, found]


def writes_and_reads(request: Any, context: str) -> ScriptedTurn:
    """Each path makes a table, writes its address into it, and reads it; entropy rises after the first call."""
    *address, depth = request.key[1:]
    name = "/".join(map(str, address))
    calls = ["CREATE TABLE seen (path)", f"INSERT INTO seen VALUES ('{name}')", "SELECT path FROM seen"]
    text = [*(f"<sql>{call}</sql>" for call in calls), ANSWER][depth]
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1, 0.1][depth]])


def test_a_branch_of_the_tool_with_state_has_a_database_of_its_own() -> None:
    sql = run(example("docs/tools.md", "def sql(statement"))["sql"]
    made = Scripted(writes_and_reads, leaves=4, at_root=2, tools=[sql], max_tool_calls=4)
    read = {leaf.address: leaf.calls[-1].text for leaf in made().trees[0].leaves()}
    assert read == {(0,): '[["0"]]', (0, 1, 0): '[["0/1/0"]]', (1,): '[["1"]]', (1, 1, 0): '[["1/1/0"]]'}


def test_a_reward_reads_a_field_of_the_rows() -> None:
    by_gold = run(example("docs/rewards.md", "def by_gold"))["by_gold"]
    completions = [[{"role": "assistant", "content": text}] for text in ("a fig", "a car")]
    assert by_gold(completions, [["fig", "date"]] * 2) == [1.0, 0.0]


def test_a_score_of_verl_is_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    verl = ModuleType("my_verl")
    verl.compute_score = lambda source, text, truth, extra=None: float(truth in text)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_verl", verl)
    score = run(example("docs/from-verl.md", "compute_score"))["score"]
    rows = {"data_source": ["math"] * 2, "reward_model": [{"ground_truth": "34"}] * 2, "extra_info": [{}] * 2}
    assert score(turns=[["<python>17 * 2</python>", "It is 34."], ["It is 35."]], **rows) == [1.0, 0.0]


def test_the_reward_falls_with_the_number_of_calls() -> None:
    few_calls = run(example("docs/rewards.md", "def few_calls"))["few_calls"]
    calls = [[], [{"name": "search"}], [{"name": "search"}, {"name": "python"}]]
    assert few_calls(completions=["a", "b", "c"], tool_calls=calls, turns=[]) == [1, 1 / 2, 1 / 3]


def test_the_questions_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text(json.dumps({"prompt": "Is it warm?", "answer": "yes", "task": "qa"}) + "\n")
    code, described = (example("docs/data.md", part) for part in ('jsonl")\n', "def weather"))
    (row,) = run(code)["dataset"]
    assert (row["prompt"][-1]["content"], row["answer"], row["task"]) == ("Is it warm?", ["yes"], "qa")
    (row,) = run(described)["dataset"]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert "<weather>" in row["prompt"][0]["content"] and "Tell today's weather." in row["prompt"][0]["content"]


# Trainers ------------------------------------------------------------------------------------------------------------


IMPORTED = "from arpo_trl import ARPOConfig, ARPOTrainer\n"


def trained(code: str, folder: Path, script: Script, **names: Any) -> ARPOTrainer:
    """The trainer that the example makes, after a step with a tiny model whose turns `script` writes."""
    tokenizer = with_template("qwen3")
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(folder / "model")
    assert tokenizer.eos_token_id is not None
    engine = ScriptedEngine(tokenizer, SamplingParams(eos_ids=(tokenizer.eos_token_id,), stop_strings=()), script)
    made: ARPOTrainer = run(
        re.sub(r"Qwen/[\w.-]+", str(folder / "model"), code.replace(IMPORTED, "")),
        ARPOTrainer=functools.partial(ARPOTrainer, engine=engine),
        ARPOConfig=functools.partial(ARPOConfig, max_steps=1, save_strategy="no", **ON_CPU),
        **names,
    )["trainer"]
    made.train()
    return made


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def multiplies(request: Any, context: str) -> str:
    """Each path multiplies the numbers of its question, and answers with the result."""
    a, b = map(int, re.findall(r"What is (\d+) \* (\d+)\?", context)[-1])
    return [call("multiply", a=a, b=b), str(a * b)][request.key[-1]]


def test_a_grpo_trainer_with_its_tools_and_rewards_becomes_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = trained(example("docs/from-grpo.md", "# was GRPOTrainer"), tmp_path, multiplies)
    assert made._last is not None
    assert [leaf.address for leaf in made._last.rollout.leaves] == [(i,) for i in range(8)]
    (product,) = {call.text for leaf in made._last.rollout.leaves for call in leaf.calls}
    assert int(product) > 100 * 200
    assert made.state.log_history[0]["reward"] == 1


def buys(request: Any, context: str) -> ScriptedTurn:
    """Each path buys tea, then a cup that it cannot pay, and ends; entropy rises after the first call."""
    text = [call("buy", item="tea", price=3), call("buy", item="cup", price=9), "so"][request.key[-1]]
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1][request.key[-1]]])


def test_the_shop_of_20_lines_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 dollars 7 are left after the tea, and the cup costs 9: a reward of 1 on all paths."""
    monkeypatch.chdir(tmp_path)
    shop = run(example("docs/environments.md", "class Shop"))["Shop"]
    code = example("docs/environments.md", "environment_factory=Shop")
    made = trained(code.replace("range(10, 60)", "[10]"), tmp_path, buys, Shop=shop)
    assert made._last is not None
    leaves = made._last.rollout.leaves
    assert len(leaves) == 16 and sum(len(leaf.address) > 1 for leaf in leaves) == 8
    results = ("Bought tea. 7 dollars are left.", "That is too expensive.")
    assert {tuple(call.text for call in leaf.calls) for leaf in leaves} == {results}
    assert made.state.log_history[0]["rewards/Shop/mean"] == 1

"""The classes in docs/environments.md work as shown."""

from __future__ import annotations

import asyncio
import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.environments.kind import Forking, environment_kind
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.toolbox import ToolBox
from openenv_client import GenericEnvClient, packaged_client
from support import Scripted, tokenizer, until

PAGE = (Path(__file__).parents[1] / "docs" / "environments.md").read_text("utf-8")


def shown(name: str, url: str = "http://127.0.0.1:8000", client: Any = GenericEnvClient) -> Any:
    """The class of this name that the page defines, with its server at `url`."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {name}:" in block]
    scope: dict[str, Any] = {"GenericEnvClient": client}
    code = code.replace("from openenv.core.generic_client import GenericEnvClient\n", "")
    exec(code.replace("http://127.0.0.1:8000", url), scope)
    return scope[name]


@pytest.mark.parametrize(("name", "tools"), [("Shop", {"buy"}), ("Lake", {"move"}), ("Remote", {"buy"})])
def test_every_class_is_an_environment(name: str, tools: set[str]) -> None:
    kind = environment_kind(shown(name), timeout_s=60)
    assert set(kind.methods) == tools
    kind.check_row(["prompt", "budget", "seed"])
    assert kind.forking is (Forking.REPLAY if name == "Remote" else Forking.COPY)


def test_the_game_of_gymnasium_is_won_and_a_copy_has_its_own_state() -> None:
    lake = shown("Lake")()
    assert lake.reset(seed=0, prompt="") == " You are on field 0."
    # The lake, with holes at H:  SFFF / FHFH / FFFH / HFFG
    assert [lake.move(way) for way in ("down", "down", "right")][-1] == "You are on field 9."
    branch = copy.deepcopy(lake)
    assert branch.move("up") == "You are on field 5. The game is over."
    assert (branch.get_reward(), branch.move("up")) == (0, "The game is over.")
    assert [lake.move(way) for way in ("down", "right", "right")][-1] == "You are on field 15. The game is over."
    assert lake.get_reward() == 1


def test_the_game_takes_calls_as_tags() -> None:
    environments = Environments(environment_kind(shown("Lake"), 60), timeout_s=60)
    with ToolBox(environments.tools) as toolbox:
        (call,) = TagProtocol(tokenizer(), toolbox.specs).parse_turn("<move>left</move>")
    assert call.arguments == {"direction": "left"}


@pytest.fixture
def url() -> Iterator[str]:
    """A server of another process that speaks OpenEnv's protocol."""
    command = [sys.executable, str(Path(__file__).with_name("openenv_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def other_sessions(url: str) -> int:
    return asyncio.run(_other_sessions(url))


async def _other_sessions(url: str) -> int:
    client = await GenericEnvClient(base_url=url).connect()
    try:
        return int((await client.state())["step_count"])
    finally:
        await client.close()


def buys(request: Any, context: str) -> ScriptedTurn:
    """Each path buys what is named after its address, then what the server does not sell, and answers."""
    *address, depth = request.key[1:]
    text = [f"<buy>{'/'.join(map(str, address))}</buy>", "<buy>nothing</buy>", "so"][depth]
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1][depth]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "client", [lambda: GenericEnvClient, pytest.param(packaged_client, marks=pytest.mark.openenv)]
)
def test_the_client_of_a_server_branches_by_replay_in_sessions_of_its_own(url: str, client: Any) -> None:
    environments = Environments(environment_kind(shown("Remote", url, client()), 60), timeout_s=60, keeps=True)
    made = Scripted(buys, leaves=3, at_root=1, tools=environments.tools)
    with made.toolbox:
        try:
            texts = environments.begin({0: {"seed": 7}, 1: {"seed": 8}}, made.toolbox, lambda: None)
            requests = [GroupRequest(id=i, prompt_ids=made.protocol.encode_prompt(f"Buy{texts[i]}")) for i in range(2)]
            trees = made.sampler.sample(requests, seed=(0,)).trees
            assert other_sessions(url) == 6
        finally:
            environments.close_kept()
    assert texts == {0: " with seed 7", 1: " with seed 8"}
    for tree, seed in zip(trees, (7, 8), strict=True):
        assert [leaf.address for leaf in tree.leaves()] == [(0,), (0, 1, 0), (1,)]
        for leaf in tree.leaves():
            bought, refused = (call.text for call in leaf.calls)
            assert bought == f"seed {seed}, {'1' if leaf.address == (1,) else '0'}"
            assert refused == "Error: RuntimeError: Server error: not sold (code: EXECUTION_ERROR)"
    assert environments.instances.take_counts().replays == 2
    assert environments.instances.live == 0
    until(lambda: other_sessions(url) == 0)  # the client does not wait for the end of a session


@pytest.mark.slow
@pytest.mark.openenv
def test_sessions_of_a_class_without_close_are_those_of_one_rollout(url: str) -> None:
    """A class as in TRL's documentation, with OpenEnv's client called without `await`."""
    client_class = packaged_client()

    class Trls:
        def __init__(self) -> None:
            self.client = client_class(base_url=url)

        def reset(self, seed: int, **row: Any) -> str:
            return str(self.client.reset(seed=seed).observation["text"])

        def buy(self, item: str) -> str:
            """Buys an item.

            Args:
                item: What to buy.
            """
            return str(self.client.step({"item": item}).observation["text"])

    environments = Environments(environment_kind(Trls, 60), timeout_s=60, keeps=True)
    for rollout in range(3):
        made = Scripted(buys, leaves=3, at_root=1, tools=environments.tools)
        with made.toolbox:
            texts = environments.begin({0: {"seed": rollout}}, made.toolbox, lambda: None)
            request = GroupRequest(id=0, prompt_ids=made.protocol.encode_prompt(f"Buy{texts[0]}"))
            (tree,) = made.sampler.sample([request], seed=(0,)).trees
        assert [leaf.calls[0].text for leaf in tree.leaves()] == [
            f"seed {rollout}, 0", f"seed {rollout}, 0", f"seed {rollout}, 1"
        ]  # fmt: skip
        environments.close_kept()
        assert environments.instances.live == 0
        until(lambda: other_sessions(url) == 3)  # one per path; those that count end a moment later

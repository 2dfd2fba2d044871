"""The classes in docs/environments.md work as shown."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.environments.kind import Forking, environment_kind
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.toolbox import ToolBox
from support import tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "environments.md").read_text("utf-8")


def shown(name: str) -> Any:
    """The class of this name that the page defines."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {name}:" in block]
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope[name]


@pytest.mark.parametrize(("name", "tools"), [("Shop", {"buy"}), ("Lake", {"move"}), ("Remote", {"buy"})])
def test_every_class_is_an_environment(name: str, tools: set[str]) -> None:
    kind = environment_kind(shown(name), timeout_s=10)
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
    environments = Environments(environment_kind(shown("Lake"), 10), timeout_s=10)
    with ToolBox(environments.tools) as toolbox:
        (call,) = TagProtocol(tokenizer(), toolbox.specs).parse_turn("<move>left</move>")
    assert call.arguments == {"direction": "left"}

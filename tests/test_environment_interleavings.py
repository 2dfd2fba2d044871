"""10,000 random interleavings of calls, forks, failures and interrupts: no state is shared, and none is left open."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from arpo_trl.errors import ToolError
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.sampler import GroupRequest
from arpo_trl.tools.environments.kind import environment_kind
from arpo_trl.tools.environments.state import Environments
from support import Scripted

INTERLEAVINGS = 10_000
"""Trees, each with another order of calls, forks, failures and interrupts."""
CONFIGURATIONS = 25
NAMES = "abcd"
"""Of the groups of a rollout. Each has a tree."""


class World:
    """What happens to all environments of a scenario: which fail, and how often each was closed."""

    def __init__(self) -> None:
        self.luck = random.Random(0)
        self.opened: list[Any] = []
        self.closed: Counter[int] = Counter()

    def fails(self, share: float) -> bool:
        return self.luck.random() < share


WORLD = World()


class Ledger:
    """A list of entries, to which calls append. Some calls fail after they changed it."""

    def __init__(self) -> None:
        WORLD.opened.append(self)
        self.entries: list[str] = []

    def reset(self, name: str) -> str:
        if WORLD.fails(0.01):
            raise OSError("no ledger")
        self.entries = [name]
        return f"the ledger of {name}"

    def put(self, entry: str) -> str:
        """Put an entry.

        Args:
            entry: What.
        """
        self.entries.append(entry)
        if entry.endswith("bad"):
            raise ToolError(f"bad entry {len(self.entries)}")
        return " ".join(self.entries)

    def digest(self) -> int:
        return hash(tuple(self.entries)) + WORLD.fails(0.02)  # some copies seem to differ

    def close(self) -> None:
        WORLD.closed[id(self)] += 1


class ForkingLedger(Ledger):
    def fork(self) -> ForkingLedger:
        if WORLD.fails(0.1):
            raise OSError("no second ledger")
        made = ForkingLedger()
        made.entries = list(self.entries)
        return made


class CopiedLedger(Ledger):
    copyable = True

    def __deepcopy__(self, memo: Any) -> CopiedLedger:
        made = CopiedLedger()
        made.entries = list(self.entries)
        return made


class LateLedger(Ledger):
    async def put(self, entry: str) -> str:  # type: ignore[override]
        """Put an entry.

        Args:
            entry: What.
        """
        return Ledger.put(self, entry)


def script(request: Any, context: str) -> ScriptedTurn:
    """Random turns of the path: none, one or several calls, with entropies that branch or not."""
    luck = random.Random(repr((request.seed, request.key)))
    depth = request.key[-1]
    entry = f"{luck.randrange(10)}{'bad' * (luck.random() < 0.2)}"
    text = "so" if depth > 2 or luck.random() < 0.35 else f"<put>{entry}</put>"
    return ScriptedTurn(text=text, entropies=[luck.random()], polls=luck.randint(1, 3))


def replayed(calls: list[Any], name: str) -> list[str]:
    """The entries of a fresh ledger after the calls of a leaf."""
    fresh = [name]
    for call in calls:
        fresh.append(call.arguments["entry"])
        if call.ok:
            assert call.text == " ".join(fresh)
    return fresh


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Ledger, ForkingLedger, CopiedLedger, LateLedger])
def test_no_state_is_shared_and_all_are_closed(kind):
    def interrupt() -> None:
        if luck.random() < interrupts:
            raise KeyboardInterrupt

    rollouts = INTERLEAVINGS // 4 // len(NAMES)  # by each kind
    seen: Counter[str] = Counter()
    for configuration in range(CONFIGURATIONS):
        luck = random.Random(f"{kind.__name__} {configuration}")
        leaves = luck.choice([2, 2, 3, 3, 4, 5])
        environments = Environments(
            environment_kind(kind, 5.0),
            timeout_s=5.0,
            limit=luck.choice([None, len(NAMES) * leaves, len(NAMES) * leaves + 1]),
            keeps=luck.random() < 0.8,
        )
        made = Scripted(
            script,
            leaves=leaves,
            at_root=luck.randint(1, leaves),
            rule=luck.choice([Threshold, Ranked])(branches_per_fork=luck.randint(1, 2)),
            tools=environments.tools,
            schedule=luck.choice(list(RolloutSchedule)),
            max_tool_calls=3,
        )
        made.sampler.between_events = interrupt
        made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
        prompt = made.protocol.encode_prompt("what is the answer")
        with made.toolbox:
            for seed in range(rollouts // CONFIGURATIONS):
                WORLD.__init__()  # type: ignore[misc]
                WORLD.luck = random.Random(seed)
                interrupts = luck.choice([0.0, 0.0, 0.05])
                try:
                    environments.begin({i: {"name": name} for i, name in enumerate(NAMES)}, made.toolbox, interrupt)
                    requests = [GroupRequest(id=group, prompt_ids=prompt) for group in range(len(NAMES))]
                    trees = made.sampler.sample(requests, seed=(configuration, seed)).trees
                    seen["finished"] += 1
                    for group, tree in enumerate(trees):
                        for leaf in tree.leaves():
                            if not environments.keeps:
                                continue
                            instance = environments.kept[group, leaf.address]
                            if instance is None:
                                seen["failed"] += 1
                                continue
                            assert instance.value.entries == replayed(leaf.calls, NAMES[group])
                            seen["checked"] += 1
                    kept = [instance.value for instance in environments.kept.values() if instance is not None]
                    assert len({id(value) for value in kept}) == len(kept)
                    assert not any(WORLD.closed[id(value)] for value in kept)
                except KeyboardInterrupt:
                    seen["interrupted"] += 1
                environments.close_kept()
                assert environments.instances.live == 0
                assert WORLD.closed == Counter(id(value) for value in WORLD.opened)
                counts = environments.instances.take_counts()
                seen.update(forks=counts.forks, replays=counts.replays, refused=counts.refused_forks)
                assert environments.instances._limit is None or counts.live_max <= environments.instances._limit
    assert seen["finished"] + seen["interrupted"] == rollouts
    assert min(seen["interrupted"], seen["checked"], seen["forks"] + seen["replays"]) > 100 and seen["refused"] > 20

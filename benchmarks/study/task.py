"""A tabular copy of the quickstart's task whose expected reward is exact, and an engine that samples it.

A world state is what a path has found so far. In each state the policy chooses one action, which is a turn of one
token: a call, whose result is the next state, or the answer, which ends the path. The policy sees `seen[state]`
instead of the state: whether a computed number is right stays hidden until the reward.

A token of a turn is `TURN + (kind × states + state) × actions + action`, a token of a result is the next state, and a
prompt is one token, its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from arpo_trl.rollout.engines.base import Turn, TurnRequest, TurnStop
from arpo_trl.rollout.tree import Leaf, NodeKind, RolloutTree
from arpo_trl.tools.calls import ToolCall

TURN = 1_000_000
"""The first token id of turns. Lower ids are prompts and results."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of K kinds of prompts, S world states and A actions; the last action answers. Every path starts in 0.

    Task(shares=[1.0], moves=[[[1], [1]]], rewards=[0.0, 1.0], seen=[0, 1], tools=["look_up"], calls=2, start=...)
    """

    shares: np.ndarray
    """(K,): the probability of each kind."""
    moves: np.ndarray
    """(K, S, A − 1): the next state after each call."""
    rewards: np.ndarray
    """(S,): the reward of an answer in each state."""
    seen: np.ndarray
    """(S,): the state that the policy sees."""
    tools: Sequence[str]
    """The tool of each call."""
    calls: int
    """The maximum number of results on a path. A notice and one last turn follow them."""
    logits: np.ndarray
    """(seen states, A): the policy before training."""
    offsets: np.ndarray
    """(K, seen states, A): untrained offsets of the logits for each kind."""

    @property
    def actions(self) -> int:
        return len(self.tools) + 1

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(K, S, A): the policy with these logits (seen states, A), in each world state."""
        shifted = (logits[None] + self.offsets)[:, self.seen]
        shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
        return shifted / shifted.sum(axis=-1, keepdims=True)

    def value(self, logits: np.ndarray) -> float:
        """The exact expected reward of a path."""
        policy = self.probabilities(logits)
        answers = policy[..., -1] * self.rewards  # (K, S)
        value = answers + (1.0 - policy[..., -1]) * answers  # at the limit: the notice and one last turn
        kinds = np.arange(len(self.shares))[:, None, None]
        for _ in range(self.calls):
            value = answers + (policy[..., :-1] * value[kinds, self.moves]).sum(axis=-1)
        return float(self.shares @ value[:, 0])

    def read(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The kinds, world states and actions of tokens of turns."""
        places, actions = np.divmod(tokens - TURN, self.actions)
        kinds, states = np.divmod(places, len(self.rewards))
        return kinds, states, actions

    def reward(self, leaf: Leaf) -> float:
        """The reward of a finished path: that of its answer, 0 if it ended without one."""
        _, state, action = self.read(np.array(leaf.ids[-1]))
        return float(self.rewards[state]) if action == self.actions - 1 else 0.0


class TabularEngine:
    """Samples turns of one token from a table. It finishes each turn at the next poll."""

    forward_s = 0.0
    max_length = None
    has_logprobs = True

    def __init__(self, task: Task):
        self.vocab_size = task.actions
        self._task = task
        self._finished: list[Turn] = []

    def load(self, logits: np.ndarray) -> None:
        """Sample from the policy with these logits (seen states, A) from now on."""
        policy = self._task.probabilities(logits)
        logprobs = np.log(policy)
        self._cumulative = policy.cumsum(axis=-1).tolist()
        self._logprobs = logprobs.tolist()
        self._entropies = -(policy * logprobs).sum(axis=-1)

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def submit(self, request: TurnRequest) -> None:
        kind, state = request.ids[0], request.ids[-1] if len(request.ids) > 1 else 0
        uniform, actions = request.seed / 2**64, self._task.actions
        passed = sum(uniform >= edge for edge in self._cumulative[kind][state])
        action = min(passed, actions - 1)  # rounding may leave the last edge below 1
        turn = Turn(
            id=request.id,
            ids=[TURN + (kind * len(self._task.rewards) + state) * actions + action],
            logprobs=[self._logprobs[kind][state][action]],
            entropies=[float(self._entropies[kind, state])],
            stop=TurnStop.EOS,
        )
        self._finished.append(turn)

    def poll(self, timeout_s: float) -> list[Turn]:
        finished, self._finished = self._finished, []
        return finished


class TabularProtocol:
    """A minimal protocol for `TreeSampler`: the text of a turn is its token, that of a result the next state."""

    stop_strings = ()
    eos_ids = ()

    def __init__(self, task: Task):
        self._task = task

    @property
    def tokenizer(self) -> Any:
        """The sampler looks up the largest id, since those of turns exceed the number of actions, which is V."""
        kinds, states = self._task.moves.shape[:2]
        return SimpleNamespace(get_vocab=lambda: {"last": TURN + kinds * states * self._task.actions - 1})

    def decode_turn(self, ids: Sequence[int]) -> str:
        return str(ids[0])

    def parse_turn(self, text: str, end: int | None = None) -> list[ToolCall]:
        place, action = divmod(int(text) - TURN, self._task.actions)
        kind, state = divmod(place, len(self._task.rewards))
        if action == self._task.actions - 1:
            return []
        return [ToolCall(name=self._task.tools[action], arguments={"to": int(self._task.moves[kind, state, action])})]

    def encode_observation(self, results: Sequence[tuple[str, str]], end: int | None = None) -> list[int]:
        text = results[0][1]
        if text == self.limit_notice():  # the state does not change
            assert end is not None
            return [(end - TURN) // self._task.actions % len(self._task.rewards)]
        return [int(text)]

    def limit_notice(self) -> str:
        return "No calls are left."


def look_up(to: int) -> str:
    """Look up one of the two entities.

    Args:
        to: The state that the look-up leads to.
    """
    return str(to)


def compute(to: int) -> str:
    """Compute the answer from what was found.

    Args:
        to: The state that the computation leads to.
    """
    return str(to)


look_up.run_in = compute.run_in = "main"  # type: ignore[attr-defined]


def executed_calls(trees: Sequence[RolloutTree]) -> int:
    return sum(len(node.calls) for tree in trees for node in tree.nodes if node.kind is NodeKind.OBSERVATION)


# Scenarios -----------------------------------------------------------------------------------------------------------

_UNKNOWN, _POINTER, _FOUND = range(3)
_NOTHING, _WRONG, _RIGHT = range(3)
_LOOK_A, _LOOK_B, _COMPUTE, _MISCOMPUTE, _ANSWER = range(5)
_STATES = [(a, b, number) for a in range(3) for b in range(3) for number in range(3)]
_SEEN = sorted({(a, b, number > _NOTHING) for a, b, number in _STATES})
_ALIAS_SHARE = 0.5
_FOLLOWS_POINTER = 0.6
"""The probability that the policy looks up a pointer's name, before training."""


def _next(state: tuple[int, int, int], action: int, aliases: tuple[bool, bool]) -> tuple[int, int, int]:
    a, b, number = state
    if action == _LOOK_A:
        return _POINTER if a == _UNKNOWN and aliases[0] else _FOUND, b, number
    if action == _LOOK_B:
        return a, _POINTER if b == _UNKNOWN and aliases[1] else _FOUND, number
    right = action == _COMPUTE and a == b == _FOUND
    return a, b, _RIGHT if right else _WRONG


def _demonstrated(seen: tuple[int, int, bool]) -> np.ndarray:
    """(A,): the policy after a cold start. It knows the order of the calls, and often computes the wrong thing."""
    a, b, computed = seen
    chances = np.full(5, 0.02)
    if computed:
        chances[_ANSWER] = 0.92
    elif a != _FOUND:
        chances[_LOOK_A] = 0.92 if a == _UNKNOWN else _FOLLOWS_POINTER
        chances[_LOOK_B] += (0.0 if a == _UNKNOWN else 0.92 - _FOLLOWS_POINTER) * (b != _FOUND)
    elif b != _FOUND:
        chances[_LOOK_B] = 0.92 if b == _UNKNOWN else _FOLLOWS_POINTER
    else:
        chances[_COMPUTE] = 0.3
    chances[_MISCOMPUTE] += max(0.0, 1.0 - chances.sum())
    return chances / chances.sum()


def _quickstart(difficulties: Sequence[float], opening: float) -> Task:
    """The quickstart's question: two look-ups, which aliases make three or four, a computation and an answer.

    Args:
        difficulties: For each equally frequent class of prompts, the decrease of the logit of the correct computation.
        opening: The increase of the logit of an answer without a search at the root.
    """
    aliases = [(first, second) for first in (False, True) for second in (False, True)]
    kinds = [(pair, hardness) for pair in aliases for hardness in difficulties]
    share = {True: _ALIAS_SHARE, False: 1.0 - _ALIAS_SHARE}
    logits = np.log(np.stack([_demonstrated(seen) for seen in _SEEN]))
    logits[_SEEN.index((_UNKNOWN, _UNKNOWN, False)), _ANSWER] += opening
    offsets = np.zeros((len(kinds), len(_SEEN), 5))
    offsets[:, :, _COMPUTE] = -np.array([hardness for _, hardness in kinds])[:, None]
    return Task(
        shares=np.array([share[first] * share[second] / len(difficulties) for (first, second), _ in kinds]),
        moves=np.array(
            [
                [[_STATES.index(_next(state, action, pair)) for action in range(_ANSWER)] for state in _STATES]
                for pair, _ in kinds
            ]
        ),
        rewards=np.array([float(number == _RIGHT) for _, _, number in _STATES]),
        seen=np.array([_SEEN.index((a, b, number > _NOTHING)) for a, b, number in _STATES]),
        tools=["look_up", "look_up", "compute", "compute"],
        calls=6,
        logits=logits,
        offsets=offsets,
    )


SCENARIOS = {
    "as is": _quickstart(difficulties=[0.0], opening=0.0),
    "heterogeneous prompts": _quickstart(difficulties=[-2.5, 1.5], opening=0.0),
    "uncertain opening": _quickstart(difficulties=[-1.5], opening=4.2),
}
"""Tables with the same structure: equal prompts, two difficulties, and first turns that often answer at once."""

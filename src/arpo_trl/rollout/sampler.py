"""The event loop that grows one tree per prompt.

Turns and tool calls are submitted; whatever finishes first grows its tree and leads to the next submission. Nobody
waits for a slower sibling, tools run while others decode, and each turn asks only for the tokens its path has left.

With `schedule="rounds"` tool results are taken in together, in the order of their calls, once nothing is left to
decode. That costs some overlap and makes a run repeat bit for bit, whatever the tools' timing.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.branching import BranchBudget, BranchDecision, BranchPolicy, BranchRule
from arpo_trl.rollout.engines.base import Engine, Event, Probe, Turn, TurnFailed, TurnRequest, TurnStop
from arpo_trl.rollout.protocol import BadCall, ToolProtocol
from arpo_trl.rollout.tree import Address, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.box import PastCall, ToolBox, ToolCall, ToolResult

IDLE_POLL_S = 0.05
"""How long one wait for the tools, or for the engine, may last while only one of them has work."""
BUSY_POLL_S = 0.002
"""How long a wait for the engine may hold up looking at the tools."""


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """How a group is sampled. Lengths are in tokens; `max_length` is the model's context, prompt included.

    `max_tool_calls` is for all tools together and ends the calling; `max_calls_of` is for single tools, whose calls
    beyond it are answered with a notice while others go on.
    """

    num_generations: int
    initial_rollouts: int
    max_completion_length: int
    max_length: int
    max_tool_calls: int
    entropy_probe_tokens: int = 20
    policy: BranchPolicy = field(default_factory=BranchPolicy)
    schedule: RolloutSchedule = RolloutSchedule.OVERLAP
    max_calls_of: Mapping[str, int] = field(default_factory=dict)

    def without_branching(self, num_generations: int) -> SamplerSettings:
        """The same for evaluation: every path starts at the root."""
        return replace(self, num_generations=num_generations, initial_rollouts=num_generations)


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt to be rolled out. `id` numbers the prompt within the step, over all ranks."""

    id: int
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of one request of a stream: its tree, or why there is none, and its seconds from start to end."""

    id: int
    tree: RolloutTree | None
    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class RolloutTimes:
    """Seconds of one `sample` call: all of it, in model forwards, and waiting for tools with nothing to decode."""

    total_s: float
    forward_s: float
    tool_wait_s: float
    sync_s: float

    @property
    def own_s(self) -> float:
        """The sampler's own: everything but forwards, waiting for tools and getting the weights in place."""
        return self.total_s - self.forward_s - self.tool_wait_s - self.sync_s


@dataclass(frozen=True, slots=True)
class Rollout:
    """The finished trees, in the order of their requests, and what was counted on the way, one number per tree."""

    trees: list[RolloutTree]
    times: RolloutTimes
    topups: list[int]
    """Leaves that were started at the root because no branch could supply them any more."""
    turns_in_sequence: list[int]
    """The longest chain of turns that had to follow one another; what started late counts after what it waited for."""


@dataclass(slots=True)
class _Group:
    """Everything about one prompt that lives and dies with it."""

    id: int
    tree: RolloutTree
    budget: BranchBudget
    branches: bool
    """Whether there was a budget to begin with; without one nothing is decided."""
    started_s: float = field(default_factory=time.perf_counter)
    error: Exception | None = None
    """What ended it early, in a stream."""
    starts: int = 0
    topups: int = 0
    longest_chain: int = 0
    live: dict[Address, int] = field(default_factory=dict)
    """For each live path the number of tool results it may still branch at."""
    candidates: list[tuple[_Path, Sequence[float]]] = field(default_factory=list)
    """Paths that wait for the decision on the observation they continue, with its probe entropies."""


@dataclass(frozen=True, slots=True)
class _Path:
    """A live path: what its current turn continues, and what it may still do."""

    group: _Group
    address: Address
    parent: int
    """The root or the observation that the current turn hangs under; the turn itself once that is written."""
    ids: list[int]
    """Prompt and path up to and with `parent`."""
    depth: int = 0
    """Turns above `parent` and with it, inherited ones included."""
    waited: int = 0
    """Turns in sequence that this path had to wait for besides its own."""
    results: int = 0
    """Tool results received, refusals of malformed calls included."""
    calls_of: Mapping[str, int] = field(default_factory=dict)
    """How often each tool was called, refusals left out."""
    may_call: bool = True
    decides: bool = False
    """The probe of the current turn decides whether the observation above it branches."""
    root_entropies: Sequence[float] = ()
    last_entropies: Sequence[float] = ()
    last_request: int | None = None
    """The request of the last turn above the current one."""


@dataclass(slots=True)
class _Calling:
    """The calls of a turn: its path goes on when the last one is answered."""

    path: _Path
    calls: Sequence[ToolCall | BadCall]
    answered: dict[int, ExecutedCall] = field(default_factory=dict)

    @property
    def in_order(self) -> list[ExecutedCall]:
        return [self.answered[i] for i in range(len(self.calls))]


class TreeSampler:
    """Rolls prompts out into trees with one engine, one protocol and one set of tools."""

    def __init__(
        self,
        engine: Engine,
        toolbox: ToolBox,
        protocol: ToolProtocol,
        settings: SamplerSettings,
        eos_ids: Sequence[int],
    ):
        self.engine = engine
        self.toolbox = toolbox
        self.protocol = protocol
        self.settings = settings
        self.eos_ids = tuple(eos_ids)
        self.between_events: Callable[[], None] = _nothing
        """Called between any two events; what it raises ends the rollout, as an interrupt does."""

    def sample(
        self,
        requests: Sequence[GroupRequest],
        *,
        seed: tuple[int | str, ...],
        settings: SamplerSettings | None = None,
    ) -> Rollout:
        """One finished tree of exactly `num_generations` leaves per request.

        Args:
            seed: With the request's id and a turn's place in its tree, seeds every draw: same seed, same tree.
            settings: Others than the sampler's own, for this call.

        Raises:
            ConfigError: A prompt leaves no room for a completion.
            EngineError: The engine broke its contract.
        """
        return _Run(self, settings or self.settings, seed)(requests)

    def stream(
        self,
        requests: Iterable[GroupRequest],
        *,
        seed: tuple[int | str, ...],
        groups_at_once: int,
        settings: SamplerSettings | None = None,
    ) -> Iterator[Finished]:
        """Each request's outcome as soon as it is there; a new one starts whenever fewer than `groups_at_once` are on.

        What fails for one request, a prompt without room included, is its outcome and stops no other. A request is
        asked for when there is a place for it, so `requests` may be as long as it likes.

        Raises:
            EngineError: The engine as a whole broke its contract or lost its server.
        """
        return _Run(self, settings or self.settings, seed).stream(requests, groups_at_once)


class _Run:
    """One call of `sample`: all state that must not outlive it."""

    def __init__(self, sampler: TreeSampler, settings: SamplerSettings, seed: tuple[int | str, ...]):
        self.engine, self.toolbox, self.protocol = sampler.engine, sampler.toolbox, sampler.protocol
        self.between_events = sampler.between_events
        self.eos_ids = sampler.eos_ids
        self.settings = settings
        self.seed = seed
        self.ranked = settings.policy.rule is BranchRule.RANKED
        self.writing: dict[int, _Path] = {}
        self.calling: dict[int, tuple[_Calling, int]] = {}
        self.requests = 0
        self.tool_wait_s = 0.0
        self.isolates = False
        """Whether what goes wrong in a group ends that group alone."""

    def __call__(self, requests: Sequence[GroupRequest]) -> Rollout:
        start, forward_before = time.perf_counter(), self.engine.forward_s
        with self.engine.session():
            sync_s = time.perf_counter() - start
            groups = [self._start(request) for request in requests]
            while self.writing or self.calling:
                for group in self._advance():
                    self._branch(group)
            closing = time.perf_counter()
        end = time.perf_counter()
        for group in groups:
            group.tree.check(self.settings.num_generations)
        forward_s = self.engine.forward_s - forward_before
        return Rollout(
            [group.tree for group in groups],
            RolloutTimes(end - start, forward_s, self.tool_wait_s, sync_s + end - closing),
            [group.topups for group in groups],
            [group.longest_chain for group in groups],
        )

    def stream(self, requests: Iterable[GroupRequest], groups_at_once: int) -> Iterator[Finished]:
        self.isolates = True
        waiting = iter(requests)
        live: set[int] = set()
        with self.engine.session():
            while True:
                while len(live) < groups_at_once and (request := next(waiting, None)) is not None:
                    try:
                        self._start(request)
                    except Exception as error:
                        self._forget(request.id)
                        yield Finished(request.id, None, _described(error), 0.0)
                    else:
                        live.add(request.id)
                if not live:
                    return
                for group in self._advance():
                    if group.error is None:
                        self._isolated(group, partial(self._branch, group))
                    if group.error is not None or not group.live:
                        live.discard(group.id)
                        yield self._finished(group)

    def _finished(self, group: _Group) -> Finished:
        seconds = time.perf_counter() - group.started_s
        if group.error is None:
            self._isolated(group, partial(group.tree.check, self.settings.num_generations))
        if group.error is not None:
            return Finished(group.id, None, _described(group.error), seconds)
        return Finished(group.id, group.tree, None, seconds)

    def _isolated(self, group: _Group, step: Callable[[], None]) -> None:
        """Does `step`; in a stream what it raises ends only its group."""
        try:
            step()
        except Exception as error:
            if not self.isolates:
                raise
            group.error = error
            self._forget(group.id)

    def _forget(self, group: int) -> None:
        """Drops what is under way for a group; what comes of it will be nobody's."""
        self.writing = {id: path for id, path in self.writing.items() if path.group.id != group}
        self.calling = {ticket: call for ticket, call in self.calling.items() if call[0].path.group.id != group}

    # Events ----------------------------------------------------------------------------------------------------------

    def _advance(self) -> list[_Group]:
        """The groups in which something happened, after waiting if nothing had."""
        self.between_events()
        touched: dict[int, _Group] = {}
        if self.writing:
            for event in self.engine.poll(BUSY_POLL_S if self.calling else IDLE_POLL_S):
                if (path := self.writing.get(event.id)) is None:
                    continue  # its group has failed
                touched[path.group.id] = path.group
                self._isolated(path.group, partial(self._take, path, event))
        for ticket, result in self._tool_results():
            if (waited_for := self.calling.pop(ticket, None)) is None:
                continue
            calling, i = waited_for
            call = calling.calls[i]
            assert isinstance(call, ToolCall)
            calling.answered[i] = ExecutedCall(
                call.name, call.arguments, result.text, result.failure, result.seconds, result.source
            )
            touched[calling.path.group.id] = calling.path.group
            if len(calling.answered) == len(calling.calls):
                self._isolated(calling.path.group, partial(self._observe, calling.path, calling.in_order))
        return list(touched.values())

    def _take(self, path: _Path, event: Event) -> None:
        if isinstance(event, Probe):
            self.writing[event.id] = self._probed(path, event.entropies)
            return
        del self.writing[event.id]
        if isinstance(event, TurnFailed):
            raise EngineError(event.reason)
        self._wrote(path, event)

    def _tool_results(self) -> list[tuple[int, ToolResult]]:
        rounds = self.settings.schedule is RolloutSchedule.ROUNDS
        if not self.calling or (rounds and self.writing):
            return []
        start = time.perf_counter()  # while paths are written too: tools that run in this thread run here
        results = self.toolbox.poll(0.0 if self.writing else IDLE_POLL_S)
        while rounds and len(results) < len(self.calling):
            self.between_events()
            results += self.toolbox.poll(IDLE_POLL_S)
        self.tool_wait_s += time.perf_counter() - start
        return sorted(results, key=lambda result: result[0])

    def _probed(self, path: _Path, entropies: Sequence[float]) -> _Path:
        """The path after the first tokens of its current turn are known."""
        if path.depth == 0 and not path.root_entropies:
            path = replace(path, root_entropies=entropies)
        if path.decides:
            path.group.candidates.append((path, entropies))
            path = replace(path, decides=False)
        return self._alive(path)

    def _wrote(self, path: _Path, turn: Turn) -> None:
        path = self._probed(path, turn.entropies)  # changes nothing where a Probe came before
        text = self.protocol.decode_turn(turn.ids, self.eos_ids)
        node = path.group.tree.add_turn(path.parent, turn.ids, text, turn.logprobs, turn.entropies)
        path = replace(
            path,
            parent=node.index,
            ids=path.ids + turn.ids,
            depth=path.depth + 1,
            last_entropies=turn.entropies,
            last_request=turn.id,
        )
        path.group.longest_chain = max(path.group.longest_chain, path.waited + path.depth)
        calls = () if turn.stop is TurnStop.LENGTH else self.protocol.parse_turn(text)
        if turn.stop is TurnStop.LENGTH:
            self._end(path, StopReason.LENGTH)
        elif not calls:
            self._end(path, StopReason.EOS)
        elif not path.may_call:
            self._end(path, StopReason.CALL_LIMIT)
        elif path.results >= self.settings.max_tool_calls:
            notice = self.protocol.limit_notice()
            results = [(_name(call), notice) for call in calls]
            self._write_under(replace(path, may_call=False), self.protocol.encode_observation(results), (), notice)
        else:
            self._call(path, calls)

    def _call(self, path: _Path, calls: Sequence[ToolCall | BadCall]) -> None:
        """Sends off a turn's calls; those that are none, or one too many, are answered at once."""
        limits, made = self.settings.max_calls_of, Counter(path.calls_of)
        path = replace(path, calls_of=made)
        calling = _Calling(path, calls)
        for i, call in enumerate(calls):
            notice = None
            if isinstance(call, BadCall):
                calling.answered[i] = ExecutedCall(call.fault, {}, call.text, "bad_call", 0.0, "refused")
                continue
            if path.results + i >= self.settings.max_tool_calls:
                notice = self.protocol.limit_notice()
            elif made[call.name] >= limits.get(call.name, math.inf):
                notice = self.protocol.tool_limit_notice(call.name)
            if notice is not None:
                calling.answered[i] = ExecutedCall(call.name, call.arguments, notice, "call_limit", 0.0, "refused")
            else:
                made[call.name] += 1
                self.calling[self.toolbox.submit(self._with_history(path, call))] = (calling, i)
        if len(calling.answered) == len(calls):
            self._observe(path, calling.in_order)
        else:
            self._alive(path)

    def _with_history(self, path: _Path, call: ToolCall) -> ToolCall:
        """The call with what its path called the tool with before, if the tool asks for that."""
        if (spec := self.toolbox.specs.get(call.name)) is None or not spec.wants_history:
            return call
        before = [past for node in path.group.tree.path(path.parent) for past in node.calls]
        made = [past for past in before if past.name == call.name and past.source != "refused"]
        return replace(call, history=tuple(PastCall(past.arguments, past.failure) for past in made))

    def _observe(self, path: _Path, calls: Sequence[ExecutedCall]) -> None:
        """Shows the path what came of its calls and lets it write on."""
        path = replace(path, results=path.results + len(calls), decides=path.group.branches)
        ids = self.protocol.encode_observation([(call.name, call.text) for call in calls])
        self._write_under(path, ids, calls, "\n".join(call.text for call in calls))

    def _write_under(self, path: _Path, ids: list[int], calls: Sequence[ExecutedCall], text: str) -> None:
        """Adds an observation and submits the turn under it, if the path has room for both."""
        if self._room(path.group, len(path.ids) + len(ids)) < 1:
            self._end(path, StopReason.LENGTH)
            return
        node = path.group.tree.add_observation(path.parent, ids, calls, text)
        path = replace(path, parent=node.index, ids=path.ids + ids)
        if path.decides and self.settings.policy.rule is BranchRule.RELEASED:  # decided from the turn before: the lag
            path = self._probed(path, path.last_entropies)
        self._write(path)

    # Paths -----------------------------------------------------------------------------------------------------------

    def _start(self, request: GroupRequest) -> _Group:
        settings = self.settings
        budget = BranchBudget(settings.num_generations - settings.initial_rollouts, settings.policy.branches_per_fork)
        group = _Group(request.id, RolloutTree(request.prompt_ids), budget, branches=budget.remaining > 0)
        if self._room(group, len(request.prompt_ids)) < 1:
            raise ConfigError(
                f"Prompt {request.id} has {len(request.prompt_ids)} tokens and the context is {settings.max_length}: "
                "no room for a completion. Shorten or drop the prompt."
            )
        self._start_at_root(group, settings.initial_rollouts, waited=0)
        return group

    def _start_at_root(self, group: _Group, count: int, waited: int) -> None:
        for _ in range(count):
            path = _Path(group, (group.starts,), 0, group.tree.root.ids, waited=waited)
            group.starts += 1
            self._write(path)

    def _write(self, path: _Path) -> None:
        """Submits the path's next turn."""
        key = (path.group.id, *path.address, path.depth)
        request = TurnRequest(
            self.requests,
            path.ids,
            self._room(path.group, len(path.ids)),
            self.settings.entropy_probe_tokens,
            self._draw("turn", key),
            key,
            path.last_request,
        )
        self.requests += 1
        self.writing[request.id] = self._alive(path)
        self.engine.submit(request)

    def _alive(self, path: _Path) -> _Path:
        """The path itself, its group told how many tool results it may still branch at."""
        to_come = max(0, self.settings.max_tool_calls - path.results) if path.may_call else 0
        path.group.live[path.address] = to_come + path.decides
        return path

    def _end(self, path: _Path, reason: StopReason) -> None:
        path.group.tree.end(path.parent, path.address, reason)
        del path.group.live[path.address]

    def _room(self, group: _Group, length: int) -> int:
        """Tokens left for a path whose ids, prompt included, are `length` long."""
        settings = self.settings
        return min(len(group.tree.root.ids) + settings.max_completion_length, settings.max_length) - length

    # Branching -------------------------------------------------------------------------------------------------------

    def _branch(self, group: _Group) -> None:
        """Decides what has been probed since the last look, branches, and tops up what can no longer be spent."""
        if self.ranked and (group.live or not group.budget.remaining):
            return
        candidates = sorted(group.candidates, key=lambda candidate: (candidate[0].address, candidate[0].depth))
        group.candidates = []
        decide = group.budget.rank if self.ranked else group.budget.serve
        decisions = decide([self._decide(path, entropies) for path, entropies in candidates])
        for (path, _), decision in zip(candidates, decisions, strict=True):
            group.tree.nodes[path.parent].decision = decision
            waited = group.longest_chain - path.depth if self.ranked else path.waited
            for j in range(decision.granted):
                self._write(replace(path, address=(*path.address, path.depth, j), decides=False, waited=waited))
        topups = group.budget.top_up(() if self.ranked else group.live.values())
        group.topups += topups
        self._start_at_root(group, topups, waited=group.longest_chain)

    def _decide(self, path: _Path, entropies: Sequence[float]) -> BranchDecision:
        coin = random.Random(self._draw("branch", (path.group.id, *path.address, path.depth))).random()
        return self.settings.policy.decide(entropies, path.root_entropies, self.engine.vocab_size, coin)

    def _draw(self, what: str, key: tuple[int, ...]) -> int:
        """A seed that is this rollout's, and this place's in it, alone."""
        digest = hashlib.blake2b(repr((*self.seed, what, key)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def _nothing() -> None:
    pass


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _name(call: ToolCall | BadCall) -> str:
    return call.name if isinstance(call, ToolCall) else call.fault

"""The event loop that grows one tree per prompt.

Turns and tool calls are submitted; whatever finishes first grows its tree and leads to the next submission. Nobody
waits for a slower sibling, tools run while others decode, and each turn asks only for the tokens its path has left.

With `schedule="rounds"` tool results are taken in together, in the order of their calls, once nothing is left to
decode. That costs some overlap and makes a run repeat bit for bit, whatever the tools' timing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.engines.base import Engine, Event, Probe, Turn, TurnFailed, TurnRequest, TurnStop
from arpo_trl.rollout.protocols import BadCall, ToolProtocol
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, LivePath, Moment
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import Address, BranchDecision, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.state import PathStates
from arpo_trl.tools.toolbox import ToolBox, ToolResult

IDLE_POLL_S = 0.05
"""How long one wait for the tools, or for the engine, may last while only one of them has work."""
BUSY_POLL_S = 0.002
"""How long a wait for the engine may hold up looking at the tools."""


Score = Callable[[int, RolloutTree], Sequence[float]]
"""The rewards of a tree's finished leaves, in their order, given the id of its request."""


@dataclass(frozen=True, slots=True)
class TreeSettings:
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
    rule: BranchRule = field(default_factory=Threshold)
    schedule: RolloutSchedule = RolloutSchedule.OVERLAP
    max_calls_of: Mapping[str, int] = field(default_factory=dict)

    def without_branching(self, num_generations: int) -> TreeSettings:
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
class RolloutBatch:
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
    context: BranchContext
    branches: bool
    """Whether there was a budget to begin with; without one nothing is decided."""
    started_s: float = field(default_factory=time.perf_counter)
    error: Exception | None = None
    """What ended it early, in a stream."""
    starts: int = 0
    topups: int = 0
    longest_chain: int = 0
    live: dict[Address, LivePath] = field(default_factory=dict)
    candidates: list[tuple[_Path, Candidate]] = field(default_factory=list)
    """Observations that the rule has not decided on yet, or may decide on again, and the paths that continue them."""


@dataclass(frozen=True, slots=True)
class _Path:
    """A live path: what its current turn continues, and what it may still do."""

    group: _Group
    address: Address
    parent: int
    """The root or the observation that the current turn hangs under; the turn itself once that is written."""
    ids: list[int]
    """Prompt and path up to and with `parent`."""
    states: PathStates
    """What the path's tool calls act on."""
    states_for_branches: PathStates | None = None
    """A fork as of the observation above the current turn; None where nothing branches, or that has been decided."""
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
    """Whether the observation above the current turn has still to be offered to the branch rule."""
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
        settings: TreeSettings,
        eos_ids: Sequence[int],
        score: Score | None = None,
    ):
        """`score` is for branch rules that read the rewards of finished leaves.

        Raises:
            ConfigError: The branch rule reads rewards, and there is no `score`.
        """
        self.engine = engine
        self.toolbox = toolbox
        self.protocol = protocol
        self.settings = settings
        self.eos_ids = tuple(eos_ids)
        self.score = score
        self._check_score(settings)
        self.between_events: Callable[[], None] = _nothing
        """Called between any two events; what it raises ends the rollout, as an interrupt does."""

    def sample(
        self,
        requests: Sequence[GroupRequest],
        *,
        seed: tuple[int | str, ...],
        settings: TreeSettings | None = None,
    ) -> RolloutBatch:
        """One finished tree of exactly `num_generations` leaves per request.

        Args:
            seed: With the request's id and a turn's place in its tree, seeds every draw: same seed, same tree.
            settings: Others than the sampler's own, for this call.

        Raises:
            ConfigError: A prompt leaves no room for a completion, or the branch rule broke its contract.
            EngineError: The engine broke its contract.
        """
        return self._run(settings, seed)(requests)

    def stream(
        self,
        requests: Iterable[GroupRequest],
        *,
        seed: tuple[int | str, ...],
        groups_at_once: int,
        settings: TreeSettings | None = None,
    ) -> Iterator[Finished]:
        """Each request's outcome as soon as it is there; a new one starts whenever fewer than `groups_at_once` are on.

        What fails for one request, a prompt without room included, is its outcome and stops no other. A request is
        asked for when there is a place for it, so `requests` may be as long as it likes.

        Raises:
            EngineError: The engine as a whole broke its contract or lost its server.
        """
        return self._run(settings, seed).stream(requests, groups_at_once)

    def _run(self, settings: TreeSettings | None, seed: tuple[int | str, ...]) -> _Run:
        if settings is not None:
            self._check_score(settings)
        return _Run(self, settings or self.settings, seed)

    def _check_score(self, settings: TreeSettings) -> None:
        if settings.rule.moment is Moment.LEAVES_SCORED and self.score is None:
            raise ConfigError(
                f"The branch rule {settings.rule.name!r} reads the rewards of finished leaves while their tree grows, "
                "but nothing computes them here: ARPOTrainer rewards whole trees. Choose another branch_rule, or give "
                "TreeSampler a `score`."
            )


class _Run:
    """One call of `sample`: all state that must not outlive it."""

    def __init__(self, sampler: TreeSampler, settings: TreeSettings, seed: tuple[int | str, ...]):
        self.engine, self.toolbox, self.protocol = sampler.engine, sampler.toolbox, sampler.protocol
        self.between_events, self.score = sampler.between_events, sampler.score
        self.eos_ids = sampler.eos_ids
        self.settings = settings
        self.seed = seed
        self.writing: dict[int, _Path] = {}
        self.calling: dict[int, tuple[_Calling, int]] = {}
        self.open_states: dict[PathStates, None] = {}
        """To be closed; ordered."""
        self.requests = 0
        self.tool_wait_s = 0.0
        self.isolates = False
        """Whether what goes wrong in a group ends that group alone."""

    def __call__(self, requests: Sequence[GroupRequest]) -> RolloutBatch:
        start, forward_before = time.perf_counter(), self.engine.forward_s
        with self.engine.session(), self._closing_states():
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
        return RolloutBatch(
            [group.tree for group in groups],
            RolloutTimes(end - start, forward_s, self.tool_wait_s, sync_s + end - closing),
            [group.topups for group in groups],
            [group.longest_chain for group in groups],
        )

    def stream(self, requests: Iterable[GroupRequest], groups_at_once: int) -> Iterator[Finished]:
        self.isolates = True
        waiting = iter(requests)
        live: set[int] = set()
        with self.engine.session(), self._closing_states():
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
        """Drops what is under way for a group, and closes its states; what comes of it will be nobody's."""
        self.writing = {id: path for id, path in self.writing.items() if path.group.id != group}
        self.calling = {ticket: call for ticket, call in self.calling.items() if call[0].path.group.id != group}
        for states in [states for states in self.open_states if states.group == group]:
            self._close(states)

    # States of tools -------------------------------------------------------------------------------------------------

    @contextmanager
    def _closing_states(self) -> Iterator[None]:
        """In the end, however it comes, closes the states that are open."""
        try:
            yield
        finally:
            for states in list(self.open_states):
                self._close(states)

    def _opened(self, states: PathStates) -> PathStates:
        self.open_states[states] = None
        return states

    def _close(self, states: PathStates) -> None:
        del self.open_states[states]
        states.close()

    def _write_branch(self, path: _Path, address: Address) -> None:
        """Submits an extra turn under the observation above the path's turn, with a fork of the states as of there."""
        assert path.states_for_branches is not None  # kept as long as there was something to grant
        states = self._opened(path.states_for_branches.fork())
        self._write(replace(path, address=address, states=states, states_for_branches=None))

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
        return self._offered(path, entropies) if path.decides else self._alive(path)

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
                calling.answered[i] = ExecutedCall(
                    call.fault, {}, call.text, ToolFailure.BAD_CALL, 0.0, CallSource.REFUSED
                )
                continue
            if path.results + i >= self.settings.max_tool_calls:
                notice = self.protocol.limit_notice()
            elif made[call.name] >= limits.get(call.name, math.inf):
                notice = self.protocol.tool_limit_notice(call.name)
            if notice is not None:
                calling.answered[i] = ExecutedCall(
                    call.name, call.arguments, notice, ToolFailure.CALL_LIMIT, 0.0, CallSource.REFUSED
                )
            else:
                made[call.name] += 1
                self.calling[self.toolbox.submit(call, path.states)] = (calling, i)
        if len(calling.answered) == len(calls):
            self._observe(path, calling.in_order)
        else:
            self._alive(path)

    def _observe(self, path: _Path, calls: Sequence[ExecutedCall]) -> None:
        """Shows the path, and its states, what came of its calls and lets it write on."""
        for call in calls:
            if call.source is not CallSource.REFUSED:
                path.states.record(ToolCall(name=call.name, arguments=call.arguments), call.failure)
        path = replace(path, results=path.results + len(calls), decides=path.group.branches)
        ids = self.protocol.encode_observation([(call.name, call.text) for call in calls])
        self._write_under(path, ids, calls, "\n".join(call.text for call in calls))

    def _write_under(self, path: _Path, ids: list[int], calls: Sequence[ExecutedCall], text: str) -> None:
        """Adds an observation and submits the turn under it, if the path has room for both."""
        if self._room(path.group, len(path.ids) + len(ids)) < 1:
            self._end(path, StopReason.LENGTH)
            return
        node = path.group.tree.add_observation(path.parent, ids, calls, text)
        may_branch = path.decides and path.group.context.remaining > 0
        states = self._opened(path.states.fork()) if may_branch else None
        path = replace(path, parent=node.index, ids=path.ids + ids, states_for_branches=states)
        if path.decides and self.settings.rule.moment is Moment.RESULT:
            path = self._offered(path, ())
        self._write(path)

    # Paths -----------------------------------------------------------------------------------------------------------

    def _start(self, request: GroupRequest) -> _Group:
        settings = self.settings
        context = BranchContext(
            RolloutTree(request.prompt_ids),
            self.engine.vocab_size,
            settings.num_generations - settings.initial_rollouts,
            lambda place: self._draw("branch", (request.id, *place)),
        )
        context.state = settings.rule.start(context)
        group = _Group(request.id, context.tree, context, branches=context.remaining > 0)
        if self._room(group, len(request.prompt_ids)) < 1:
            raise ConfigError(
                f"Prompt {request.id} has {len(request.prompt_ids)} tokens and the context is {settings.max_length}: "
                "no room for a completion. Shorten or drop the prompt."
            )
        self._start_at_root(group, settings.initial_rollouts, waited=0)
        return group

    def _start_at_root(self, group: _Group, count: int, waited: int) -> None:
        for _ in range(count):
            states = self._opened(self.toolbox.create_states(group.id))
            path = _Path(group, (group.starts,), 0, group.tree.root.ids, states, waited=waited)
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
        path.group.live[path.address] = LivePath(path.parent, to_come + path.decides)
        return path

    def _end(self, path: _Path, reason: StopReason) -> None:
        path.group.tree.end(path.parent, path.address, reason)
        del path.group.live[path.address]
        self._close(path.states)

    def _room(self, group: _Group, length: int) -> int:
        """Tokens left for a path whose ids, prompt included, are `length` long."""
        settings = self.settings
        return min(len(group.tree.root.ids) + settings.max_completion_length, settings.max_length) - length

    # Branching -------------------------------------------------------------------------------------------------------

    def _offered(self, path: _Path, turn: Sequence[float]) -> _Path:
        """The path after the observation above its current turn was offered to the rule."""
        candidate = Candidate(path.parent, path.address, path.depth, turn, path.last_entropies, path.root_entropies)
        path.group.candidates.append((path, candidate))
        return self._alive(replace(path, decides=False, states_for_branches=None))

    def _branch(self, group: _Group) -> None:
        """Decides what can be decided by now, branches, and tops up what can no longer be spent."""
        rule, context = self.settings.rule, group.context
        if rule.moment.waits and (group.live or not context.remaining):
            return
        offered = sorted(group.candidates, key=lambda offer: (offer[1].address, offer[1].depth))
        if rule.moment is Moment.LEAVES_SCORED:
            assert self.score is not None
            context.rewards = self.score(group.id, group.tree)
        for (path, _), decision in zip(offered, self._decisions([of for _, of in offered], context), strict=True):
            node = group.tree.nodes[path.parent]
            before = node.decision.granted if node.decision is not None else 0
            after = before + decision.granted
            node.decision = replace(decision, fires=decision.fires or before > 0, granted=after)
            waited = group.longest_chain - path.depth if rule.moment.waits else path.waited
            path = replace(path, decides=False, waited=waited)
            for j in range(before, after):
                self._write_branch(path, (*path.address, path.depth, j))
        topups = max(0, context.remaining - rule.supply(group.live.values(), context))
        if not group.live and not topups:  # then there will be no other decision
            topups = context.remaining
        context.remaining -= topups
        if not rule.moment.waits or not context.remaining:
            group.candidates = []
            for path, _ in offered:
                if path.states_for_branches is not None:
                    self._close(path.states_for_branches)
        group.topups += topups
        self._start_at_root(group, topups, waited=group.longest_chain)

    def _decisions(self, candidates: Sequence[Candidate], context: BranchContext) -> Sequence[BranchDecision]:
        """The rule's decisions, their leaves taken from the budget."""
        rule = self.settings.rule
        decisions = rule.decide(candidates, context) if candidates or rule.moment.waits else []
        granted = [decision.granted for decision in decisions]
        if len(granted) != len(candidates) or min(granted, default=0) < 0 or sum(granted) > context.remaining:
            raise ConfigError(
                f"The branch rule {rule.name!r} granted {granted} leaves for {len(candidates)} observations; expected "
                f"one number for each, none negative, and at most {context.remaining} in sum."
            )
        context.remaining -= sum(granted)
        return decisions

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

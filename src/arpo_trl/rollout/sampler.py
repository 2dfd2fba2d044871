"""The event loop that grows one tree per prompt.

The loop submits turns to the engine and calls to the tools. Each turn or result that finishes extends its tree and
leads to the next submission. No path waits for a slower sibling, tools run while other paths decode, and each turn
requests at most the remaining tokens of its path.

With `schedule="rounds"` the loop processes all tool results together, in the order of their calls, when no turn is
decoding. This overlaps tools and decoding less, but makes a run reproducible bit for bit, independent of the timing of
the tools.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from arpo_trl.common.waiting import Silence
from arpo_trl.errors import ConfigError, EngineError, ToolSpecError
from arpo_trl.options import RolloutSchedule, ShareCalls
from arpo_trl.rollout.batch import Finished, GroupRequest, RolloutBatch, RolloutTimes, Score, TreeSettings, error_text
from arpo_trl.rollout.decisions import checked_decisions, checked_rewards, checked_roots, checked_supply
from arpo_trl.rollout.engines.base import (
    Engine,
    Event,
    Probe,
    Turn,
    TurnFailed,
    TurnRequest,
    TurnStop,
    check_engine,
    check_turn,
)
from arpo_trl.rollout.paths import Calling, Group, Path
from arpo_trl.rollout.protocols import BadCall, ToolProtocol
from arpo_trl.rollout.rules.base import BranchContext, Candidate, LivePath, Moment, check_attributes
from arpo_trl.rollout.states import OpenStates
from arpo_trl.rollout.tree import Address, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.sharing import SubmittedCall, as_shared, check_shareable, history_after, sharing_keys
from arpo_trl.tools.toolbox import ToolBox, ToolResult
from arpo_trl.visible import get_logger

logger = get_logger(__name__)  # not accelerate's: any rank may wait

IDLE_POLL_S = 0.05
"""Longest wait, in seconds, for the tools or the engine while only one of them has work."""
BUSY_POLL_S = 0.002
"""Longest wait, in seconds, for the engine while other work also runs, and between two checks for a free slot,
which nothing announces."""
ADMISSION_S = 1.0
"""Longest time, in seconds, that a round waits until closing states free their slots."""


class TreeSampler:
    """Rolls prompts out into trees, with one engine, one protocol and one set of tools."""

    def __init__(
        self,
        engine: Engine,
        toolbox: ToolBox,
        protocol: ToolProtocol,
        settings: TreeSettings,
        score: Score | None = None,
    ):
        """Store the parts. `score` computes rewards for branch rules that read the rewards of finished leaves.

        Raises:
            ConfigError: The branch rule reads rewards and `score` is None, the engine lacks a member of `Engine`, or
                the settings share the calls of a tool that is not declared shareable.
        """
        check_engine(engine)
        self.engine = engine
        self.toolbox = toolbox
        self.protocol = protocol
        self.settings = settings
        self.score = score
        self._check(settings)
        self.tool_wait_s = 0.0
        """Seconds spent waiting for tools since the sampler was created."""
        self.requests = 0
        """Requests so far. Their numbers are their ids, so that an event of an earlier session has no request."""
        self.between_events: Callable[[], None] = _do_nothing
        """Called before each wait for events. An exception from it, for example on an interrupt, stops the rollout."""

    def clock(self) -> RolloutTimes:
        """The counted seconds so far. The difference of two clocks is the time between them."""
        return RolloutTimes(
            total_s=time.perf_counter(), forward_s=self.engine.forward_s, tool_wait_s=self.tool_wait_s, sync_s=0.0
        )

    def sample(
        self,
        requests: Sequence[GroupRequest],
        *,
        seed: tuple[int | str, ...],
        settings: TreeSettings | None = None,
    ) -> RolloutBatch:
        """Return one finished tree of exactly `num_generations` leaves per request.

        Args:
            seed: Seeds every random draw, together with the request's id and the place in its tree: the same seed
                gives the same tree.
            settings: Replaces the sampler's settings for this call.

        Raises:
            ConfigError: A prompt leaves no room for a completion, or the branch rule violates its contract.
            EngineError: The engine violates its contract.
        """
        return self._run(settings, seed)(requests)

    def stream(
        self,
        requests: Iterable[GroupRequest | None],
        *,
        seed: tuple[int | str, ...],
        groups_at_once: int,
        settings: TreeSettings | None = None,
    ) -> Iterator[Finished]:
        """Yield the outcome of each request as soon as it is finished. At most `groups_at_once` groups run at a time.

        An error in one request, for example a prompt that leaves no room, becomes its outcome and does not stop the
        others. `requests` is read only when a new group can start, so it may have any length. While groups run it may
        yield None, which means that there is no request yet. The stream then reads it again after the next events.

        Raises:
            EngineError: The engine violates its contract outside a single request, or has lost its server.
        """
        return self._run(settings, seed).stream(requests, groups_at_once)

    def _run(self, settings: TreeSettings | None, seed: tuple[int | str, ...]) -> _Run:
        if settings is not None:
            self._check(settings)
        return _Run(self, settings or self.settings, seed)

    def _check(self, settings: TreeSettings) -> None:
        if settings.share_calls is ShareCalls.HISTORY:
            check_shareable(self.toolbox.specs)
        check_attributes(settings.rule)
        if settings.rule.moment is Moment.LEAVES_SCORED and self.score is None:
            raise ConfigError(
                f"The branch rule {settings.rule.name!r} reads the rewards of finished leaves during the rollout, but "
                "this sampler has no `score` function to compute them. ARPOTrainer cannot use such a rule, because it "
                "computes rewards after the rollout. Choose another branch_rule, or pass `score` to TreeSampler."
            )


class _Run:
    """The state of one call of `sample` or `stream`."""

    def __init__(self, sampler: TreeSampler, settings: TreeSettings, seed: tuple[int | str, ...]):
        self.sampler = sampler
        self.engine, self.toolbox, self.protocol = sampler.engine, sampler.toolbox, sampler.protocol
        self.between_events, self.score = sampler.between_events, sampler.score
        self.settings = settings
        self.seed = seed
        self.writing: dict[int, Path] = {}
        self.calling: dict[int, SubmittedCall[tuple[Calling, int]]] = {}
        self.states = OpenStates(sampler.toolbox)
        self.shares_calls = settings.share_calls is ShareCalls.HISTORY
        self.silence = Silence()
        self.isolates = False
        """Whether an error in a group ends only that group."""

    def __call__(self, requests: Sequence[GroupRequest]) -> RolloutBatch:
        start = self.sampler.clock()
        with self.engine.session(), self.states:
            opened_s = time.perf_counter()
            groups = [self._start(request) for request in requests]
            while not self._is_idle or self.states.will_admit:
                for group in self._advance():
                    self._branch(group)
                    if not group.live:
                        self._release(group)
            if self.states.waiting:
                raise self._no_slot()
            closing_s = time.perf_counter()
        end = self.sampler.clock()
        for group in groups:
            group.tree.check(self.settings.num_generations)
        sync_s = opened_s - start.total_s + end.total_s - closing_s
        return RolloutBatch(groups=[group.sampled for group in groups], times=replace(end - start, sync_s=sync_s))

    def stream(self, requests: Iterable[GroupRequest | None], groups_at_once: int) -> Iterator[Finished]:
        self.isolates = True
        waiting = iter(requests)
        live: set[int] = set()
        with self.engine.session(), self.states:
            while True:
                while len(live) < groups_at_once and (request := next(waiting, None)) is not None:
                    try:
                        self._start(request)
                    except Exception as error:
                        self._forget(request.id)
                        yield Finished(id=request.id, group=None, error=error_text(error), seconds=0.0, cause=error)
                    else:
                        live.add(request.id)
                if not live:
                    return
                for group in self._advance():
                    if group.error is None:
                        self._run_isolated(group, partial(self._branch, group))
                    if group.error is not None or not group.live:
                        live.discard(group.id)
                        yield self._finished(group)
                if self._is_idle and self.states.is_stuck(live):
                    raise self._no_slot()

    @property
    def _is_idle(self) -> bool:
        """Whether no path runs."""
        return not (self.writing or self.calling or self.states.opening)

    def _no_slot(self) -> EngineError:
        return EngineError(
            f"{len(self.states.waiting)} paths wait for a free slot to open their states, but no running path will "
            "free one: all slots belong to states that hang. Raise environment_concurrency, or lower tool_timeout_s."
        )

    def _finished(self, group: Group) -> Finished:
        seconds = time.perf_counter() - group.started_s
        if group.error is None:
            self._release(group)
            self._run_isolated(group, partial(group.tree.check, self.settings.num_generations))
        if group.error is not None:
            return Finished(id=group.id, group=None, error=error_text(group.error), seconds=seconds, cause=group.error)
        return Finished(id=group.id, group=group.sampled, error=None, seconds=seconds)

    def _run_isolated(self, group: Group, step: Callable[[], None]) -> None:
        """Run `step`. In a stream an error ends only its group."""
        try:
            step()
        except Exception as error:
            if not self.isolates:
                raise
            group.error = error
            self._forget(group.id)

    def _forget(self, group: int) -> None:
        """Drop a group's running turns and calls and close its states. `_advance` ignores their later results."""
        self.writing = {id: path for id, path in self.writing.items() if path.group.id != group}
        self.calling = {
            ticket: call for ticket, call in self.calling.items() if call.waiting[0][0].path.group.id != group
        }
        self.states.forget(group)

    # States of tools -------------------------------------------------------------------------------------------------

    def _release(self, group: Group) -> None:
        """Drop the calls and states that the paths of a finished group shared."""
        group.made.clear()
        while group.states_after:
            self.states.close(group.states_after.popitem()[1])

    def _begin(self, path: Path) -> None:
        """Submit the first turn of a path when its states are open."""
        if not path.states.opening_steps:
            self._write(path)
            return
        self._record_live(path)
        self.states.open(path)

    def _admit_all(self) -> None:
        """Wait until no path will start soon, at most `ADMISSION_S`. Up to this time, the round in which a path starts
        does not depend on how long states take to close."""
        deadline_s = time.perf_counter() + ADMISSION_S
        self.states.admit()
        while self.states.will_admit and time.perf_counter() < deadline_s:
            self.between_events()
            time.sleep(BUSY_POLL_S)
            self.states.admit()

    def _opened_path(self, path: Path, result: ToolResult) -> None:
        """Submit the first turn of a path whose states are open. If they could not be opened, another path replaces
        it."""
        if path.states.opened(result.failure, result.text):
            self._write(path)
            return
        if len(path.address) == 1:
            reason = result.text.rstrip(".")
            raise ToolSpecError(
                f"The state of a path could not be opened: {reason}. Correct its `open`, or raise the error in "
                "`opened`. Only branches are replaced by other paths."
            )
        del path.group.live[path.address]
        self.states.close(path.states)
        path.group.tree.topups += 1
        self._start_at_root(path.group, 1, waited=path.waited)

    def _write_branch(self, path: Path, address: Address) -> None:
        """Submit an extra turn under the observation above the path's turn, with a fork of the states there."""
        assert path.states_for_branches is not None  # kept until the budget is used up
        states = self.states.add(path.states_for_branches.fork())
        ids = path.group.tree.ids_to(path.parent)
        self._begin(replace(path, address=address, ids=ids, states=states, states_for_branches=None, written=None))

    # Events ----------------------------------------------------------------------------------------------------------

    def _advance(self) -> list[Group]:
        """Wait for events, process them, and return the groups to which they belong. Warn if none arrive for long."""
        start = time.perf_counter()
        self.between_events()
        self.states.admit()
        if self.states.waiting and self._is_idle:  # for slots that others use
            time.sleep(BUSY_POLL_S if self.states.will_admit else IDLE_POLL_S)
        touched: dict[int, Group] = {}
        if self.writing:
            others = self.calling or self.states.opening or self.states.will_admit
            for event in self.engine.poll(BUSY_POLL_S if others else IDLE_POLL_S):
                if (path := self.writing.get(event.id)) is None:
                    if event.id not in range(self.sampler.requests):
                        raise EngineError(
                            f"{type(self.engine).__name__} returned an event of request {event.id!r}, which was never "
                            "submitted."
                        )
                    continue  # its group failed earlier, or its session has ended
                touched[path.group.id] = path.group
                self._run_isolated(path.group, partial(self._take_event, path, event))
        for ticket, result in self._tool_results():
            if (path := self.states.opening.pop(ticket, None)) is not None:
                touched[path.group.id] = path.group
                self._run_isolated(path.group, partial(self._opened_path, path, result))
                continue
            if (call := self.calling.pop(ticket, None)) is None:
                continue  # its group failed earlier
            for (calling, i), delivered in call.deliver(result):
                group = calling.path.group
                touched[group.id] = group
                calling.answer(i, delivered)
                if calling.done and group.error is None:
                    self._run_isolated(group, partial(self._observe, calling))
        if touched:
            self.silence.broken()
        elif self.silence.goes_on(time.perf_counter() - start):
            counts = {
                f"turns of {type(self.engine).__name__}": len(self.writing),
                "tool calls": len(self.calling),
                "states of tools to open": len(self.states.opening) + len(self.states.waiting),
            }
            logger.warning(
                f"Nothing has arrived for {self.silence.seconds:.0f} s. The rollout waits for "
                f"{', '.join(f'{count} {what}' for what, count in counts.items() if count)}. If they never end, stop "
                "the run, and check the engine or its server."
            )
        return list(touched.values())

    def _take_event(self, path: Path, event: Event) -> None:
        if isinstance(event, Probe):
            before = [] if path.written is None else path.written.entropies
            self.writing[event.id] = self._probed(path, before + event.entropies)
            return
        del self.writing[event.id]
        if isinstance(event, TurnFailed):
            raise EngineError(event.reason)
        self._turn_finished(path, event)

    def _tool_results(self) -> list[tuple[int, ToolResult]]:
        rounds = self.settings.schedule is RolloutSchedule.ROUNDS
        if not (self.calling or self.states.opening or self.states.waiting) or (rounds and self.writing):
            return []
        start = time.perf_counter()  # counted even while turns decode: this poll runs the tools of this thread
        if rounds:
            self._admit_all()
        results = self.toolbox.poll(0.0 if self.writing or not (self.calling or self.states.opening) else IDLE_POLL_S)
        while rounds and len(results) < len(self.calling) + len(self.states.opening):
            self.between_events()
            results += self.toolbox.poll(IDLE_POLL_S)
        self.sampler.tool_wait_s += time.perf_counter() - start
        return sorted(results, key=lambda result: result[0])

    def _probed(self, path: Path, entropies: Sequence[float]) -> Path:
        """The path after the entropies of its current turn's first tokens are known."""
        if path.depth == 0 and not path.root_entropies:
            path = replace(path, root_entropies=entropies)
        return self._as_candidate(path, entropies) if path.decides else self._record_live(path)

    def _turn_finished(self, path: Path, turn: Turn) -> None:
        written = 0 if path.written is None else len(path.written.ids)
        room = self._room(path.group, len(path.ids) + written)
        check_turn(turn, self.engine, lambda: self.protocol.tokenizer.get_vocab(), room)
        if path.written is not None:
            turn, path = path.written.followed_by(turn), replace(path, written=None)
        text = self.protocol.decode_turn(turn.ids)
        if turn.stop is TurnStop.STOP_STRING and path.group.protocol.continues_after(text):
            if self._room(path.group, len(path.ids) + len(turn.ids)) > 0:
                if len(turn.ids) >= self.settings.entropy_probe_tokens:
                    path = self._probed(path, turn.entropies)
                self._write(replace(path, written=turn))
                return
            turn = replace(turn, stop=TurnStop.LENGTH)
        path = self._probed(path, turn.entropies)  # no change if a Probe came first
        node = path.group.tree.add_turn(path.parent, turn.ids, text, turn.logprobs, turn.entropies, turn.versions)
        path = replace(
            path,
            since_s=self._record_span(path, node.index),
            parent=node.index,
            ids=path.ids + turn.ids,
            depth=path.depth + 1,
            last_entropies=turn.entropies,
            last_request=turn.id,
        )
        path.group.longest_chain = max(path.group.longest_chain, path.waited + path.depth)
        protocol = path.group.protocol
        calls = () if turn.stop is TurnStop.LENGTH else protocol.parse_turn(text, turn.ids[-1])
        if turn.stop is TurnStop.LENGTH:
            self._end(path, StopReason.LENGTH)
        elif not calls:
            self._end(path, StopReason.EOS)
        elif not path.may_call:
            self._end(path, StopReason.CALL_LIMIT)
        elif path.results >= self.settings.max_tool_calls:
            notice = protocol.limit_notice()
            results = [(_name(call), notice) for call in calls]
            ids = protocol.encode_observation(results, turn.ids[-1])
            self._write_under(replace(path, may_call=False), ids, (), notice)
        else:
            self._call(path, calls)

    def _call(self, path: Path, calls: Sequence[ToolCall | BadCall]) -> None:
        """Submit a turn's calls. Malformed calls and calls beyond a limit get their result immediately."""
        limits, made = self.settings.max_calls_of, Counter(path.calls_of)
        calling, submitted = Calling(path=path, calls=calls), dict[int, ToolCall]()
        for i, call in enumerate(calls):
            notice = None
            if isinstance(call, BadCall):
                calling.answered[i] = _refused(call.fault, {}, call.text, ToolFailure.BAD_CALL)
                continue
            if path.results + i >= self.settings.max_tool_calls:
                notice = path.group.protocol.limit_notice()
            elif made[call.name] >= limits.get(call.name, math.inf):
                notice = path.group.protocol.tool_limit_notice(call.name)
            if notice is not None:
                calling.answered[i] = _refused(call.name, call.arguments, notice, ToolFailure.CALL_LIMIT)
            else:
                made[call.name] += 1
                submitted[i] = call
        calling.path = path = replace(path, calls_of=made)
        self._submit(calling, submitted)
        if calling.done:
            self._observe(calling)
        else:
            self._record_live(calling.path)

    def _submit(self, calling: Calling, calls: Mapping[int, ToolCall]) -> None:
        """Submit calls of a turn. With sharing, reuse the results of the calls that a path with the same history
        made."""
        path, in_order = calling.path, list(calls.values())
        keys: Sequence[Hashable] = [None] * len(calls)
        if self.shares_calls and calls:
            keys = sharing_keys(path.history, in_order, self.toolbox.specs)
            calling.path = replace(path, history=history_after(path.history, in_order))
        for (i, call), key in zip(calls.items(), keys, strict=True):
            made = path.group.made.get(key)
            if made is None:
                ticket = self.toolbox.submit(call, path.states, path.group.tools)
                made = self.calling[ticket] = SubmittedCall()
                if key is not None:
                    path.group.made[key] = made
            elif made.result is not None:  # comes from `poll` like the others, so that `schedule` applies
                ticket = self.toolbox.submit_answered(as_shared(made.result))
                made = self.calling[ticket] = SubmittedCall()
            made.waiting.append((calling, i))

    def _observe(self, calling: Calling) -> None:
        """Record the results of a turn's calls and submit the turn that continues from them."""
        path, calls = self._with_calls_recorded(calling.path, calling.in_order)
        path = replace(path, results=path.results + len(calls), decides=path.group.branches)
        ids = path.group.protocol.encode_observation([(call.name, call.text) for call in calls], path.ids[-1])
        self._write_under(path, ids, calls, "\n".join(call.text for call in calls))

    def _with_calls_recorded(self, path: Path, calls: Sequence[ExecutedCall]) -> tuple[Path, Sequence[ExecutedCall]]:
        """Record a turn's calls in the states of the path. If another path made them, use a fork of its states.

        The returned calls contain the changes that they made.
        """
        made = [call for call in calls if call.source is not CallSource.REFUSED]
        on_state = [call for call in made if self.toolbox.specs[call.name].create_state is not None]
        if any(call.source is CallSource.SHARED for call in on_state):
            states = self.states.add(path.group.states_after[path.history].fork())
            self.states.close(path.states)
            return replace(path, states=states), calls
        changes = {
            id(call): path.states.record(ToolCall(name=call.name, arguments=call.arguments), call.failure)
            for call in made
        }
        if on_state and self.shares_calls:
            path.group.states_after[path.history] = self.states.add(path.states.fork())
        return path, [replace(call, changed=changes.get(id(call))) for call in calls]

    def _write_under(self, path: Path, ids: list[int], calls: Sequence[ExecutedCall], text: str) -> None:
        """Add an observation and submit the turn under it. End the path if it has no room for both."""
        if self._room(path.group, len(path.ids) + len(ids)) < 1:
            self._end(path, StopReason.LENGTH, calls)
            return
        node = path.group.tree.add_observation(path.parent, ids, calls, text)
        self._record_span(path, node.index)
        may_branch = path.decides and path.group.context.remaining > 0
        states = self.states.add(path.states.fork()) if may_branch else None
        path = replace(path, parent=node.index, ids=path.ids + ids, states_for_branches=states)
        if path.decides and self.settings.rule.moment is Moment.RESULT:
            path = self._as_candidate(path, ())
        self._write(path)

    # Paths -----------------------------------------------------------------------------------------------------------

    def _start(self, request: GroupRequest) -> Group:
        settings = self.settings
        context = BranchContext(
            tree=RolloutTree(request.prompt_ids),
            vocab_size=self.engine.vocab_size,
            remaining=settings.num_generations - settings.initial_rollouts,
            seed_of=lambda place: self._draw("branch", (request.id, *place)),
        )
        context.state = settings.rule.start(context)
        roots = self._roots(context)
        kit = request.kit
        group = Group(
            id=request.id,
            tree=context.tree,
            context=context,
            branches=context.remaining > 0,
            protocol=self.protocol if kit is None else kit.protocol,
            tools=None if kit is None else kit.tools,
        )
        if self._room(group, len(request.prompt_ids)) < 1:
            raise ConfigError(
                f"Prompt {request.id} has {len(request.prompt_ids)} tokens and the context is {settings.max_length} "
                "tokens: no room for a completion. Shorten or drop the prompt."
            )
        self._start_at_root(group, roots, waited=0)
        return group

    def _roots(self, context: BranchContext) -> int:
        """The number of paths that start at the root at the beginning. The other leaves are the budget."""
        leaves, planned, rule = self.settings.num_generations, self.settings.initial_rollouts, self.settings.rule
        if planned == leaves:
            return leaves
        roots = checked_roots(rule, planned, leaves, context)
        context.remaining = leaves - roots
        return roots

    def _start_at_root(self, group: Group, count: int, waited: int) -> None:
        for _ in range(count):
            states = self.states.add(self.toolbox.create_states(group.id, group.tools))
            states.start()
            path = Path(
                group=group,
                address=(group.starts,),
                parent=0,
                ids=group.tree.root.ids,
                states=states,
                waited=waited,
            )
            group.starts += 1
            self._begin(path)

    def _write(self, path: Path) -> None:
        """Submit the path's next turn, or the rest of its current one."""
        key = (path.group.id, *path.address, path.depth)
        written = path.written
        if written is None:
            path = replace(path, since_s=time.perf_counter() - path.group.started_s)
        ids = path.ids + ([] if written is None else written.ids)  # a list of its own, which an engine may change
        count = len(ids) - len(path.ids)
        request = TurnRequest(
            id=self.sampler.requests,
            ids=ids,
            max_tokens=self._room(path.group, len(ids)),
            probe_tokens=max(0, self.settings.entropy_probe_tokens - count),
            seed=self._draw("turn", key) if written is None else self._draw("rest", (*key, count)),
            key=key,
            after=path.last_request if written is None else written.id,
        )
        self.sampler.requests += 1
        self.writing[request.id] = self._record_live(path)
        self.engine.submit(request)

    def _record_span(self, path: Path, node: int) -> float:
        """Record that the node is complete now, and return the time."""
        now = time.perf_counter() - path.group.started_s
        path.group.spans[node] = (path.since_s, now)
        return now

    def _record_live(self, path: Path) -> Path:
        """Record at how many more tool results the path may branch, and return the path."""
        to_come = max(0, self.settings.max_tool_calls - path.results) if path.may_call else 0
        results = to_come + path.decides
        path.group.live[path.address] = LivePath(address=path.address, node=path.parent, results=results)
        return path

    def _end(self, path: Path, reason: StopReason, unread: Sequence[ExecutedCall] = ()) -> None:
        path.group.tree.end(path.parent, path.address, reason, unread)
        del path.group.live[path.address]
        self.states.finish(path.states, path.address)

    def _room(self, group: Group, length: int) -> int:
        """The remaining tokens of a path of `length` ids, prompt included."""
        settings = self.settings
        return min(len(group.tree.root.ids) + settings.max_completion_length, settings.max_length) - length

    # Branching -------------------------------------------------------------------------------------------------------

    def _as_candidate(self, path: Path, turn: Sequence[float]) -> Path:
        """Make the observation above the path's current turn a candidate, and return the updated path."""
        candidate = Candidate(
            node=path.parent,
            address=path.address,
            depth=path.depth,
            turn=turn,
            before=path.last_entropies,
            root=path.root_entropies,
        )
        path.group.candidates.append((replace(path, ids=[]), candidate))  # `_write_branch` takes them from the tree
        return self._record_live(replace(path, decides=False, states_for_branches=None))

    def _branch(self, group: Group) -> None:
        """Let the rule decide on its candidates, start the branches, and start top-ups for budget that they cannot
        use."""
        rule, context = self.settings.rule, group.context
        if rule.moment.waits and (group.live or not context.remaining):
            return
        offered = sorted(group.candidates, key=lambda offer: (offer[1].address, offer[1].depth))
        if rule.moment is Moment.LEAVES_SCORED:
            assert self.score is not None
            context.rewards = checked_rewards(self.score(group.id, group.tree), len(group.tree.leaves()))
        candidates = [candidate for _, candidate in offered]
        decisions = checked_decisions(rule, candidates, context) if offered or rule.moment.waits else []
        context.remaining -= sum(decision.granted for decision in decisions)
        for (path, _), decision in zip(offered, decisions, strict=True):
            node = group.tree.nodes[path.parent]
            before = node.decision.granted if node.decision is not None else 0
            after = before + decision.granted
            node.decision = replace(decision, fires=before > 0 or decision.fires, granted=after)
            waited = group.longest_chain - path.depth if rule.moment.waits else path.waited
            path = replace(path, decides=False, waited=waited)
            for j in range(before, after):
                self._write_branch(path, (*path.address, path.depth, j))
        supply = checked_supply(rule, group.live.values(), context) if context.remaining else 0
        topups = min(max(0, context.remaining - supply), context.remaining)
        if not group.live and not topups:  # no further decision will follow
            topups = context.remaining
        context.remaining -= topups
        if not rule.moment.waits or not context.remaining:
            group.candidates = []
            for path, _ in offered:
                if path.states_for_branches is not None:
                    self.states.close(path.states_for_branches)
        group.tree.topups += topups
        self._start_at_root(group, topups, waited=group.longest_chain)

    def _draw(self, what: str, key: tuple[int, ...]) -> int:
        """A seed specific to this rollout, to `what` and to the place `key` in the tree."""
        digest = hashlib.blake2b(repr((*self.seed, what, key)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def _do_nothing() -> None:
    pass


def _refused(name: str, arguments: dict[str, Any], text: str, failure: ToolFailure) -> ExecutedCall:
    """A call that does not run, with the text that the model reads instead of a result."""
    return ExecutedCall(
        name=name, arguments=arguments, text=text, failure=failure, seconds=0.0, source=CallSource.REFUSED
    )


def _name(call: ToolCall | BadCall) -> str:
    return call.name if isinstance(call, ToolCall) else call.fault

"""An engine that returns scripted texts, for trying tools, protocols and rewards without a model. Public API.

    engine = ScriptedEngine(tokenizer, settings, lambda request, context: "<search>iron</search>")

The script receives each request and the text so far, and returns the text of the turn. If a turn continues after a
stop string, the rest of its text follows, without a call of the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.text import StopFinder, decode_exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedTurn:
    """A turn's text, the entropies in nats of its first tokens (the last one repeats), and the polls until it
    finishes.

    A text without a stop string ends with EOS. `ends=False` omits this EOS, as if the turn had reached its length
    limit.

        ScriptedTurn(text="<search>iron</search>", entropies=[1.0, 0.2], polls=2)
    """

    text: str
    entropies: Sequence[float] = (0.0,)
    polls: int = 1
    ends: bool = True


Script = Callable[[TurnRequest, str], ScriptedTurn | str]


@dataclass(slots=True)
class _Running:
    request: TurnRequest
    turn: Turn
    polls_until_done: int
    polls: int = field(default=0)


def _checked(made: Any, request: TurnRequest) -> ScriptedTurn:
    script = made if isinstance(made, ScriptedTurn) else ScriptedTurn(text=made)
    if not isinstance(script.text, str):
        raise ConfigError(f"The script returned {made!r:.80} for turn {request.key}; expected text or a ScriptedTurn.")
    if len(script.entropies) == 0:
        raise ConfigError(
            f"The script returned no entropies for turn {request.key}; expected at least one, such as (0.0,)."
        )
    return script


class ScriptedEngine:
    """Returns the turns of `script(request, context)`; `context` is the prefix as text. Every logprob is −0.5."""

    LOGPROB = -0.5

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingParams,
        script: Script,
        *,
        vocab_size: int | None = None,
        max_length: int | None = None,
    ):
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self.max_length = max_length
        self.forward_s = 0.0
        self.has_logprobs = True
        self.requests: list[TurnRequest] = []
        """All requests so far, for tests."""
        self.sessions = 0
        self._tokenizer = tokenizer
        self._settings = settings
        self._stops = StopFinder(tokenizer, settings.stop_strings)
        self._script = script
        self._running: list[_Running] = []
        self._rest: dict[int | None, tuple[list[int], list[int], ScriptedTurn]] = {}
        """Request → the ids up to the stop string that ended its turn, the ids of its text after that, its script."""

    @contextmanager
    def session(self) -> Iterator[None]:
        self.sessions += 1
        try:
            yield
        finally:
            self._running.clear()
            self._rest.clear()

    def submit(self, request: TurnRequest) -> None:
        self.requests.append(request)
        before, ids, script = self._rest.get(request.after, (None, [], None))
        if script is None or before != request.ids:
            script = _checked(self._script(request, decode_exactly(self._tokenizer, request.ids)), request)
            ids = self._tokenizer.encode(script.text, add_special_tokens=False)
        self._running.append(_Running(request, self._turn(request, ids, script), script.polls))

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        events: list[Probe | Turn] = []
        for running in list(self._running):
            running.polls += 1
            turn = running.turn
            if running.polls >= running.polls_until_done:
                events.append(turn)
                self._running.remove(running)
            elif running.polls == 1 and len(turn.ids) > running.request.probe_tokens > 0:
                events.append(Probe(id=running.request.id, entropies=turn.entropies))
        return events

    def _turn(self, request: TurnRequest, text: list[int], script: ScriptedTurn) -> Turn:
        ids, stop = list(text), TurnStop.LENGTH
        if (end := self._stops.end(text, 0)) is not None:
            ids = text[:end]
            self._rest[request.id] = request.ids + ids, text[end:], script
            stop = TurnStop.STOP_STRING
        elif script.ends:
            ids.append(self._settings.eos_ids[0])
            stop = TurnStop.EOS
        if len(ids) > request.max_tokens:
            ids, stop = ids[: request.max_tokens], TurnStop.LENGTH
        probed = min(len(ids), request.probe_tokens)
        padded = [*script.entropies[:probed], *[script.entropies[-1]] * max(0, probed - len(script.entropies))]
        return Turn(id=request.id, ids=ids, logprobs=[self.LOGPROB] * len(ids), entropies=padded, stop=stop)

"""Samples a turn from vLLM in segments: a short probe with top-k logprobs, then the rest with one logprob per token.

    probe        the first k tokens, with their top-k logprobs; branch rules read their entropies
    bridge       if the probe ends within a possible stop string: the tokens needed to complete it
    rest         all other tokens; vLLM has the prompt and the earlier segments in its prefix cache

vLLM may also end a segment early, when new weights arrive. The turn then continues with another segment, so all tokens
of a segment are sampled with the same weights.

This module finds the end of a turn from its ids and ignores vLLM's finish reason. vLLM searches for stop strings only
within one request, so it misses stop strings that straddle two segments. If a request starts within a character, vLLM
treats the prompt as output and stops after one token because of the stop string of an earlier turn. The turn then
continues with another segment. Ids stay exactly as sampled, up to and including the token that completes a stop
string.

Pure: imports no vLLM. Both vLLM engines use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest, TurnStop, check_request
from arpo_trl.rollout.engines.topk_entropy import entropy_from_top_k
from arpo_trl.rollout.text import StopFinder

SEED_STEP = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the distance between the seeds of a turn's segments."""
SEEDS = 1 << 63
"""The number of seeds: vLLM accepts seeds up to 2^63 − 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRequest:
    """The next request to vLLM: at most `max_tokens` tokens after `ids`, with `top_logprobs` logprobs per position."""

    ids: list[int]
    max_tokens: int
    seed: int
    top_logprobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """vLLM's output: ids, their logprobs, and the logprobs that vLLM returned for each position.

    `version` is the trainer's step whose weights sampled it; None if it is not known.
    """

    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[float]] = field(default_factory=list)
    version: int | None = None


class Draft:
    """An unfinished turn. Send `next_segment()` to vLLM and pass the result to `add`, until `add` returns a `Turn`."""

    def __init__(
        self, request: TurnRequest, eos_ids: Sequence[int], stops: StopFinder, vocab_size: int, top_logprobs: int
    ):
        check_request(request)
        self.request = request
        self._eos_ids = frozenset(eos_ids)
        self._stops = stops
        self._vocab_size = vocab_size
        self._top_logprobs = top_logprobs
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._entropies: list[float] = []
        self._versions: list[int] = []
        self._segments = 0

    def next_segment(self) -> SegmentRequest:
        written, request = len(self._ids), self.request
        room = request.max_tokens - written
        top_logprobs = 0
        if written < request.probe_tokens:
            room, top_logprobs = min(room, request.probe_tokens - written), self._top_logprobs
        elif missing := self._stops.missing(self._ids):
            room = min(room, missing)
        return SegmentRequest(
            ids=request.ids + self._ids,
            max_tokens=room,
            seed=(request.seed + self._segments * SEED_STEP) % SEEDS,
            top_logprobs=top_logprobs,
        )

    def add(self, segment: Segment) -> Probe | Turn | None:
        """Append the segment. Returns the turn if it is finished, the probe if the turn has k tokens now, otherwise
        None."""
        if not segment.ids or len(segment.logprobs) != len(segment.ids):
            raise EngineError(
                f"vLLM answered turn {self.request.key} with {len(segment.ids)} tokens and {len(segment.logprobs)} "
                "logprobs; expected at least one token and a logprob for each."
            )
        start, probe = len(self._ids), self.request.probe_tokens
        self._segments += 1
        self._ids += segment.ids
        self._logprobs += segment.logprobs
        if segment.version is not None:
            self._versions += [segment.version] * len(segment.ids)
        if start < probe:
            # vLLM adds the sampled token if it is not among the k most likely. That entry does not count.
            top = (sorted(given, reverse=True)[: self._top_logprobs] for given in segment.top_logprobs)
            self._entropies += [entropy_from_top_k(logprobs, self._vocab_size).nats for logprobs in top]
        stop = self._stop(start)
        if stop is None:
            return (
                Probe(id=self.request.id, entropies=list(self._entropies)) if start < probe <= len(self._ids) else None
            )
        probed = min(len(self._ids), probe)
        return Turn(
            id=self.request.id,
            ids=self._ids,
            logprobs=self._logprobs,
            entropies=self._entropies[:probed],
            stop=stop,
            versions=self._versions[: len(self._ids)],
        )

    def _stop(self, start: int) -> TurnStop | None:
        """Cut the turn at its end and return why it ended; None if it has not ended."""
        end = self._stops.end(self._ids, start)
        eos = next((i + 1 for i in range(start, len(self._ids)) if self._ids[i] in self._eos_ids), None)
        ends = [n for n in (end, eos) if n is not None]
        if ends:
            del self._ids[min(ends) :], self._logprobs[min(ends) :]
            return TurnStop.EOS if min(ends) == eos else TurnStop.STOP_STRING
        return TurnStop.LENGTH if len(self._ids) >= self.request.max_tokens else None


def sampling_params(settings: SamplingParams) -> dict[str, Any]:
    """The settings with vLLM's names, for vLLM's `SamplingParams` and for a request's body.

    Token ids define EOS: `ignore_eos` stops vLLM from adding the EOS ids of the model's configuration.
    """
    return {
        **settings.for_vllm,
        "stop": list(settings.stop_strings),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(settings.eos_ids),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }

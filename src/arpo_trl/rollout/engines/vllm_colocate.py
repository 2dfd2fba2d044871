"""Turns from a vLLM engine inside the trainer's process, driven step by step.

TRL's `VLLMGeneration` starts vLLM and moves the weights; its `generate`, which waits for a whole batch, is not used.
Here requests join between two steps, so a path whose tool has answered decodes with the others at once.

Sleep mode (`vllm_enable_sleep_mode`): the engine wakes up once when a session opens, with one sync of the weights that
sleeping has discarded, and sleeps again when it closes, never in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.base import Probe, SamplingSettings, Turn, TurnRequest
from arpo_trl.rollout.engines.vllm_turns import Draft, Segment, StopFinder, sampling_params
from arpo_trl.rollout.engines.vllm_weights import mean_difference
from arpo_trl.trl_seam import VLLMGeneration

if TYPE_CHECKING:
    from vllm import RequestOutput


class VLLMColocateEngine:
    """An engine on the vLLM instance that TRL has started in this process.

    Args:
        generation: TRL's object, in mode "colocate".
        tokenizer: Decodes turns to find stop strings that straddle two requests.
        settings: The distribution to sample from.
        version: What changes when the trainer's weights do; asked at the start of each session.
        reference: The trainer's logprobs of ids, each but the first; a collective.
        probe: The ids that logprobs are compared on after a sync.
        tolerance: Most `mean_difference` of logprobs between trainer and vLLM.
        vocab_size: V, the width of the distribution sampled from.
        top_logprobs: Logprobs asked for at each of a turn's first k tokens, from which its entropies are estimated.
    """

    def __init__(
        self,
        generation: VLLMGeneration,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        version: Callable[[], Hashable],
        reference: Callable[[Sequence[int]], list[float]],
        probe: Sequence[int],
        tolerance: float,
        *,
        vocab_size: int,
        top_logprobs: int,
    ):
        self.vocab_size = vocab_size
        self.max_length = int(generation.llm.llm_engine.model_config.max_model_len)
        self.forward_s = 0.0
        self._generation = generation
        self._engine = generation.llm.llm_engine
        self._settings = settings
        self._stops = StopFinder(tokenizer, settings.stop_strings)
        self._params = sampling_params(settings)
        self._version = version
        self._synced: Hashable = None
        self._reference, self._probe, self._tolerance = reference, list(probe), tolerance
        self._top_logprobs = top_logprobs
        self._drafts: dict[str, tuple[Draft, int]] = {}
        """The turns being written, by request, and how many of the largest logprobs were asked for."""
        self._requests = 0

    @property
    def pending(self) -> int:
        return len(self._drafts)

    @contextmanager
    def session(self) -> Iterator[None]:
        sleeps = self._generation.enable_sleep_mode
        if sleeps or self._version() != self._synced:
            self._synced = None  # should the sync fail
            self._generation.sync_weights()  # wakes the weights up first
            if sleeps:
                self._generation.llm.wake_up(tags=["kv_cache"])
            self._compare()
            self._synced = self._version()
        try:
            yield
        finally:
            self._engine.abort_request(list(self._drafts))
            while self._engine.has_unfinished_requests():  # what an abort leaves to be taken note of
                self._engine.step()
            self._drafts.clear()
            if sleeps:
                self._generation.llm.sleep(level=2)

    def submit(self, request: TurnRequest) -> None:
        self._send(Draft(request, self._settings.eos_ids, self._stops, self.vocab_size, self._top_logprobs))

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        """One step for all requests (`timeout_s` has no use here: the step is the wait)."""
        if not self._drafts:
            return []
        start = time.perf_counter()
        outputs = self._engine.step()
        self.forward_s += time.perf_counter() - start
        events: list[Probe | Turn] = []
        for output in outputs:
            draft, top_logprobs = self._drafts.pop(output.request_id)
            event = draft.add(_read(output, top_logprobs))
            if event is not None:
                events.append(event)
            if not isinstance(event, Turn):
                self._send(draft)
        return events

    def _send(self, draft: Draft) -> None:
        segment = draft.next_segment()
        params = self._params | {
            "max_tokens": segment.max_tokens,
            "seed": segment.seed,
            "logprobs": segment.top_logprobs,
        }
        self._drafts[self._add(segment.ids, params)] = (draft, segment.top_logprobs)

    def _add(self, ids: list[int], params: dict[str, Any]) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._requests += 1
        name = str(self._requests)
        self._engine.add_request(
            name, {"prompt_token_ids": ids}, SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        )
        return name

    def _compare(self) -> None:
        """Raises if vLLM's logprobs of a fixed text are not the trainer's: weights that did not arrive, or broke."""
        ours = self._reference(self._probe)
        name = self._add(self._probe, {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0})
        outputs: list[RequestOutput] = []
        while not outputs:
            outputs = [output for output in self._engine.step() if output.request_id == name]
        given = outputs[0].prompt_logprobs
        theirs = [place[token].logprob for place, token in zip(given[1:], self._probe[1:], strict=True)]
        difference = mean_difference(ours, theirs)
        if not difference <= self._tolerance:
            raise EngineError(
                f"vLLM does not hold the trainer's weights after a sync: logprobs of one text differ by "
                f"{difference:.3g} on average, at most {self._tolerance} is expected. Raise weight_sync_tolerance if "
                "its precision is lower than the trainer's; otherwise vLLM and this model do not fit together."
            )


def _read(output: RequestOutput, top_logprobs: int) -> Segment:
    """A finished request as a segment."""
    written = output.outputs[0]
    ids, given = list(written.token_ids), written.logprobs or []
    # The sampled token is listed too where it is not among the likeliest: it is none of the k.
    top = [sorted((entry.logprob for entry in place.values()), reverse=True)[:top_logprobs] for place in given]
    return Segment(
        ids,
        [place[token].logprob for token, place in zip(ids, given, strict=True)],
        top if top_logprobs else [],
    )

"""Turns from a vLLM engine inside this process, driven step by step.

Requests join between two steps, so a path decodes with the others as soon as its tool has answered. In training, TRL's
`VLLMGeneration` starts vLLM and moves the weights. Its `generate` is not used, because it waits for a whole batch.

Sleep mode (`vllm_enable_sleep_mode`): vLLM wakes up when a session opens and sleeps again when it closes. Sleeping
discards the weights, so each session starts with a sync.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.vllm.turns import Draft, Segment, sampling_params
from arpo_trl.rollout.engines.weights import Weights, mean_difference
from arpo_trl.rollout.text import StopFinder
from arpo_trl.trl_seam import VLLMGeneration

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


class VLLMColocateEngine:
    """An engine on a vLLM instance in this process.

    Args:
        llm: The vLLM instance.
        tokenizer: Decodes turns to find stop strings that straddle two requests.
        settings: The distribution to sample from.
        weights: How the instance gets the trainer's weights at the start of each session.
        vocab_size: V, the number of tokens in the sampling distribution.
        top_logprobs: The number of logprobs requested for each of a turn's first k tokens, to estimate entropies.
        sleeps: Whether the instance sleeps between sessions. `weights` wakes it up.
    """

    def __init__(
        self,
        llm: LLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingParams,
        weights: Weights,
        *,
        vocab_size: int,
        top_logprobs: int,
        sleeps: bool = False,
    ):
        self.vocab_size = vocab_size
        self.max_length = int(llm.llm_engine.model_config.max_model_len)
        self.forward_s = 0.0
        self.has_logprobs = True
        self._llm = llm
        self._engine = llm.llm_engine
        self._settings = settings
        self._stops = StopFinder(tokenizer, settings.stop_strings)
        self._params = sampling_params(settings)
        self._weights = weights
        self._sleeps = sleeps
        self._top_logprobs = top_logprobs
        self._drafts: dict[str, Draft] = {}
        """The running turns by vLLM request."""
        self._requests = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        self._weights.sync()
        try:
            yield
        finally:
            self._engine.abort_request(list(self._drafts))
            while self._engine.has_unfinished_requests():  # vLLM processes the abort in a step
                self._engine.step()
            self._drafts.clear()
            if self._sleeps:
                self._llm.sleep(level=2)

    def submit(self, request: TurnRequest) -> None:
        self._send(Draft(request, self._settings.eos_ids, self._stops, self.vocab_size, self._top_logprobs))

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        """Run one step for all requests. `timeout_s` is ignored, since the step itself takes the time."""
        if not self._drafts:
            return []
        start = time.perf_counter()
        outputs = self._engine.step()
        self.forward_s += time.perf_counter() - start
        events: list[Probe | Turn] = []
        for output in outputs:
            draft = self._drafts.pop(output.request_id)
            event = draft.add(_read(output))
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
        if segment.top_logprobs:
            # Otherwise vLLM decodes each of the top logprobs' tokens, 0.1 ms per position on a CPU. Without text it
            # finds no stop strings, but `Draft` does.
            params |= {"detokenize": False, "stop": []}
        self._requests += 1
        name = str(self._requests)
        _add(self._engine, name, segment.ids, params)
        self._drafts[name] = draft


class ColocatedWeights:
    """The weights of the vLLM instance that TRL started in the trainer's process.

    Args:
        generation: TRL's object, in mode "colocate".
        trained: Returns a value that changes whenever the trainer's weights change.
        reference: Returns the trainer's logprobs of all ids except the first; a collective.
        canary: The ids whose logprobs are compared after a sync.
        tolerance: The largest allowed `mean_difference` of logprobs between trainer and vLLM.
    """

    def __init__(
        self,
        generation: VLLMGeneration,
        trained: Callable[[], Hashable],
        reference: Callable[[Sequence[int]], list[float]],
        canary: Sequence[int],
        tolerance: float,
    ):
        self._generation = generation
        self._trained = trained
        self._synced: Hashable = None
        """The value of `trained` at the last sync."""
        self._reference, self._canary, self._tolerance = reference, list(canary), tolerance

    def sync(self) -> None:
        """Move the weights if they changed or vLLM sleeps, wake vLLM up and compare logprobs.

        Raises:
            EngineError: vLLM's logprobs differ from the trainer's, so the weights were not updated or are corrupt.
        """
        sleeps = self._generation.enable_sleep_mode
        if not sleeps and self._trained() == self._synced:
            return
        self._synced = None  # in case the sync fails
        ours = self._reference(self._canary)  # while vLLM sleeps, since it may gather a sharded model
        self._generation.sync_weights()  # first wakes up the memory of the weights
        if sleeps:
            self._generation.llm.wake_up(tags=["kv_cache"])
        if self._generation.tensor_parallel_size > 1 and is_peft_model(self._generation.model):
            # As in TRL's `generate`: otherwise vLLM's collectives can hang (huggingface/trl#3671).
            self._generation.accelerator.wait_for_everyone()
        self._compare(ours)
        self._synced = self._trained()

    def _compare(self, ours: list[float]) -> None:
        difference = mean_difference(ours, self._logprobs())
        if not difference <= self._tolerance:
            raise EngineError(
                f"vLLM does not have the trainer's weights after a sync: the logprobs of a text differ by "
                f"{difference:.3g} on average; expected at most {self._tolerance}. Raise weight_sync_tolerance if "
                "vLLM has a lower precision than the trainer. Otherwise vLLM does not support updates of this model."
            )

    def _logprobs(self) -> list[float]:
        """vLLM's logprobs of the canary's ids, except the first."""
        engine, name = self._generation.llm.llm_engine, "canary"
        _add(engine, name, self._canary, {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0})
        outputs: list[RequestOutput] = []
        while not outputs:
            outputs = [output for output in engine.step() if output.request_id == name]
        given = outputs[0].prompt_logprobs
        return [place[token].logprob for place, token in zip(given[1:], self._canary[1:], strict=True)]


def _add(engine: Any, name: str, ids: list[int], params: dict[str, Any]) -> None:
    """Submit a request that returns its output only when it is finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine.add_request(
        name, {"prompt_token_ids": ids}, SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
    )


def _read(output: RequestOutput) -> Segment:
    """Convert a finished request to a segment."""
    written = output.outputs[0]
    ids, given = list(written.token_ids), written.logprobs or []
    return Segment(
        ids=ids,
        logprobs=[place[token].logprob for token, place in zip(ids, given, strict=True)],
        top_logprobs=[[entry.logprob for entry in place.values()] for place in given],
    )

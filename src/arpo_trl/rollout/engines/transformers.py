"""Turns from a transformers model: continuous batching over one KV cache.

Each live turn has a row. A decode step passes each row's newest token at the row's position, so rows of different
lengths need no padding tokens. New rows join between two steps, and the last row replaces a finished one. The largest
tensor of logits is that of one step, (rows, vocabulary); none of shape (rows, length, vocabulary) exists.

The engine keeps the KV cache of a turn that called a tool for the turns that continue it, branches included. Then only
the tool result between them needs prefill. The engine prefills turns with the same ids once.

Each turn's random numbers are drawn in advance from the turn's seed, and tokens come from the inverse of the
cumulative distribution. So a turn's tokens do not depend on other rows, up to the rounding of the model's forward.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask

from arpo_trl.errors import ConfigError, DataError, EngineError
from arpo_trl.rollout.engines.base import (
    Probe,
    SamplingParams,
    Turn,
    TurnRequest,
    TurnStop,
    check_request,
    lacks_embedding,
)
from arpo_trl.rollout.engines.distribution import Distribution, entropy, sample
from arpo_trl.rollout.engines.generation_rules import rules_of
from arpo_trl.rollout.engines.rows import RowState
from arpo_trl.rollout.engines.slots import GIB, PrefixCache, SlotCache, free_bytes, is_out_of_memory
from arpo_trl.rollout.engines.visibility import (
    WAY_OUT,
    compare_with_plain_forward,
    fit_for_decoding,
    mask_dtype,
    mask_for,
    why_not_sampled,
)
from arpo_trl.rollout.text import decode_exactly, stop_window
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

PREFILL_TOKENS = 16_384
"""The maximum number of tokens, padding included, in one prefill forward. Limits its activations."""
PREFILL_PAIRS = 1 << 24
"""The maximum number of (query, key) pairs in one prefill forward, which is the size of its mask. Attention without a
fused kernel (eager, or SDPA's fallback) also stores that many scores for each head, at 4 bytes or more per score."""
RETAINED_BYTES = 1 << 30
"""The maximum size in bytes of the KV cache of finished turns. Beyond it the engine evicts the oldest turns, and
recomputes them if needed."""
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name of the cache argument in transformers: "cache" in 5.24, "past_key_values" in 5.17."""
SMALLER = "Sample fewer turns at a time, or shorter ones."
"""The default advice of errors about memory."""


class TransformersEngine:
    """An engine on a `PreTrainedModel`, on the model's device and under the autocast that `model_context` opens.

    Args:
        tokenizer: Decodes the end of a turn to find stop strings.
        settings: The distribution to sample from.
        model_context: Opens the model for one session: a context manager that yields it unwrapped, with full weights.
            For a plain model, pass `lambda: contextlib.nullcontext(model)`.
        max_length: The model's context in tokens; None if unlimited.
        generation_kwargs: Other arguments that `generate` would get, in addition to `settings`. They override the
            model's `generation_config`.
        scored_padded: Whether forwards over left-padded batches score the rows, as in TRL. The model must then give
            the same logits with padding.
        most_rows: The maximum number of turns that are live at the same time; None if unknown.
        smaller: A sentence for errors that says how to sample less at a time.

    Raises:
        ConfigError: The engine cannot sample from the model, or does not support one of `generation_kwargs`. Raised by
            `check`, or by the first session if `check` was not called.
        EngineError: The turns do not fit into memory. Raised by `poll`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingParams,
        model_context: Callable[[], AbstractContextManager[PreTrainedModel]],
        *,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        scored_padded: bool = False,
        most_rows: int | None = None,
        smaller: str = SMALLER,
    ):
        self.settings = settings
        self.max_length = max_length
        self.forward_s = 0.0
        self.has_logprobs = True
        self.vocab_size = 0
        self._tokenizer = tokenizer
        self._model_context = model_context
        self._generation_kwargs = generation_kwargs
        self._scored_padded = scored_padded
        self._most_rows, self._smaller = most_rows, smaller
        self._stop_tail = stop_window(settings.stop_strings)
        # The stop reason of turns that other turns continue: they called a tool. Without stop strings they also end
        # with EOS.
        self._continued = TurnStop.STOP_STRING if settings.stop_strings else TurnStop.EOS
        self._can_stop = self._is_eos = torch.empty(0, dtype=torch.bool)
        self._waiting: deque[TurnRequest] = deque()
        self._model: PreTrainedModel | None = None
        self._rows: list[TurnRequest] = []
        self._checked = self._described = False

    def refuse(self, model: PreTrainedModel) -> None:
        """Check, by class and configuration only, that the engine can sample from `model`.

        Raises:
            ConfigError: It cannot.
        """
        if reason := why_not_sampled(model):
            raise ConfigError(
                f"The transformers engine cannot sample from a model of type {model.config.model_type!r}: {reason}. "
                f"{WAY_OUT}"
            )
        rules_of(model.generation_config, self._generation_kwargs, self.settings.min_p)

    def check(self) -> None:
        """Compare the engine with a plain forward of the model on a few tokens. Otherwise the first session does this.

        Raises:
            ConfigError: The logits differ.
        """
        with self._model_context() as model:
            self._check(model)

    def _check(self, model: PreTrainedModel) -> None:
        self.refuse(model)

        def forward(cache: SlotCache, ids: torch.Tensor, rows: slice, positions: torch.Tensor) -> torch.Tensor:
            return _forward(model, cache, ids, rows, positions, int(positions.max()) + 1)

        compare_with_plain_forward(model, lambda: self._empty_cache(model), forward, padded=self._scored_padded)
        self._checked, self.vocab_size = True, model.config.get_text_config().vocab_size

    def _empty_cache(self, model: PreTrainedModel) -> SlotCache:
        layers = model.config.get_text_config().num_hidden_layers
        return SlotCache(layers, most_rows=self._most_rows, way_out=self._smaller)

    @contextmanager
    def session(self) -> Iterator[None]:
        with self._model_context() as model, torch.no_grad():
            if not self._checked:
                self._check(model)
            with fit_for_decoding(model):
                self._open(model)
                try:
                    yield
                finally:
                    self._close()

    def _open(self, model: PreTrainedModel) -> None:
        self.vocab_size = model.config.get_text_config().vocab_size
        self._device = next(model.parameters()).device
        if len(self._can_stop) != self.vocab_size or self._can_stop.device != self._device:
            self._can_stop = self._tokens_that_can_stop(self.vocab_size)
            self._is_eos = torch.zeros(self.vocab_size, dtype=torch.bool, device=self._device)
            self._is_eos[list(self.settings.eos_ids)] = True
        rules = rules_of(model.generation_config, self._generation_kwargs, self.settings.min_p)
        self._distribution = Distribution(self.settings, rules, self._device)
        self._cache = self._empty_cache(model)
        self._state = RowState(self._device)
        self._retained = PrefixCache(RETAINED_BYTES)
        self._model = model

    def _close(self) -> None:
        """Free the session's memory for the update. After an error too, since its traceback still refers to the
        memory."""
        self._model = None
        self._waiting.clear()
        self._rows.clear()
        self._cache.clear()
        self._retained.clear()
        del self._cache, self._state, self._retained, self._distribution
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the update needs blocks of other sizes

    def submit(self, request: TurnRequest) -> None:
        check_request(request)
        if 0 < self.vocab_size <= (last := max(request.ids)):  # 0: before the first session
            raise DataError(f"The text {lacks_embedding(self._tokenizer, last, self.vocab_size)}")
        self._waiting.append(request)

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        """Run one decode step for all rows. `timeout_s` is ignored, since the step itself takes the time."""
        if self._model is None:
            raise EngineError("poll() outside a session: wrap the rollout in `with engine.session():`.")
        try:
            if self._waiting:
                self._admit()
            events = self._step() if self._rows else []
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                f"Memory on {self._device} ran out while sampling. The KV cache takes {self._cache.described()} "
                f"({str(error).partition(chr(10))[0][:200]}). {self._smaller}"
            ) from error
        if not self._described and self._cache.nbytes:
            self._described = True
            self._describe()
        return events

    def _describe(self) -> None:
        """Log the memory that sampling uses, as a warning if it is more than half of the available memory."""
        free = free_bytes(self._device)
        held = self._cache.most_bytes + RETAINED_BYTES
        tight = free is not None and 2 * held > free + self._cache.nbytes
        logger.log(
            logging.WARNING if tight else logging.INFO,
            f"During a rollout the KV cache takes up to {self._cache.described()} on {self._device}, and finished "
            f"turns that others continue up to {RETAINED_BYTES / GIB:.2f} GiB more. Other free memory: "
            f"{'unknown' if free is None else f'{free / GIB:.2f} GiB'}.",
        )

    # Rows ------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give every waiting turn a row and prefill all its ids except the last.

        The last id is the input of the first decode step, so prefill needs no logits.
        """
        first_with: dict[tuple[int, ...], TurnRequest] = {}
        copies: list[TurnRequest] = []
        for request in self._waiting:
            if first_with.setdefault(tuple(request.ids), request) is not request:
                copies.append(request)
        self._waiting.clear()
        unread = {request.id: len(request.ids) - 1 - self._known(request) for request in first_with.values()}
        # Rows of similar length are prefilled together, with little padding.
        unique = sorted(first_with.values(), key=lambda request: unread[request.id])
        first, new = len(self._rows), [*unique, *copies]
        self._rows.extend(new)
        self._cache.reserve(len(self._rows), max(len(request.ids) + request.max_tokens for request in new))
        self._state.admit(first, new, keep_ids=self._distribution.needs_ids)
        start = 0
        while start < len(unique):
            stop = start + 1
            while stop < len(unique) and (stop + 1 - start) * unread[unique[stop].id] <= PREFILL_TOKENS:
                stop += 1
            self._prefill(first + start, unique[start:stop])
            start = stop
        if copies:
            row_of = {tuple(request.ids): first + i for i, request in enumerate(unique)}
            sources = [row_of[tuple(request.ids)] for request in copies]
            targets = list(range(first + len(unique), len(self._rows)))
            self._cache.copy(sources, targets, max(len(request.ids) for request in copies) - 1)

    def _known(self, request: TurnRequest) -> int:
        """The number of the request's ids whose keys and values are in the cache of finished turns."""
        return 0 if request.after is None else self._retained.length(request.after)

    def _prefill(self, first: int, requests: list[TurnRequest]) -> None:
        known = [self._known(request) for request in requests]
        for row, request in enumerate(requests, first):
            if request.after is not None and (states := self._retained.layers(request.after)):
                self._cache.write(row, states)
        read = [request.ids[start:-1] for request, start in zip(requests, known, strict=True)]
        width = max(map(len, read))
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        for i, row_ids in enumerate(read):
            ids[i, : len(row_ids)] = torch.tensor(row_ids)
        # Right padding goes to the position of the row's next token, which overwrites it before it is read.
        ends = torch.tensor([len(request.ids) - 1 for request in requests]).unsqueeze(1)
        positions = (torch.tensor(known).unsqueeze(1) + torch.arange(width)).minimum(ends)
        ids, positions = ids.to(self._device), positions.to(self._device)
        rows, longest = slice(first, first + len(requests)), int(ends.max()) + 1
        span = max(1, min(PREFILL_TOKENS, PREFILL_PAIRS // longest) // len(requests))
        for start in range(0, width, span):
            queries = slice(start, start + span)
            self._forward(ids[:, queries], rows, positions[:, queries], min(longest, max(known) + start + span))

    def _remove(self, finished: list[int]) -> None:
        """Free rows. The last live rows move into the gaps, so that live rows stay contiguous."""
        live = len(self._rows) - len(finished)
        gone = set(finished)
        targets = [row for row in finished if row < live]
        sources = [row for row in range(live, len(self._rows)) if row not in gone]
        if targets:
            self._cache.copy(sources, targets, self._state.longest(len(self._rows)))
            self._state.copy(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                self._rows[target] = self._rows[source]
        del self._rows[live:]

    # Steps -----------------------------------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, rows: slice, positions: torch.Tensor, longest: int) -> torch.Tensor:
        assert self._model is not None
        start = time.perf_counter()
        logits = _forward(self._model, self._cache, ids, rows, positions, longest)
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self.forward_s += time.perf_counter() - start
        return logits

    def _step(self) -> list[Probe | Turn]:
        state, n = self._state, len(self._rows)
        logits = self._forward(
            state.next_id[:n].unsqueeze(1), slice(0, n), state.position[:n].unsqueeze(1), state.longest(n) + 1
        )
        probs = self._distribution(logits.float(), state)
        token = probs.argmax(dim=-1) if self.settings.temperature == 0 else sample(probs, state.uniform(n))
        logprob = probs.gather(1, token.unsqueeze(1)).squeeze(1).log()
        state.record(n, token, logprob, entropy(probs, state.in_probe(n)))
        return self._events(n, token, logprob)

    def _events(self, n: int, token: torch.Tensor, logprob: torch.Tensor) -> list[Probe | Turn]:
        state = self._state
        count, limit, probe, position = state.written[:n], state.limit[:n], state.probe[:n], state.position[:n]
        out_of_room = count == limit
        ended, can_stop = self._is_eos[token], self._can_stop[token]
        diverged = logprob.isnan()
        maybe = (out_of_room | ended | can_stop | (count == probe) | diverged).nonzero().flatten()
        if not len(maybe):
            return []
        # One transfer for all rows that may have an event, instead of one per row: of facts and their last ids, in
        # which a stop string is found. A long turn is transferred once, when it ends.
        facts = torch.stack((count, position, ended, can_stop, out_of_room, diverged))[:, maybe].T
        last = count[maybe].unsqueeze(1) - torch.arange(self._stop_tail, 0, -1, device=self._device)
        tails = state.ids[maybe.unsqueeze(1), last.clamp(min=0)]
        rows = torch.cat((maybe.unsqueeze(1), facts, tails), dim=1).tolist()
        told: list[tuple[int, int, int, TurnStop | None]] = []
        for row, written, length, eos, may_stop, full, is_nan, *tail in rows:
            if is_nan:
                raise EngineError(
                    "The model's probabilities are NaN: its weights have diverged. Lower learning_rate, or set "
                    "max_grad_norm, and start a new run, perhaps from an earlier checkpoint (model_name_or_path)."
                )
            if eos:
                told.append((row, written, length, TurnStop.EOS))
            elif may_stop and self._found_stop(tail[max(0, self._stop_tail - written) :]):
                told.append((row, written, length, TurnStop.STOP_STRING))
            elif full:
                told.append((row, written, length, TurnStop.LENGTH))
            elif written == self._rows[row].probe_tokens:
                told.append((row, written, length, None))
        return self._told(told) if told else []

    def _told(self, told: list[tuple[int, int, int, TurnStop | None]]) -> list[Probe | Turn]:
        """Return an event for each (row, tokens written, tokens with the prompt, why the turn ends or None for a
        probe), and free the rows of the turns that end."""
        state = self._state
        finished = [row for row, _, _, stop in told if stop is not None]
        longest = max(written for _, written, _, _ in told)
        ids = dict(zip(finished, state.ids[finished, :longest].tolist() if finished else (), strict=True))
        logprobs = dict(zip(finished, state.logprobs[finished, :longest].tolist() if finished else (), strict=True))
        entropies = state.entropies[[row for row, *_ in told]].tolist()
        events: list[Probe | Turn] = []
        for (row, written, length, stop), of_row in zip(told, entropies, strict=True):
            request = self._rows[row]
            if stop is None:
                events.append(Probe(id=request.id, entropies=of_row[:written]))
                continue
            events.append(
                Turn(
                    id=request.id,
                    ids=ids[row][:written],
                    logprobs=logprobs[row][:written],
                    entropies=of_row[: min(written, request.probe_tokens)],
                    stop=stop,
                )
            )
            if stop is self._continued:
                self._retained.keep(request.id, self._cache.read(row, length))
        if finished:
            self._remove(finished)
        return events

    # Stop strings ----------------------------------------------------------------------------------------------------

    def _found_stop(self, tail: list[int]) -> bool:
        text = decode_exactly(self._tokenizer, tail)
        return any(stop in text for stop in self.settings.stop_strings)

    def _tokens_that_can_stop(self, vocab_size: int) -> torch.Tensor:
        """(V,) bool: tokens whose text has the last character of a stop string. Only these can complete one."""
        last = {stop[-1] for stop in self.settings.stop_strings}
        texts = self._tokenizer.batch_decode([[i] for i in range(min(vocab_size, len(self._tokenizer)))])
        can = torch.zeros(vocab_size, dtype=torch.bool)
        can[: len(texts)] = torch.tensor([any(char in text for char in last) for text in texts])
        return can.to(self._device)


def _forward(
    model: PreTrainedModel, cache: SlotCache, ids: torch.Tensor, rows: slice, positions: torch.Tensor, longest: int
) -> torch.Tensor:
    """(rows, vocabulary) logits of each row's last query. All positions are below `longest`."""
    cache.aim(rows, positions, longest)
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=mask_for(model.config.get_text_config(), positions, cache.length, mask_dtype(model)),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE_ARGUMENT: cache},
    ).logits[:, -1]
    return logits

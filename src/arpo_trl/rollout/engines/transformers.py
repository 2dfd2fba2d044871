"""Turns from a transformers model: continuous batching over one key/value buffer.

Every live turn owns a row. A decode step feeds each row its newest token at the row's own position, so rows of
different lengths need no padding tokens, new rows join between two steps, and finished ones are replaced by the last
row. The widest tensor is one step's (rows, vocabulary); nothing of shape (rows, length, vocabulary) ever exists.

What a turn that called a tool has computed is kept for the turns that continue it, branches included, so only the tool
result between them is read; turns with the same ids are read once.

Random numbers are drawn per turn from its own seed, ahead of time, and tokens come from the inverse of the cumulative
distribution. What a turn samples does not depend on its neighbours, up to the rounding of the model's forward.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.rollout.engines.base import Probe, SamplingSettings, Turn, TurnRequest, TurnStop

PREFILL_TOKENS = 16_384
"""Most tokens, padding included, that one prefill forward takes; bounds its activations."""
RETAINED_BYTES = 1 << 30
"""Most memory for the keys and values of finished turns; beyond it the oldest go, and would be computed again."""
ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a 4-D mask."""
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the keys and values that a model is given: the former in 5.24, the latter in 5.17."""


_State = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one row in one layer, each (heads, length, dim)."""


class _Slots(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, positions, dim), written at each row's own positions."""

    is_sliding = False
    is_initialized: bool
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, batch: _SlotCache):
        super().__init__()
        self._batch = batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._make_room(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._make_room(key_states, value_states)
        rows, positions, length = self._batch.rows, self._batch.positions, self._batch.length
        index = torch.arange(rows.start, rows.stop, device=key_states.device).unsqueeze(1)
        # Advanced indices around a slice put the indexed axes first: (rows, queries, heads, dim).
        self.keys[index, :, positions] = key_states.transpose(1, 2)
        self.values[index, :, positions] = value_states.transpose(1, 2)
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Gives the rows `targets` the first `length` positions of the rows `sources`."""
        for states in (self.keys, self.values):
            known = states[:, :, :length]  # index_copy_ is several times as fast here as assignment to a list of rows
            known.index_copy_(0, torch.tensor(targets, device=states.device), known[sources])

    def read(self, row: int, length: int) -> _State:
        """The row's first `length` keys and values, copied."""
        return self.keys[row, :, :length].clone(), self.values[row, :, :length].clone()

    def write(self, row: int, state: _State) -> None:
        keys, values = state
        length = keys.size(1)
        self._make_room(keys[None], values[None])
        self.keys[row, :, :length], self.values[row, :, :length] = keys, values

    def _make_room(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Grows the buffers to what the batch has reserved; `keys` and `values` are (any, heads, any, dim).

        Each keeps the type it comes in: under autocast a model's rotary embedding or norm may leave keys in float32
        where values are bfloat16.
        """
        rows, positions = self._batch.max_rows, self._batch.max_positions
        if self.is_initialized and (self.keys.size(0), self.keys.size(2)) == (rows, positions):
            return
        old = (self.keys, self.values) if self.is_initialized else ()
        self.keys, self.values = (
            like.new_zeros(rows, like.size(1), positions, like.size(3)) for like in (keys, values)
        )
        for room, before in zip((self.keys, self.values), old, strict=False):
            room[: before.size(0), :, : before.size(2)] = before
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._batch.length, 0

    def get_seq_length(self) -> int:
        return self._batch.length

    def get_max_length(self) -> int:
        return -1


class _SlotCache(Cache):
    """The layers, and the rows and positions that the next forward writes to."""

    def __init__(self, num_layers: int):
        self.rows, self.length = slice(0, 0), 0
        self.positions = torch.empty(0, 0, dtype=torch.long)
        self.max_rows = self.max_positions = 0
        super().__init__(layers=[_Slots(self) for _ in range(num_layers)])

    def aim(self, rows: slice, positions: torch.Tensor, length: int) -> None:
        """Points the next forward at `rows`, its queries at `positions` (rows, queries), all below `length`."""
        self.rows, self.positions, self.length = rows, positions, length

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        for layer in self.layers:
            layer.copy(sources, targets, length)

    def reserve(self, rows: int, positions: int) -> None:
        """Makes room, in powers of two for rows and in blocks of 128 positions so that growth stays rare."""
        if rows > self.max_rows:
            self.max_rows = 1 << (rows - 1).bit_length()
        if positions > self.max_positions:
            self.max_positions = -(-positions // 128) * 128


class _Retained:
    """Keys and values of finished turns, the newest that fit into `max_bytes`."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._states: dict[int, list[_State]] = {}

    def keep(self, request: int, layers: list[_State]) -> None:
        """Keeps one pair per layer for the turn `request`, dropping the oldest turns."""
        self._states[request] = layers
        self._bytes += _bytes_of(layers)
        while self._bytes > self._max_bytes:
            self._bytes -= _bytes_of(self._states.pop(next(iter(self._states))))

    def length(self, request: int) -> int:
        """Positions that are kept of a turn and what it continued, 0 if nothing is."""
        layers = self._states.get(request)
        return layers[0][0].size(1) if layers else 0

    def layers(self, request: int) -> list[_State]:
        return self._states.get(request, [])


def _bytes_of(layers: list[_State]) -> int:
    return sum(states.nbytes for layer in layers for states in layer)


class TransformersEngine:
    """An engine on a `PreTrainedModel`, on whatever device that is.

    Args:
        tokenizer: Decodes the end of a turn to find stop strings.
        settings: The distribution to sample from.
        model_context: Opens the model for one session: a context manager that yields it with its weights in place
            (gathered, unwrapped). A plain model needs `lambda: contextlib.nullcontext(model)`.

    Raises:
        ConfigError: The model keeps state that is not plain attention keys and values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        model_context: Callable[[], AbstractContextManager[PreTrainedModel]],
    ):
        self.settings = settings
        self.forward_s = 0.0
        self.vocab_size = 0
        self._tokenizer = tokenizer
        self._model_context = model_context
        self._warpers, self._penalty = _warpers(settings)
        self._stop_tail = 2 + max((len(stop.encode()) for stop in settings.stop_strings), default=0)
        # Which turns others continue: those that called a tool, which without stop strings also end by EOS.
        self._continued = TurnStop.STOP_STRING if settings.stop_strings else TurnStop.EOS
        self._can_stop = self._is_eos = torch.empty(0, dtype=torch.bool)
        self._waiting: deque[TurnRequest] = deque()
        self._model: PreTrainedModel | None = None
        self._rows: list[TurnRequest] = []

    @property
    def pending(self) -> int:
        return len(self._waiting) + len(self._rows)

    @contextmanager
    def session(self) -> Iterator[None]:
        with self._model_context() as model, torch.no_grad(), _fit_for_decoding(model):
            config = model.config.get_text_config()
            self._check_model(config)
            self.vocab_size = config.vocab_size
            self._model = model
            self._device = next(model.parameters()).device
            if len(self._can_stop) != config.vocab_size:
                self._can_stop = self._tokens_that_can_stop(config.vocab_size)
                self._is_eos = torch.zeros(config.vocab_size, dtype=torch.bool, device=self._device)
                self._is_eos[list(self.settings.eos_ids)] = True
            self._cache = _SlotCache(config.num_hidden_layers)
            self._state = _RowState(self._device)
            self._retained = _Retained(RETAINED_BYTES)
            try:
                yield
            finally:
                self._model = None
                self._waiting.clear()
                self._rows.clear()
                del self._cache, self._state, self._retained

    def submit(self, request: TurnRequest) -> None:
        if request.max_tokens < 1 or not request.ids:
            raise EngineError(
                f"Turn {request.key} asks for {request.max_tokens} tokens after {len(request.ids)}; both must be ≥ 1."
            )
        self._waiting.append(request)

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        """One decode step for all rows (`timeout_s` has no use here: the step is the wait)."""
        if self._model is None:
            raise EngineError("poll() outside a session: wrap the rollout in `with engine.session():`.")
        if self._waiting:
            self._admit()
        return self._step() if self._rows else []

    # Rows ------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives every waiting turn a row and computes the keys and values of all its ids but the last.

        The last id becomes the first decode step's input, so prefill needs no logits at all.
        """
        first_with: dict[tuple[int, ...], TurnRequest] = {}
        copies: list[TurnRequest] = []
        for request in self._waiting:
            if first_with.setdefault(tuple(request.ids), request) is not request:
                copies.append(request)
        self._waiting.clear()
        unread = {request.id: len(request.ids) - 1 - self._known(request) for request in first_with.values()}
        unique = sorted(first_with.values(), key=lambda request: unread[request.id])  # like with like: less padding
        first, new = len(self._rows), [*unique, *copies]
        self._rows.extend(new)
        # Right padding reaches as far past a row's known ids as the longest row has ids to read.
        reach = max(len(request.ids) for request in unique) + max(unread.values())
        self._cache.reserve(len(self._rows), max(reach, *(len(request.ids) + request.max_tokens for request in new)))
        self._state.admit(first, new, keep_ids=self._penalty is not None)
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
            self._cache.copy(sources, targets, max(len(request.ids) for request in copies))

    def _known(self, request: TurnRequest) -> int:
        """How many of the request's ids an earlier turn's retained state covers."""
        return 0 if request.after is None else self._retained.length(request.after)

    def _prefill(self, first: int, requests: list[TurnRequest]) -> None:
        known = [self._known(request) for request in requests]
        for row, request in enumerate(requests, first):
            if request.after is not None:
                for layer, state in zip(self._cache.layers, self._retained.layers(request.after), strict=False):
                    layer.write(row, state)
        width = max(len(request.ids) - 1 - start for request, start in zip(requests, known, strict=True))
        if width == 0:
            return
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        for i, (request, start) in enumerate(zip(requests, known, strict=True)):
            # Right padding writes keys past the row's end; decoding overwrites each of them before it can be seen.
            ids[i, : len(request.ids) - 1 - start] = torch.tensor(request.ids[start:-1])
        positions = torch.tensor(known).unsqueeze(1) + torch.arange(width)
        rows = slice(first, first + len(requests))
        self._forward(ids.to(self._device), rows, positions.to(self._device), max(known) + width)

    def _remove(self, finished: list[int]) -> None:
        """Frees rows, moving the last live ones into the gaps so that the live ones stay contiguous."""
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

    def _forward(self, ids: torch.Tensor, rows: slice, positions: torch.Tensor, length: int) -> torch.Tensor:
        """(rows, vocabulary) logits of the last query of each row; keys below a query's position are visible."""
        assert self._model is not None
        start = time.perf_counter()
        visible = torch.arange(length, device=self._device) <= positions.unsqueeze(-1)  # (rows, queries, keys)
        mask = visible.unsqueeze(1)
        if self._model.config._attn_implementation == "eager":
            dtype = next(self._model.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=self._device).masked_fill(~mask, torch.finfo(dtype).min)
        self._cache.aim(rows, positions, length)
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        ).logits[:, -1]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.forward_s += time.perf_counter() - start
        return logits

    def _step(self) -> list[Probe | Turn]:
        state, n = self._state, len(self._rows)
        logits = self._forward(
            state.next_id[:n].unsqueeze(1), slice(0, n), state.position[:n].unsqueeze(1), state.longest(n) + 1
        ).float()
        if self._penalty is not None:
            logits = self._penalty(state.history(n), logits)
        probs = torch.softmax(self._warpers(None, logits), dim=-1)
        token = probs.argmax(dim=-1) if self.settings.temperature == 0 else sample(probs, state.uniform(n))
        logprob = probs.gather(1, token.unsqueeze(1)).squeeze(1).log()
        state.record(n, token, logprob, entropy(probs, state.in_probe(n)))
        return self._events(n, token)

    def _events(self, n: int, token: torch.Tensor) -> list[Probe | Turn]:
        state = self._state
        count, limit, probe, position = state.written[:n], state.limit[:n], state.probe[:n], state.position[:n]
        out_of_room = count == limit
        ended, can_stop = self._is_eos[token], self._can_stop[token]
        maybe = (out_of_room | ended | can_stop | (count == probe)).nonzero().flatten().tolist()
        events: list[Probe | Turn] = []
        finished: list[int] = []
        # One transfer for all rows that may have something to say, not one a row.
        facts = torch.stack((count, position, ended, can_stop, out_of_room))[:, maybe].T.tolist()
        ids, entropies = state.ids[maybe].tolist(), state.entropies[maybe].tolist()
        logprobs = state.logprobs[maybe].tolist()
        for i, (row, (written, length, eos, may_stop, full)) in enumerate(zip(maybe, facts, strict=True)):
            request = self._rows[row]
            if eos:
                stop = TurnStop.EOS
            elif may_stop and self._found_stop(ids[i][max(0, written - self._stop_tail) : written]):
                stop = TurnStop.STOP_STRING
            elif full:
                stop = TurnStop.LENGTH
            else:
                if written == request.probe_tokens:
                    events.append(Probe(request.id, entropies[i][:written]))
                continue
            probed = min(written, request.probe_tokens)
            events.append(Turn(request.id, ids[i][:written], logprobs[i][:written], entropies[i][:probed], stop))
            finished.append(row)
            if stop is self._continued:
                self._retained.keep(request.id, [layer.read(row, length) for layer in self._cache.layers])
        if finished:
            self._remove(finished)
        return events

    # Stop strings ----------------------------------------------------------------------------------------------------

    def _found_stop(self, tail: list[int]) -> bool:
        text = self._tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.settings.stop_strings)

    def _tokens_that_can_stop(self, vocab_size: int) -> torch.Tensor:
        """(V,) bool: tokens whose text holds the last character of a stop string; only they can complete one."""
        last = {stop[-1] for stop in self.settings.stop_strings}
        texts = self._tokenizer.batch_decode([[i] for i in range(min(vocab_size, len(self._tokenizer)))])
        can = torch.zeros(vocab_size, dtype=torch.bool)
        can[: len(texts)] = torch.tensor([any(char in text for char in last) for text in texts])
        return can.to(self._device)

    @staticmethod
    def _check_model(config: Any) -> None:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ConfigError(
                f"The transformers engine keeps keys and values of full attention only, but {config.model_type} has "
                f"layers of type {sorted(kinds)}. Use a vLLM engine for this model."
            )


class _RowState:
    """Per-row tensors of the live turns: what they wrote, where they are, their random numbers."""

    def __init__(self, device: torch.device):
        self.device = device
        self.next_id = torch.zeros(0, dtype=torch.long, device=device)
        self.position = torch.zeros(0, dtype=torch.long, device=device)
        self.written = torch.zeros(0, dtype=torch.long, device=device)
        self.limit = torch.zeros(0, dtype=torch.long, device=device)
        self.probe = torch.zeros(0, dtype=torch.long, device=device)
        self.ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(0, 0, device=device)
        self.entropies = torch.zeros(0, 0, device=device)
        self.uniforms = torch.zeros(0, 0, device=device)
        self.seen = torch.zeros(0, 0, dtype=torch.long, device=device)  # prompt and completion, for repetition_penalty

    def admit(self, first: int, requests: list[TurnRequest], *, keep_ids: bool) -> None:
        rows = first + len(requests)
        width = max(request.max_tokens for request in requests)
        for name in ("next_id", "position", "written", "limit", "probe"):
            setattr(self, name, _grown(getattr(self, name), rows))
        for name, columns in (("ids", width), ("logprobs", width), ("uniforms", width)):
            setattr(self, name, _grown(getattr(self, name), rows, columns))
        self.entropies = _grown(self.entropies, rows, max(request.probe_tokens for request in requests))
        new = slice(first, rows)
        self.next_id[new] = torch.tensor([request.ids[-1] for request in requests])
        self.position[new] = torch.tensor([len(request.ids) - 1 for request in requests])
        self.written[new] = 0
        self.limit[new] = torch.tensor([request.max_tokens for request in requests])
        self.probe[new] = torch.tensor([request.probe_tokens for request in requests])
        for row, request in enumerate(requests, first):
            draws = np.random.Generator(np.random.PCG64(request.seed)).random(request.max_tokens, dtype=np.float32)
            self.uniforms[row, : request.max_tokens] = torch.from_numpy(draws)
        if keep_ids:
            length = max(len(request.ids) + request.max_tokens for request in requests)
            self.seen = _grown(self.seen, rows, length)
            for row, request in enumerate(requests, first):
                self.seen[row] = request.ids[0]  # padding that penalises no token the row has not seen
                self.seen[row, : len(request.ids)] = torch.tensor(request.ids)

    def uniform(self, n: int) -> torch.Tensor:
        return self.uniforms[:n].gather(1, self.written[:n].unsqueeze(1)).squeeze(1)

    def in_probe(self, n: int) -> torch.Tensor:
        return self.written[:n] < self.probe[:n]

    def history(self, n: int) -> torch.Tensor:
        return self.seen[:n]

    def longest(self, n: int) -> int:
        return int(self.position[:n].max())

    def record(self, n: int, token: torch.Tensor, logprob: torch.Tensor, entropies: torch.Tensor) -> None:
        at = self.written[:n].unsqueeze(1)
        self.ids[:n].scatter_(1, at, token.unsqueeze(1))
        self.logprobs[:n].scatter_(1, at, logprob.unsqueeze(1))
        rows = self.in_probe(n).nonzero().flatten()
        self.entropies[rows, self.written[rows]] = entropies
        self.next_id[:n] = token
        self.position[:n] += 1
        self.written[:n] += 1
        if self.seen.size(0):
            self.seen[:n].scatter_(1, self.position[:n].unsqueeze(1), token.unsqueeze(1))

    def copy(self, sources: list[int], targets: list[int]) -> None:
        for tensor in (self.next_id, self.position, self.written, self.limit, self.probe):
            tensor[targets] = tensor[sources]
        for tensor in (self.ids, self.logprobs, self.entropies, self.uniforms, self.seen):
            if tensor.size(0):
                tensor[targets] = tensor[sources]


def sample(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rows,) token ids, the inverse of each row's cumulative distribution at `uniform` in [0, 1).

    A token of probability zero is never drawn: its cumulative sum equals its predecessor's, and the search goes right.
    """
    cumulative = probs.cumsum(dim=-1)
    # The last sum may fall short of 1 by rounding; scaling by it keeps every draw inside.
    target = (uniform * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=probs.size(1) - 1)


def entropy(probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Entropies in nats of the distributions that `rows` (bool) selects; 0·log 0 counts as 0."""
    selected = probs[rows]
    return -(selected * selected.clamp(min=torch.finfo(selected.dtype).tiny).log()).sum(dim=-1)


def _warpers(settings: SamplingSettings) -> tuple[LogitsProcessorList, RepetitionPenaltyLogitsProcessor | None]:
    """transformers' own warpers, in the order of `generate`, and the one processor that needs the ids."""
    warpers = LogitsProcessorList()
    if settings.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        warpers.append(MinPLogitsWarper(settings.min_p))
    penalty = settings.repetition_penalty
    return warpers, RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None


def _grown(tensor: torch.Tensor, rows: int, columns: int | None = None) -> torch.Tensor:
    """`tensor` with at least that many rows (and columns), new places zero; the same object where it is large."""
    shape = [max(tensor.size(0), rows)]
    if columns is not None:
        shape.append(max(tensor.size(1), columns))
    if list(tensor.shape) == shape:
        return tensor
    larger = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    larger[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return larger


@contextmanager
def _fit_for_decoding(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode with an attention that takes a 4-D mask; as it was afterwards."""
    training, attention = model.training, model.config._attn_implementation
    if attention not in ATTENTION:
        model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if attention not in ATTENTION:
            model.set_attn_implementation(attention)

"""Attention inside a pack of rows that share prefixes: one variable-length kernel call per depth of the trie.

An edge of the trie is a run of tokens that the same rows contain. The rows below an edge follow it in the pack without
a gap, so a query has exactly one ancestor edge at each depth above its own edge. Therefore a few calls are enough:

    # pack:      a a b b c d d e     edges: a a (depth 0), b b (1), c (2), d d (2), e (1)
    # own edge:  [a a] [b b] [c] [d d] [e]        each attends to itself, causally: one call for all edges
    # depth 0:   b b c d d e  attend to  a a      all of it
    # depth 1:   c d d        attend to  b b

The results of the calls are merged with weights from their logsumexps ("log-sums"). The backward of a call takes the
merged output and log-sums and computes this call's part of the gradients, as in ring attention (arXiv 2310.01889). A
pack of depth d takes d + 1 calls in each direction. It needs no mask and no compilation for its shape.

Queries, keys, values and outputs are (tokens, heads, dim) here, log-sums (heads, tokens) in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

Edge = tuple[int, int, int]
"""(start, stop, end): tokens [start, stop) of the pack; the rows that contain them reach up to `end`."""
Index = slice | torch.Tensor
Span = tuple[int, int, int, int]
"""(query start, query stop, key start, key stop) of one sequence, as positions in the call."""

FLASH_CAPABILITY = (8, 0)
"""The lowest compute capability that torch's flash kernel supports: Ampere."""
FLASH_HEAD_DIM = 256
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of packed and padded attention, forward and backward, that is accepted as rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a variable-length kernel: the queries of each sequence attend to the keys of the same sequence.

    `queries` and `keys` are positions in the pack. `spans` are the sequences in order; `query_starts` and
    `key_starts` (sequences + 1,) are their boundaries as int32 on the pack's device. The sequences of a `causal` call
    have as many queries as keys, and a query attends to the keys up to itself.

        # "depth 1" of the example above: c d d attend to b b
        Call(queries=slice(4, 7), keys=slice(2, 4), spans=((0, 3, 0, 2),), query_starts=tensor([0, 3]),
             key_starts=tensor([0, 2]), longest_query=3, longest_key=2, causal=False)
    """

    queries: Index
    keys: Index
    spans: tuple[Span, ...]
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool


def plan_calls(edges: tuple[Edge, ...], device: torch.device) -> tuple[Call, ...]:
    """The calls that let every token attend to its own path: first all edges themselves, then one call per depth."""
    above: list[int] = []  # ends of the edges above the current one
    by_depth: list[list[Edge]] = []
    for start, stop, end in edges:
        while above and above[-1] <= start:
            above.pop()
        if stop < end:
            if len(by_depth) == len(above):
                by_depth.append([])
            by_depth[len(above)].append((start, stop, end))
        above.append(end)
    own = [((start, stop), (start, stop)) for start, stop, _ in edges]
    below = [[((stop, end), (start, stop)) for start, stop, end in at_depth] for at_depth in by_depth]
    return (_call(own, True, device), *(_call(ranges, False, device) for ranges in below))


def _call(ranges: list[tuple[tuple[int, int], tuple[int, int]]], causal: bool, device: torch.device) -> Call:
    queries, keys = zip(*ranges, strict=True)
    sizes = [[stop - start for start, stop in side] for side in (queries, keys)]
    starts = [[0, *accumulate(side)] for side in sizes]
    spans = zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False)
    query_starts, key_starts = (torch.tensor(side, dtype=torch.int32, device=device) for side in starts)
    return Call(
        queries=_index(queries, device),
        keys=_index(keys, device),
        spans=tuple(spans),
        query_starts=query_starts,
        key_starts=key_starts,
        longest_query=max(sizes[0]),
        longest_key=max(sizes[1]),
        causal=causal,
    )


def _index(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Index:
    """A slice, which copies nothing, if the ranges are contiguous; otherwise a tensor of positions."""
    if all(stop == start for (_, stop), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.from_numpy(np.concatenate([np.arange(*of) for of in ranges])).to(device)


States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value."""
Result = tuple[torch.Tensor, torch.Tensor, Any]
"""Output, log-sums, and other values that the kernel's backward needs from its forward."""


class Kernel(Protocol):
    """A variable-length attention kernel."""

    grouped: bool
    """Whether keys and values may have fewer heads than queries."""

    def forward(self, states: States, call: Call, scaling: float | None) -> Result: ...

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, call: Call, scaling: float | None
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key and value. Output and log-sums in `result` are the merged ones of all calls."""


class FlashKernel:
    """torch's flash kernel on CUDA, for float16 and bfloat16."""

    grouped = True

    def forward(self, states: States, call: Call, scaling: float | None) -> Result:
        output, logsums, *rest, _ = torch.ops.aten._flash_attention_forward(
            *states, *self._lengths(call), 0.0, call.causal, False, scale=scaling
        )
        return output, logsums, rest

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, call: Call, scaling: float | None
    ) -> tuple[torch.Tensor, ...]:
        output, logsums, rest = result
        lengths = self._lengths(call)
        grads: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_backward(
            grad, *states, output, logsums.contiguous(), *lengths, 0.0, call.causal, *rest, scale=scaling
        )
        return grads

    @staticmethod
    def _lengths(call: Call) -> tuple[Any, ...]:
        # If the longest query is 1, torch assumes decoding and swaps grouped heads with queries. The longest lengths
        # are only upper bounds, so 2 is safe.
        return call.query_starts, call.key_starts, max(call.longest_query, 2), call.longest_key


class EfficientKernel:
    """torch's memory-efficient kernel on CUDA, for float32. Its log-sums are padded: (sequences, heads, longest)."""

    grouped = False
    ALIGNED = 32
    """The kernel rounds the width of its log-sums up to a multiple of this."""

    def forward(self, states: States, call: Call, scaling: float | None) -> Result:
        output, padded, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            *(of.unsqueeze(0) for of in states),
            None,
            *(call.query_starts, call.key_starts, call.longest_query, call.longest_key),
            *(0.0, int(call.causal), True),
            scale=scaling,
        )
        sequence, place = self._places(call)
        return output.squeeze(0), padded[sequence, :, place].t(), (seed, offset)

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, call: Call, scaling: float | None
    ) -> tuple[torch.Tensor, ...]:
        output, logsums, rest = result
        sequence, place = self._places(call)
        width = -(-call.longest_query // self.ALIGNED) * self.ALIGNED
        padded = logsums.new_full((len(call.spans), logsums.size(0), width), torch.inf)  # no weight
        padded[sequence, :, place] = logsums.t()
        *grads, _ = torch.ops.aten._efficient_attention_backward(
            *(of.unsqueeze(0) for of in (grad, *states)),
            None,
            output.unsqueeze(0),
            *(call.query_starts, call.key_starts, call.longest_query, call.longest_key),
            padded,
            *(0.0, *rest, int(call.causal), False),
            scale=scaling,
        )
        return tuple(of.squeeze(0) for of in grads)

    @staticmethod
    def _places(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequence, position in the sequence) of each query."""
        starts = call.query_starts.long()
        queries = torch.arange(call.spans[-1][1], device=starts.device)
        sequence = torch.searchsorted(starts, queries, right=True) - 1
        return sequence, queries - starts[sequence]


class CPUKernel:
    """torch's flash kernel on a CPU, which SDPA uses. It accepts only one sequence, so it runs once per sequence."""

    grouped = False

    def forward(self, states: States, call: Call, scaling: float | None) -> Result:
        query, key, value = states
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_one(query[q:r]), *_one(key[k:m], value[k:m]), 0.0, call.causal, scale=scaling
            )
            for q, r, k, m in call.spans
        ]
        outputs, logsums = zip(*parts, strict=True)
        return torch.cat(outputs, dim=2)[0].transpose(0, 1), torch.cat(logsums, dim=2)[0], None

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, call: Call, scaling: float | None
    ) -> tuple[torch.Tensor, ...]:
        (query, key, value), (output, logsums, _) = states, result
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_one(grad[q:r], query[q:r]),
                *_one(key[k:m], value[k:m]),
                *_one(output[q:r]),
                logsums[None, :, q:r],
                *(0.0, call.causal),
                scale=scaling,
            )
            for q, r, k, m in call.spans
        ]
        return tuple(torch.cat(grads, dim=2)[0].transpose(0, 1) for grads in zip(*parts, strict=True))


def _one(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views each (tokens, heads, dim) tensor as (1, heads, tokens, dim), SDPA's layout."""
    return tuple(of.transpose(0, 1).unsqueeze(0) for of in states)


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    if device.type == "cpu":
        return CPUKernel()
    return EfficientKernel() if dtype == torch.float32 else FlashKernel()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: tuple[Call, ...],
        kernel: Kernel,
        scaling: float | None,
    ) -> torch.Tensor:
        own, *depths = calls
        output, logsums, rest = kernel.forward((query, key, value), own, scaling)
        total, rests = output.to(logsums.dtype), [rest]
        for call in depths:
            at = call.queries
            states = query[at], key[call.keys], value[call.keys]
            part, logsum, rest = kernel.forward(states, call, scaling)
            before = logsums[:, at]
            both = torch.logaddexp(before, logsum)
            total[at] = total[at] * _weights(before, both) + part * _weights(logsum, both)
            logsums[:, at] = both
            rests.append(rest)
        output = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, logsums)
        ctx.calls, ctx.kernel, ctx.scaling, ctx.rests = calls, kernel, scaling, rests
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsums = ctx.saved_tensors
        sums: list[torch.Tensor] = []
        for call, rest in zip(ctx.calls, ctx.rests, strict=True):
            at, of = call.queries, call.keys
            states, result = (query[at], key[of], value[of]), (output[at], logsums[:, at], rest)
            parts = ctx.kernel.backward(grads[0][at], states, result, call, ctx.scaling)
            if not sums:  # the call for each edge itself, which covers the whole pack
                sums = [part.to(logsums.dtype) for part in parts]
                continue
            for total, places, part in zip(sums, (at, of, of), parts, strict=True):
                total[places] += part
        return (*(total.to(query.dtype) for total in sums), None, None, None)


def _weights(part: torch.Tensor, all_of: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, 1) weights of some keys relative to all keys, from the log-sums of both."""
    return (part - all_of).exp().t().unsqueeze(-1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calls: tuple[Call, ...], *, scaling: float | None
) -> torch.Tensor:
    """(1, N, heads, dim) attention of every query over its own path.

    Args:
        query: (1, heads, N, dim).
        key, value: The same shape, or with fewer heads.
        calls: The pack's calls, from `plan_calls`.
        scaling: Factor of the attention scores. None: 1 / √dim.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # like SDPA; a norm may have left queries and keys in float32
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = kernel_for(query.device, query.dtype)
    if not kernel.grouped:
        groups = query.size(1) // key.size(1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    states = (of[0].transpose(0, 1) for of in (query, key, value))
    attended = _Attend.apply(*states, calls, kernel, scaling)
    assert isinstance(attended, torch.Tensor)
    return attended.unsqueeze(0)


@cache
def why_no_attention(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int
) -> str | None:
    """The reason why attention over packs does not work with such heads on the device; None if it works. Runs one
    trial."""
    if device.type not in ("cpu", "cuda"):
        return f"attention over packs needs a CPU or a CUDA device, but this is {device.type!r}"
    if device.type == "cuda" and dtype != torch.float32:
        capability = torch.cuda.get_device_capability(device)
        if capability < FLASH_CAPABILITY:
            needed, found = (".".join(map(str, of)) for of in (FLASH_CAPABILITY, capability))
            return f"torch's flash kernel needs a GPU of compute capability {needed} or more, but this one has {found}"
        if head_dim % 8 or head_dim > FLASH_HEAD_DIM:
            return (
                f"torch's flash kernel needs a head dimension of 8, 16 … {FLASH_HEAD_DIM}, and the model's is "
                f"{head_dim}"
            )
    subject = f"packed attention in {dtype} on {device}"
    try:
        error = _difference(device, dtype, heads, key_heads, head_dim)
    except Exception as fault:  # an error of torch, a kernel or a driver is the reason to report
        return f"{subject} failed: {type(fault).__name__}: {fault}"
    limit = TOLERANCE[dtype]
    return None if error <= limit else f"{subject} differs from padded by {error:.1e}, more than rounding ({limit})"


def _difference(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> float:
    """Largest relative difference of outputs and gradients between three rows computed as a pack and padded."""
    # The rows are A B C, A B D and A E.
    edges = ((0, 40, 110), (40, 60, 100), (60, 80, 80), (80, 100, 100), (100, 110, 110))
    rows = [[*range(80)], [*range(60), *range(80, 100)], [*range(40), *range(100, 110)]]
    places = torch.tensor([row + [0] * (80 - len(row)) for row in rows], device=device)
    real = torch.tensor([[1.0] * len(row) + [0.0] * (80 - len(row)) for row in rows], device=device)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, count, 110, head_dim, generator=generator) for count in (heads, key_heads, key_heads)]
    weights = torch.randn(3, 80, heads, head_dim, generator=generator).to(device) * real[..., None, None]
    found = []
    for packed in (True, False):
        query, key, value = (of.to(device, dtype).requires_grad_() for of in drawn)
        with torch.enable_grad():
            if packed:
                attended = attend(query, key, value, plan_calls(edges, device), scaling=None)[0][places]
            else:
                q, k, v = (of[0][:, places].transpose(0, 1) for of in (query, key, value))  # (3, heads, 80, dim)
                attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            (attended * weights).sum().backward()
        found.append([attended.detach() * weights, query.grad, key.grad, value.grad])
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))

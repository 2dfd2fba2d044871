"""Attention inside a pack of rows that share prefixes: every edge of the trie attends to its own path.

An edge of the trie is a run of tokens that the same rows contain. The edges cover the pack one after another. The path
of an edge consists of the edges above it, from the root down, and of the edge itself:

    # pack:      a a b b c d d e     edges: a a, b b, c, d d, e
    # paths:     [a a]   [a a b b]   [a a b b c]   [a a b b d d]   [a a e]

The last query of an edge attends to the whole path, the query before it to one key less, and so on. This is causal
attention aligned at the last key. On CUDA one variable-length kernel call computes it for all edges: the keys and
values of all paths are gathered, and in the backward pass their gradients are added up where they came from. The call
needs no mask and no compilation for its shape, and its cost does not depend on the depth of the trie. A trie has less
than twice as many edges as rows, so the gathered keys take at most twice the memory of the padded batch's.

Queries, keys, values and outputs are (tokens, heads, dim) here, logsumexps ("log-sums") float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from arpo_trl.rollout.engines.compute_dtype import rounded_as

Edge = tuple[int, int, int]
"""(start, stop, end): tokens [start, stop) of the pack; the rows that contain them reach up to `end`."""

FLASH_CAPABILITY = (8, 0)
"""The lowest compute capability that torch's flash kernel supports: Ampere."""
FLASH_HEAD_DIM = 256
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of packed and padded attention, forward and backward, that is accepted as rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """What the tokens of a pack attend to: each edge is one sequence of a variable-length call.

    `keys` (K,) has the positions in the pack of the tokens of all edges' paths, one after another. `copies` (K,) has
    the places in `keys` of the pack's first token, then those of its second token and so on; those of token i start at
    `copy_starts[i]`, (N,). `query_starts` and `key_starts` (edges + 1,), int32, are the boundaries of the edges in the
    pack and of the paths in `keys`. The tensors are on the pack's device.

        # a a b c: the rows a a b and a a c
        plan_paths(((0, 2, 4), (2, 3, 3), (3, 4, 4)), device)
        # keys 0 1 | 0 1 2 | 0 1 3, query_starts 0 2 3 4, key_starts 0 2 5 8, longest_query 2, longest_key 3
        # copies 0 2 5 | 1 3 6 | 4 | 7, copy_starts 0 3 6 7
    """

    edges: tuple[Edge, ...]
    keys: torch.Tensor
    copies: torch.Tensor
    copy_starts: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int


def plan_paths(edges: tuple[Edge, ...], device: torch.device) -> Paths:
    """The paths of a pack's edges."""
    above: list[Edge] = []
    keys: list[np.ndarray] = []
    for edge in edges:
        while above and above[-1][2] <= edge[0]:
            above.pop()
        above.append(edge)
        keys.append(np.concatenate([np.arange(start, stop) for start, stop, _ in above]))
    query_counts, key_counts = [stop - start for start, stop, _ in edges], [len(path) for path in keys]
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        for counts in (query_counts, key_counts)
    )
    all_keys = np.concatenate(keys)
    copy_counts = np.bincount(all_keys)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Paths(
        edges=edges,
        keys=tensor(all_keys),
        copies=tensor(np.argsort(all_keys, kind="stable")),
        copy_starts=tensor(copy_counts.cumsum() - copy_counts),
        query_starts=query_starts,
        key_starts=key_starts,
        longest_query=max(query_counts),
        longest_key=max(key_counts),
    )


States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, or their gradients."""
Result = tuple[torch.Tensor, ...]
"""Output, log-sums, and other tensors that the kernel's backward needs from its forward."""


class Kernel(Protocol):
    """An attention kernel for packs."""

    grouped: bool
    """Whether keys and values may have fewer heads than queries."""

    def forward(self, states: States, paths: Paths, scaling: float | None) -> Result: ...

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, paths: Paths, scaling: float | None
    ) -> States: ...


class FlashKernel:
    """torch's flash kernel on CUDA, for float16 and bfloat16. It aligns causal attention at the last key."""

    grouped = True

    def forward(self, states: States, paths: Paths, scaling: float | None) -> Result:
        query, key, value = states
        output, logsums, *rest, _ = torch.ops.aten._flash_attention_forward(
            query, *_of_paths(key, value, paths), *self._lengths(paths), 0.0, True, False, scale=scaling
        )
        return output, logsums, *rest

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, paths: Paths, scaling: float | None
    ) -> States:
        (query, key, value), (output, logsums, *rest) = states, result
        lengths = self._lengths(paths)
        query_grad, *grads = torch.ops.aten._flash_attention_backward(
            *(grad, query, *_of_paths(key, value, paths), output, logsums),
            *(*lengths, 0.0, True, *rest),
            scale=scaling,
        )
        return query_grad, *_added_up(grads, paths)

    @staticmethod
    def _lengths(paths: Paths) -> tuple[Any, ...]:
        # If the longest query is 1, torch assumes decoding and swaps grouped heads with queries. The longest lengths
        # are only upper bounds, so 2 is safe.
        return paths.query_starts, paths.key_starts, max(paths.longest_query, 2), paths.longest_key


class EfficientKernel:
    """torch's memory-efficient kernel on CUDA, for float32."""

    grouped = False
    ALIGNED_AT_LAST_KEY = 2
    """The kernel's number for this type of causal attention."""

    def forward(self, states: States, paths: Paths, scaling: float | None) -> Result:
        query, key, value = states
        output, logsums, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            *(of.unsqueeze(0) for of in (query, *_of_paths(key, value, paths))),
            None,
            *(paths.query_starts, paths.key_starts, paths.longest_query, paths.longest_key),
            *(0.0, self.ALIGNED_AT_LAST_KEY, True),
            scale=scaling,
        )
        return output.squeeze(0), logsums, seed, offset

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, paths: Paths, scaling: float | None
    ) -> States:
        (query, key, value), (output, logsums, *rest) = states, result
        query_grad, *grads, _ = torch.ops.aten._efficient_attention_backward(
            *(of.unsqueeze(0) for of in (grad, query, *_of_paths(key, value, paths))),
            None,
            output.unsqueeze(0),
            *(paths.query_starts, paths.key_starts, paths.longest_query, paths.longest_key),
            logsums,
            *(0.0, *rest, self.ALIGNED_AT_LAST_KEY, False),
            scale=scaling,
        )
        return query_grad.squeeze(0), *_added_up([of.squeeze(0) for of in grads], paths)


def _of_paths(key: torch.Tensor, value: torch.Tensor, paths: Paths) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all paths, (K, heads, dim) each. One gather for both, since launches dominate small packs.

    The backward gathers them again: kept for each layer, they would take the memory that packs save.
    """
    key, value = torch.stack((key, value), dim=1).index_select(0, paths.keys).unbind(1)
    return key, value


def _added_up(grads: list[torch.Tensor], paths: Paths) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the pack's keys and values from those of all paths.

    One kernel for each adds them up, in float32 for half precision and always in the same order.
    """
    key_grad, value_grad = (
        embedding_bag(paths.copies, grad.flatten(1), paths.copy_starts, mode="sum").unflatten(1, grad.shape[1:])
        for grad in grads
    )
    return key_grad, value_grad


class CPUKernel:
    """torch's flash kernel on a CPU, which SDPA uses. It accepts one sequence, so it runs once for each edge and once
    for all tokens below an edge, which follow the edge in the pack without a gap.

    The log-sums of the calls weight their outputs. The backward of a call takes the merged output and log-sums, and
    computes this call's part of the gradients, as in ring attention (arXiv 2310.01889).
    """

    grouped = False

    def forward(self, states: States, paths: Paths, scaling: float | None) -> Result:
        query, key, value = states
        kind = torch.promote_types(query.dtype, torch.float32)  # of the log-sums
        total, logsums = (query.new_empty(shape, dtype=kind) for shape in (query.shape, query.shape[1::-1]))
        for queries, keys, causal in _calls(paths.edges):
            part, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_one(query[queries], key[keys], value[keys]), 0.0, causal, scale=scaling
            )
            part, logsum = part[0].transpose(0, 1), logsum[0]
            if not causal:
                before = logsums[:, queries]
                both = torch.logaddexp(before, logsum)
                part = total[queries] * _weights(before, both) + part * _weights(logsum, both)
                logsum = both
            total[queries], logsums[:, queries] = part, logsum
        return total.to(query.dtype), logsums

    def backward(
        self, grad: torch.Tensor, states: States, result: Result, paths: Paths, scaling: float | None
    ) -> States:
        (query, key, value), (output, logsums) = states, result
        sums = tuple(torch.zeros_like(of, dtype=logsums.dtype) for of in states)
        for queries, keys, causal in _calls(paths.edges):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_one(grad[queries], query[queries], key[keys], value[keys], output[queries]),
                *(logsums[None, :, queries], 0.0, causal),
                scale=scaling,
            )
            for total, at, part in zip(sums, (queries, keys, keys), parts, strict=True):
                total[at] += part[0].transpose(0, 1)
        query_grad, key_grad, value_grad = (of.to(query.dtype) for of in sums)
        return query_grad, key_grad, value_grad


def _calls(edges: tuple[Edge, ...]) -> Iterator[tuple[slice, slice, bool]]:
    """Queries, keys, and whether a query sees only the keys up to itself: first each edge, then what is below it."""
    for start, stop, _ in edges:
        yield slice(start, stop), slice(start, stop), True
    for start, stop, end in edges:
        if stop < end:
            yield slice(stop, end), slice(start, stop), False


def attention_calls(edges: tuple[Edge, ...]) -> int:
    """The number of calls of the CPU's kernel for a pack."""
    return sum(1 for _ in _calls(edges))


def _weights(part: torch.Tensor, all_of: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, 1) weights of some keys relative to all keys, from the log-sums of both."""
    return (part - all_of).exp().t().unsqueeze(-1)


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
        paths: Paths,
        kernel: Kernel,
        scaling: float | None,
    ) -> torch.Tensor:
        result = kernel.forward((query, key, value), paths, scaling)
        ctx.save_for_backward(query, key, value, *result)
        ctx.paths, ctx.kernel, ctx.scaling = paths, kernel, scaling
        return result[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *result = ctx.saved_tensors
        states = (query, key, value)
        return (*ctx.kernel.backward(grads[0], states, tuple(result), ctx.paths, ctx.scaling), None, None, None)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: Paths, *, scaling: float | None
) -> torch.Tensor:
    """(1, N, heads, dim) attention of every query over its own path.

    Args:
        query: (1, heads, N, dim).
        key, value: The same shape, or with fewer heads.
        paths: The pack's paths, from `plan_paths`.
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
    states = (of.squeeze(0).transpose(0, 1) for of in (query, key, value))  # the backward of `of[0]` copies
    attended = _Attend.apply(*states, paths, kernel, scaling)
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
    limit = TOLERANCE[rounded_as(dtype, device)]
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
                attended = attend(query, key, value, plan_paths(edges, device), scaling=None)[0][places]
            else:
                q, k, v = (of[0][:, places].transpose(0, 1) for of in (query, key, value))  # (3, heads, 80, dim)
                attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            (attended * weights).sum().backward()
        found.append([attended.detach() * weights, query.grad, key.grad, value.grad])
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))

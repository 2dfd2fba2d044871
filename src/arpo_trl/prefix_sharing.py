"""Logprobs of rows that share prefixes, each shared token computed once.

The rows of a micro-batch (prompt and completion) often start alike: leaves of one tree by construction, siblings of a
well-trained policy by habit. Where two rows hold the same tokens up to some position, a causal model computes the same
thing up to there. So the rows are laid out as a trie, one after another without what an earlier row already holds:

    # rows:    p p a a t b b          pack:      p p a a t b b t c p d d d
    #          p p a a t c            position:  0 1 2 3 4 5 6 4 5 1 2 3 4
    #          p p d d d

The last token before rows part is repeated (`t`, `p`), so that each position of the pack has one next token at most
and the language-model head runs once per edge of the trie. The rows that go through an edge follow it in the pack
without a gap, and attend to all of it. Rows that are equal cost nothing; padding is gone.

Logprobs and entropies are read back per row, so gradients of shared tokens add up by themselves: the result is that of
the padded batch up to rounding. Sharing is found from the token ids alone, whatever tree they came from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

logger = logging.getLogger(__name__)


class SharedPrefixForward(StrEnum):
    """Whether the update computes shared tokens once."""

    AUTO = "auto"
    """Where that is exact; where not, the padded batch, with one line in the log that says why."""
    ON = "on"
    """An error at start-up where that is not exact."""
    OFF = "off"
    """TRL's padded batch."""


NO_LABEL = -100
PREFIX = "shared_prefix+"
"""Before the name of a model's own attention implementation: the one that also takes packs."""
EXTENDS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows laid out as a trie of N tokens, and the way back to them.

    `ids`, `positions` and `labels` are (1, N); a label is the next token, −100 where no completion wants it. `sources`
    (B, T) holds for each completion token the pack index of the token before it; it means nothing where `real` (B, T)
    is False, on padding and on tokens that are not wanted. `ends` (N,) says for each token where in the pack the rows
    that hold it end: a query sees the keys up to itself whose end it has not reached. `edges` are the same as (start,
    stop, end) for tokens in a row with the same end, in order. `leaf_tokens` is what the rows hold together, padding
    not counted.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    sources: torch.Tensor
    real: torch.Tensor
    ends: torch.Tensor
    edges: tuple[tuple[int, int, int], ...]
    leaf_tokens: int
    _blocks: list[BlockMask] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return self.ids.size(1)

    def blocks(self) -> BlockMask:
        """What each query sees, block by block, for FlexAttention; made once for all layers."""
        if not self._blocks:
            ends, size = self.ends, len(self)

            def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return (key <= query) & (query < ends[key])

            # Compiled, it never holds all N × N entries.
            self._blocks.append(
                create_block_mask(sees, None, None, size, size, device=str(ends.device), _compile=ends.is_cuda)
            )
        return self._blocks[0]


def pack_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, wanted: torch.Tensor | None = None
) -> Pack:
    """The rows as a pack.

    Args:
        input_ids: (B, P + T), prompts padded on the left and completions on the right.
        attention_mask: (B, P + T), 1 on real tokens.
        logits_to_keep: T, the completion columns, whose logprobs may be wanted.
        wanted: (B, T), nonzero on those that are: tokens that carry loss. None: all that are real.

    Raises:
        ValueError: A row has no token, or padding between its tokens.
    """
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
    width = ids.shape[1]
    starts, lengths = mask.argmax(axis=1), mask.sum(axis=1)
    stops = starts + lengths
    columns = np.arange(width)
    if not lengths.all() or not np.array_equal(mask, (columns >= starts[:, None]) & (columns < stops[:, None])):
        raise ValueError("A row has no token, or padding between its tokens; expected padding at its ends only.")
    rows = [row[start:stop] for row, start, stop in zip(ids, starts, stops, strict=True)]
    # Big-endian bytes of non-negative numbers sort like the numbers.
    order = sorted(range(len(rows)), key=[row.astype(">i8").tobytes() for row in rows].__getitem__)

    index = np.zeros(ids.shape, dtype=np.int64)  # (B, P + T): each row's tokens in the pack, from column 0 on
    added: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    path: list[tuple[int, int]] = []  # slices of the pack that make up the row before
    left: list[tuple[int, int, int]] = []  # slices of the pack, and where the rows that hold them end
    size = 0
    for before, at in zip([None, *order], order, strict=False):
        row = rows[at]
        shared = 0 if before is None else _shared_positions(rows[before], row)
        index[at, :shared] = index[before, :shared] if before is not None else 0
        index[at, shared : len(row)] = np.arange(size, size + len(row) - shared)
        path, gone = _split(path, shared)
        left += [(*part, size) for part in gone]
        if new := len(row) - shared:
            added.append(row[shared:])
            positions.append(np.arange(shared, len(row)))
            path.append((size, size + new))
            size += new

    ends = np.full(size, size, dtype=np.int64)
    for start, stop, end in left:
        ends[start:stop] = end
    starts_of_edges = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist()]
    labels = np.full(size, NO_LABEL, dtype=np.int64)
    sources = np.zeros((len(rows), logits_to_keep), dtype=np.int64)
    real = mask[:, width - logits_to_keep :] & (columns[width - logits_to_keep :] > starts[:, None])
    if wanted is not None:
        real &= wanted.cpu().numpy().astype(bool)
    for at, row in enumerate(rows):
        kept = real[at].nonzero()[0]
        places = kept + width - logits_to_keep - starts[at]  # in the row; its first token has none before it
        sources[at, kept] = index[at, places - 1]
        labels[sources[at, kept]] = row[places]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(input_ids.device)

    return Pack(
        tensor(np.concatenate(added).astype(np.int64))[None],
        tensor(np.concatenate(positions))[None],
        tensor(labels)[None],
        tensor(sources),
        tensor(real),
        tensor(ends),
        tuple((start, stop, int(ends[start])) for start, stop in pairwise([*starts_of_edges, size])),
        int(lengths.sum()),
    )


def _shared_positions(before: np.ndarray, row: np.ndarray) -> int:
    """How many first positions of `row` the row sorted before it already holds, next token included."""
    shorter = min(len(before), len(row))
    differ = before[:shorter] != row[:shorter]
    common = int(differ.argmax()) if differ.any() else shorter
    # Where one row ends in the other its last token has no next one to disagree about.
    return common if common == shorter else max(common - 1, 0)


def _split(path: list[tuple[int, int]], tokens: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The slices that hold the first `tokens` tokens of `path`, and those that hold the others."""
    first, rest = [], []
    for start, stop in path:
        middle = min(max(start + tokens, start), stop)
        if middle > start:
            first.append((start, middle))
        if stop > middle:
            rest.append((middle, stop))
        tokens -= stop - start
    return first, rest


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, *, scaling: float | None
) -> torch.Tensor:
    """(1, heads, N, dim) attention of every query over its own path; keys and values may have fewer heads."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA does; a norm may have left queries and keys in float32
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda:
        return _attend_by_blocks(query, key, value, pack, scaling)
    groups = query.size(1) // key.size(1)
    attended = _AttendByEdges.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), pack.edges, scaling)
    assert isinstance(attended, torch.Tensor)
    return attended


class _AttendByEdges(torch.autograd.Function):
    """Attention on a CPU, edge by edge, without a mask or a copy: those that follow an edge see all of it.

    What a query sees in one edge is weighed against the rest by the logarithms of their sums of exponentials. torch's
    own kernel, which is SDPA's on a CPU, gives these, and its backward, given those of all edges together, finds
    one edge's part of the gradients, as in ring attention (arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        edges: tuple[tuple[int, int, int], ...],
        scaling: float | None,
    ) -> torch.Tensor:
        total = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
        logsums = total.new_full(query.shape[:3], -torch.inf)
        for queries, keys, causal in _seen(edges):
            attended, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scaling
            )
            before = logsums[:, :, queries]
            both = torch.logaddexp(before, logsum)
            total[:, :, queries] *= (before - both).exp().unsqueeze(-1)
            total[:, :, queries] += attended * (logsum - both).exp().unsqueeze(-1)
            logsums[:, :, queries] = both
        result = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, logsums)
        ctx.edges, ctx.scaling = edges, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result, logsums = ctx.saved_tensors
        query_grad = torch.zeros_like(query, dtype=logsums.dtype)  # the sum of a path's edges; keys have two terms
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for queries, keys, causal in _seen(ctx.edges):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads[0][:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                result[:, :, queries],
                logsums[:, :, queries],
                0.0,
                causal,
                scale=ctx.scaling,
            )
            query_grad[:, :, queries] += parts[0]
            key_grad[:, :, keys] += parts[1]
            value_grad[:, :, keys] += parts[2]
        return query_grad.to(query.dtype), key_grad, value_grad, None, None


def _seen(edges: tuple[tuple[int, int, int], ...]) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, whether causal) of each edge with itself and with what follows it."""
    for start, stop, end in edges:
        yield slice(start, stop), slice(start, stop), True
        if stop < end:
            yield slice(stop, end), slice(start, stop), False


def _attend_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scaling: float | None
) -> torch.Tensor:
    attention: Any = _compiled_flex_attention() if query.is_cuda else flex_attention
    attended = attention(query, key, value, block_mask=pack.blocks(), scale=scaling, enable_gqa=True)
    assert isinstance(attended, torch.Tensor)
    return attended


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _blocks_fault(device: torch.device) -> str | None:
    """What is wrong with FlexAttention on this device, forward or backward, against SDPA; tried once."""
    rows = torch.tensor([[7] * 200 + [row] * 100 for row in (1, 2, 3)], device=device)
    pack = pack_rows(rows, torch.ones_like(rows), 100)
    places = torch.arange(len(pack), device=device)
    mask = (places <= places[:, None]) & (places[:, None] < pack.ends)  # (queries, keys): of a small pack
    generator = torch.Generator(device).manual_seed(0)
    states = [
        torch.randn(1, heads, len(pack), 64, device=device, dtype=torch.bfloat16, generator=generator)
        for heads in (4, 2, 2)
    ]
    try:
        with torch.enable_grad():
            found = []
            for by_blocks in (True, False):
                query, key, value = (state.clone().requires_grad_() for state in states)
                if by_blocks:
                    attended = _attend_by_blocks(query, key, value, pack, None)
                else:
                    attended = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
                attended.float().square().sum().backward()
                found.append([attended, query.grad, key.grad, value.grad])
        agree = all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*found, strict=True))
    except Exception as error:  # whatever the compiler, its backend or a driver raises is the answer, and is reported
        return f"FlexAttention does not work on {device} ({type(error).__name__})"
    return None if agree else f"FlexAttention disagrees with SDPA on {device}"


def _extended(attention: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers that also takes packs, as the keyword `shared_prefix_pack`."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        shared_prefix_pack: Pack | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if shared_prefix_pack is None:
            return attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        attended = attend(query, key, value, shared_prefix_pack, scaling=scaling)
        return attended.transpose(1, 2).contiguous(), None

    return forward


def why_not_shared(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why packs would not be exact with this model on this device, or None when they are."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of type {sorted(kinds)}; only full attention sees a path the same way in a pack"
    if getattr(config, "use_sliding_window", False) or (
        getattr(config, "sliding_window", None) is not None and not hasattr(config, "use_sliding_window")
    ):
        return "it attends through a sliding window"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced (transformers' AttentionInterface)"
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return "it routes tokens to experts, whose load would be counted differently"
    attention = model.config._attn_implementation.removeprefix(PREFIX)
    if attention not in EXTENDS:
        return f"its attention implementation is {attention!r}; set attn_implementation to one of {list(EXTENDS)}"
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if any(dropouts) or getattr(config, "attention_dropout", None):
        return "it drops out at random, which shared tokens would do alike for all their rows; set dropout to 0"
    if device.type not in ("cpu", "cuda"):
        return f"packs are attended on CPUs and CUDA devices only, and this is {device.type!r}"
    return _blocks_fault(device) if device.type == "cuda" else None


def share_prefixes(model: PreTrainedModel) -> None:
    """Makes `model` take packs, next to ordinary batches, which it computes as before."""
    attention = model.config._attn_implementation
    if attention.startswith(PREFIX):
        return
    name = PREFIX + attention
    AttentionInterface.register(name, _extended(AttentionInterface()[attention]))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[attention])
    model.set_attn_implementation(name)


def forward_pack(model: torch.nn.Module, pack: Pack) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, T) logprobs of the completion tokens and, if the head gives them, entropies; 0 where not `pack.real`.

    `model` has TRL's fused language-model head, in whatever wrapping, and went through `share_prefixes`.
    """
    outputs = model(
        input_ids=pack.ids,
        attention_mask=torch.ones(1, 1, 1, 1, device=pack.ids.device),  # 4-D: no mask is made, and none is used
        position_ids=pack.positions,
        shift_labels=pack.labels,
        fused_lm_head=True,
        shared_prefix_pack=pack,
    )

    logprobs, entropies = (
        None if values is None else values[0][pack.sources].masked_fill(~pack.real, 0.0)
        for values in (outputs.log_probs, outputs.entropy)
    )
    assert logprobs is not None
    return logprobs, entropies

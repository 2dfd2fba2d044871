"""Logprobs of rows that share prefixes, with each shared token computed once.

The rows of a micro-batch (prompt and completion) often share a prefix. Leaves of one tree always share one, and
separate samples of a well-trained policy often do. A causal model computes the same values for a shared prefix in each
row. So the rows are laid out as a trie, one after another, each without the tokens that an earlier row already
contains:

    # rows:    p p a a t b b          pack:      p p a a t b b t c p d d d
    #          p p a a t c            position:  0 1 2 3 4 5 6 4 5 1 2 3 4
    #          p p d d d

The last token before two rows diverge is repeated (`t`, `p`). So each position of the pack has at most one next token,
and the language-model head runs once per position. The rows below an edge of the trie follow it in the pack without a
gap, and attend to all of it. Duplicate rows cost nothing, and there is no padding.

Logprobs and entropies are read back per row, so autograd sums the gradients of shared tokens. The result equals the
padded batch's result up to rounding. Shared prefixes are found from the token ids alone, independent of the trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.compute_dtype import largest_rounding
from arpo_trl.rollout.engines.visibility import evaluating, trial_ids
from arpo_trl.training.prefix_attention import Edge, Paths, attend, attention_calls, plan_paths, why_no_attention

NO_LABEL = -100
EXTENDS = (
    *("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    # What transformers replaces flash_attention_2 and _3 by if only the package kernels is installed:
    *("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3"),
)
"""The attention implementations that packs can extend."""


class _Takers:
    """The attention modules that received a pack. Not a plain set, since FSDP copies containers among its inputs."""

    def __init__(self) -> None:
        self.ids: set[int] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Rows laid out as a trie of N tokens, and the indices for reading values back per row.

    `ids`, `positions` and `labels` are (1, N). A label is the next token, or −100 if its logprob is not needed.
    `sources` (B, T) contains, for each completion token, the pack index of the token before it. It is undefined where
    `real` (B, T) is False: on padding and on tokens whose logprobs are not needed. `paths` are what the tokens attend
    to. `leaf_tokens` counts the tokens of all rows without padding, `padded_tokens` those of the padded batch.

        # Rows 5 6 7 and 5 6 8, prompt 5, T = 2. The repeated 6 is the last token before they diverge.
        pack_rows(tensor([[5, 6, 7], [5, 6, 8]]), torch.ones(2, 3), 2)
        # ids 5 6 7 6 8, positions 0 1 2 1 2, labels 6 7 −100 8 −100, sources [[0, 1], [0, 3]]
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    sources: torch.Tensor
    real: torch.Tensor
    paths: Paths
    leaf_tokens: int
    padded_tokens: int
    takers: _Takers = field(default_factory=_Takers, repr=False)

    def __len__(self) -> int:
        return self.ids.size(1)


def pack_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    wanted: torch.Tensor | None = None,
    *,
    multiple_of: int = 1,
) -> Pack:
    """The rows as a pack.

    Args:
        input_ids: (B, P + T), prompts padded on the left and completions on the right.
        attention_mask: (B, P + T), 1 on real tokens.
        logits_to_keep: T, the number of completion columns.
        wanted: (B, T), nonzero on the tokens whose logprobs are needed: the tokens in the loss. None: all real tokens.
        multiple_of: The pack's length is padded to a multiple of this, with tokens that no row uses.

    Raises:
        ValueError: A row has no token, or padding between its tokens.
    """
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
    first_column = ids.shape[1] - logits_to_keep
    rows, starts = _rows(ids, mask)
    trie = _trie(rows, multiple_of)
    size = len(trie.ids)
    labels = np.full(size, NO_LABEL, dtype=np.int64)
    sources = np.zeros((len(rows), logits_to_keep), dtype=np.int64)
    real = mask[:, first_column:] & (np.arange(first_column, ids.shape[1]) > starts[:, None])
    if wanted is not None:
        real &= wanted.cpu().numpy().astype(bool)
    for at, row in enumerate(rows):
        kept = real[at].nonzero()[0]
        places = kept + first_column - starts[at]  # position in the row; at least 1, so `places - 1` exists
        sources[at, kept] = trie.places[at][places - 1]
        labels[sources[at, kept]] = row[places]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(input_ids.device)

    return Pack(
        ids=tensor(trie.ids)[None],
        positions=tensor(trie.positions)[None],
        labels=tensor(labels)[None],
        sources=tensor(sources),
        real=tensor(real),
        paths=plan_paths(trie.edges, input_ids.device),
        leaf_tokens=sum(map(len, rows)),
        padded_tokens=ids.size,
    )


def _rows(ids: np.ndarray, mask: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows without padding, and the column at which each of them starts."""
    starts, lengths = mask.argmax(axis=1), mask.sum(axis=1)
    stops = starts + lengths
    columns = np.arange(ids.shape[1])
    if not lengths.all() or not np.array_equal(mask, (columns >= starts[:, None]) & (columns < stops[:, None])):
        raise ValueError("A row has no token, or padding between its tokens; expected padding at its ends only.")
    return [row[start:stop] for row, start, stop in zip(ids, starts, stops, strict=True)], starts


class _Trie(NamedTuple):
    """Rows laid out as a trie of N tokens."""

    ids: np.ndarray
    """(N,)"""
    positions: np.ndarray
    """(N,): each token's position in its rows."""
    places: list[np.ndarray]
    """For each row, the places of its tokens in the trie."""
    edges: tuple[Edge, ...]


def _trie(rows: Sequence[np.ndarray], multiple_of: int) -> _Trie:
    """The rows as a trie, padded to a multiple of `multiple_of` tokens."""
    # Big-endian bytes of non-negative numbers sort like the numbers.
    order = sorted(range(len(rows)), key=[row.astype(">i8").tobytes() for row in rows].__getitem__)
    index = [np.zeros(0, dtype=np.int64)] * len(rows)
    added: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    path: list[tuple[int, int]] = []  # slices of the trie that make up the previous row
    left: list[tuple[int, int, int]] = []  # slices of the trie, and the end of the rows that contain them
    size = 0
    for before, at in zip([None, *order], order, strict=False):
        row = rows[at]
        shared = 0 if before is None else _shared_positions(rows[before], row)
        new = len(row) - shared
        prefix = index[at] if before is None else index[before][:shared]
        index[at] = np.concatenate([prefix, np.arange(size, size + new)])
        path, gone = _split(path, shared)
        left += [(*part, size) for part in gone]
        if new:
            added.append(row[shared:])
            positions.append(np.arange(shared, len(row)))
            path.append((size, size + new))
            size += new

    if fill := -size % multiple_of:  # a separate edge, which attends only to itself
        added.append(np.zeros(fill, dtype=np.int64))
        positions.append(np.arange(fill))
        left += [(*part, size) for part in path]
        size += fill

    ends = np.full(size, size, dtype=np.int64)
    for start, stop, end in left:
        ends[start:stop] = end
    starts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist()]
    edges = tuple((start, stop, int(ends[start])) for start, stop in pairwise([*starts, size]))
    return _Trie(np.concatenate(added).astype(np.int64), np.concatenate(positions), index, edges)


def _shared_positions(before: np.ndarray, row: np.ndarray) -> int:
    """The number of leading positions that `row` shares with the row sorted before it, including their next tokens."""
    shorter = min(len(before), len(row))
    differ = before[:shorter] != row[:shorter]
    common = int(differ.argmax()) if differ.any() else shorter
    # If one row is a prefix of the other, its last token has no next token that could differ.
    return common if common == shorter else max(common - 1, 0)


def _split(path: list[tuple[int, int]], tokens: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The slices with the first `tokens` tokens of `path`, and the slices with the other tokens."""
    first, rest = [], []
    for start, stop in path:
        middle = min(max(start + tokens, start), stop)
        if middle > start:
            first.append((start, middle))
        if stop > middle:
            rest.append((middle, stop))
        tokens -= stop - start
    return first, rest


_accept_packs: set[Callable[..., Any]] = set()
"""The functions that `_extended` has returned."""


def _extended(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Extends an attention function of transformers: it also accepts a pack, as the keyword `shared_prefix_pack`.

    Other calls are passed on as they are.
    """

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        shared_prefix_pack: Pack | None = None,
        **kwargs: Any,
    ) -> Any:
        if shared_prefix_pack is None:
            return attention(module, query, key, value, *args, **kwargs)
        shared_prefix_pack.takers.ids.add(id(module))
        return attend(query, key, value, shared_prefix_pack.paths, scaling=kwargs.get("scaling")), None

    _accept_packs.add(forward)
    return forward


DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")
"""Names of configuration fields whose dropout a model can apply without a module."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of configuration fields for the number of experts."""


def why_not_shared(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why packs are not exact with this model on this device; None if they are exact.

    `dtype` is the dtype of the attention: autocast's, or by default the weights'.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of type {sorted(kinds)}; only full attention gives the same results in a pack"
    if getattr(config, "use_sliding_window", False) or (
        getattr(config, "sliding_window", None) is not None and not hasattr(config, "use_sliding_window")
    ):
        return "it uses sliding-window attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention logits, which no kernel for packs supports"
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not support replacing its attention (transformers' AttentionInterface)"
    if any(getattr(config, name, None) for name in EXPERTS):
        return "it routes tokens to experts, whose load would be counted differently"
    if getattr(config, "v_head_dim", None) or getattr(config, "kv_lora_rank", None):
        return "its values and keys have different widths (multi-head latent attention)"
    attention = model.config._attn_implementation
    if attention not in EXTENDS:
        return f"its attention implementation is {attention!r}; set attn_implementation to one of {list(EXTENDS)}"
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if any(dropouts) or any(getattr(config, name, None) for name in DROPOUTS):
        return "it uses dropout, and all rows would share the dropout of a shared token; set dropout to 0"
    heads = config.num_attention_heads
    return why_no_attention(
        device,
        dtype or model.dtype,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The speed of a device type, which `pays` uses. If uncertain, the values favour the padded batch.

    Seconds are those of a layer, forward and backward together. `operations`: operations per second. `launches_s`: the
    time of launching a layer's kernels, which every batch takes at least. `call_s`: the time of one more call of the
    CPU's attention kernel.
    """

    operations: float
    launches_s: float
    call_s: float


COSTS = {
    "cuda": Costs(operations=2e14, launches_s=6e-3, call_s=0.0),  # docs/results.md, "On a GPU"
    "cpu": Costs(operations=1e11, launches_s=0.0, call_s=1e-4),
}
LAYER_OPERATIONS = 72
"""A layer has about 12 · hidden² weights, each used in two operations forward and four backward per token."""


def pays(pack: Pack, hidden_size: int) -> bool:
    """Whether a layer takes less time for the pack than for the padded batch.

    Depends only on the pack's shape and not on measured times, so that a repeated run makes the same decision.
    """
    costs = COSTS[pack.ids.device.type]
    token_s = LAYER_OPERATIONS * hidden_size**2 / costs.operations
    attention_s = attention_calls(pack.paths.edges) * costs.call_s
    return max(len(pack) * token_s, costs.launches_s) + attention_s < pack.padded_tokens * token_s


def share_prefixes(model: PreTrainedModel) -> None:
    """Makes `model` accept packs. It computes ordinary batches as before.

    So do all models of the process with its attention implementation, whose function is replaced by an extended one.
    The name stays: masks depend on it, and flash attention loads its kernels by it.
    """
    name = model.config._attn_implementation
    attention = AttentionInterface()[name]
    if attention not in _accept_packs:
        AttentionInterface.register(name, _extended(attention))


def forward_pack(model: torch.nn.Module, pack: Pack) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, T) logprobs of the completion tokens and, if the head returns them, entropies; 0 where `pack.real` is False.

    `model` has TRL's fused language-model head, was prepared by `share_prefixes`, and may be wrapped.

    Raises:
        ConfigError: Some layers did not receive the pack, so their tokens attended to other paths.
    """
    outputs = model(
        input_ids=pack.ids,
        attention_mask=torch.ones(1, 1, 1, 1, device=pack.ids.device),  # 4-D: transformers builds no mask from it
        position_ids=pack.positions,
        shift_labels=pack.labels,
        fused_lm_head=True,
        shared_prefix_pack=pack,
    )
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    layers = inner.config.get_text_config().num_hidden_layers
    if len(pack.takers.ids) != layers:
        raise ConfigError(
            f"The model passes packs to the attention of only {len(pack.takers.ids)} of its {layers} layers, so it "
            "cannot compute shared prefixes once. Set shared_prefix_forward: off."
        )
    logprobs, entropies = (
        None if values is None else values[0][pack.sources].masked_fill(~pack.real, 0.0)
        for values in (outputs.log_probs, outputs.entropy)
    )
    assert logprobs is not None
    return logprobs, entropies


def pack_batches(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    wanted: torch.Tensor,
    *,
    size: int,
    multiple_of: int = 1,
    must_pay_at: int | None = None,
) -> list[Pack]:
    """One pack per `size` rows, in order; an empty list if padded batches are faster.

    The number of packs equals the number of TRL's padded forwards, so that all ranks run equally many.

    Args:
        must_pay_at: The model's hidden size. The list is empty if a pack does not save time (`pays`). None: packs are
            returned in any case.

    `pack_rows` documents the other arguments.
    """
    batches = zip(*(torch.split(rows, size) for rows in (input_ids, attention_mask, wanted)), strict=True)
    packs = [pack_rows(ids, mask, logits_to_keep, loss, multiple_of=multiple_of) for ids, mask, loss in batches]
    return [] if must_pay_at is not None and not all(pays(pack, must_pay_at) for pack in packs) else packs


def forward_packs(model: torch.nn.Module, packs: Sequence[Pack]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, T) logprobs and, if the head returns them, entropies of all packs' rows, from `forward_pack`."""
    values = [forward_pack(model, pack) for pack in packs]
    entropies = [entropies for _, entropies in values if entropies is not None]
    return torch.cat([logprobs for logprobs, _ in values]), torch.cat(entropies) if entropies else None


def sharing_ratio(packs: Sequence[Pack]) -> float:
    """The number of tokens in the rows per computed token."""
    return sum(pack.leaf_tokens for pack in packs) / sum(map(len, packs))


def rounding(model: PreTrainedModel, found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The root mean square difference of two tensors of logprobs, in standard deviations, and the largest one that is
    accepted as rounding."""
    difference = float((found - expected).square().mean().sqrt() / expected.std().clamp(min=1e-9))
    return difference, largest_rounding(model, found.device)


@torch.no_grad()
def why_packs_differ(model: PreTrainedModel) -> str | None:
    """A description of how packed and padded logprobs of a few rows differ beyond rounding; None if they do not.

    `model` is as in `forward_pack`, with all weights on this rank. Call it under the autocast of training.
    """
    drawn = trial_ids(model, 40)  # for three rows with a shared prefix
    rows = torch.stack([torch.cat([drawn[:20], drawn[start : start + 8]]) for start in (20, 24, 32)])
    labels, keep = rows.clone(), 16
    labels[:, :-keep] = NO_LABEL
    try:
        with evaluating(model):
            padded = model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=labels, fused_lm_head=True)
            packed, _ = forward_pack(model, pack_rows(rows, torch.ones_like(rows), keep))
    except Exception as fault:  # an error of the model's own code is the reason to report
        return f"a forward over a pack failed: {type(fault).__name__}: {fault}"
    difference, limit = rounding(model, packed.float(), padded.log_probs[:, -keep:].float())
    if difference <= limit:
        return None
    return f"logprobs of packed and padded rows differ by {difference:.2g} standard deviations, more than {limit}"

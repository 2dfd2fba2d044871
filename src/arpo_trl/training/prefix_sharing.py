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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.compute_dtype import computed_in
from arpo_trl.training.prefix_attention import Call, Edge, attend, plan_calls, why_no_attention

NO_LABEL = -100
PREFIX = "shared_prefix+"
"""Before the name of a model's own attention implementation: the one that also takes packs."""
EXTENDS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class _Takers:
    """The attention modules that were given a pack: no container, since FSDP copies those that it passes on."""

    def __init__(self) -> None:
        self.ids: set[int] = set()


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows laid out as a trie of N tokens, and the way back to them.

    `ids`, `positions` and `labels` are (1, N); a label is the next token, −100 where no completion wants it. `sources`
    (B, T) holds for each completion token the pack index of the token before it; it means nothing where `real` (B, T)
    is False, on padding and on tokens that are not wanted. `edges` are the trie's, in the order of the pack, and
    `calls` what they ask of an attention kernel. `leaf_tokens` is what the rows hold together, padding not counted,
    `padded_tokens` what the batch they came in holds.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    sources: torch.Tensor
    real: torch.Tensor
    edges: tuple[Edge, ...]
    calls: tuple[Call, ...]
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
        logits_to_keep: T, the completion columns, whose logprobs may be wanted.
        wanted: (B, T), nonzero on those that are: tokens that carry loss. None: all that are real.
        multiple_of: What to fill the pack up to a multiple of, with tokens that nobody reads.

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

    if fill := -size % multiple_of:  # an edge of its own, which sees nothing else
        added.append(np.zeros(fill, dtype=np.int64))
        positions.append(np.arange(fill))
        left += [(*part, size) for part in path]
        size += fill

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

    edges = tuple((start, stop, int(ends[start])) for start, stop in pairwise([*starts_of_edges, size]))
    return Pack(
        tensor(np.concatenate(added).astype(np.int64))[None],
        tensor(np.concatenate(positions))[None],
        tensor(labels)[None],
        tensor(sources),
        tensor(real),
        edges,
        plan_calls(edges, input_ids.device),
        int(lengths.sum()),
        ids.size,
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
        shared_prefix_pack.takers.ids.add(id(module))
        return attend(query, key, value, shared_prefix_pack.calls, scaling=scaling), None

    return forward


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts that a router chooses from."""


def why_not_shared(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why packs would not be exact with this model on this device, or None when they are.

    `dtype` is that of its attention: autocast's, or by default the weights'.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of type {sorted(kinds)}; only full attention sees a path the same way in a pack"
    if getattr(config, "use_sliding_window", False) or (
        getattr(config, "sliding_window", None) is not None and not hasattr(config, "use_sliding_window")
    ):
        return "it attends through a sliding window"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention's logits, which no kernel for packs does"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced (transformers' AttentionInterface)"
    if any(getattr(config, name, None) for name in EXPERTS):
        return "it routes tokens to experts, whose load would be counted differently"
    if getattr(config, "v_head_dim", None) or getattr(config, "kv_lora_rank", None):
        return "its values have another width than its keys (multi-head latent attention)"
    attention = model.config._attn_implementation.removeprefix(PREFIX)
    if attention not in EXTENDS:
        return f"its attention implementation is {attention!r}; set attn_implementation to one of {list(EXTENDS)}"
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if any(dropouts) or getattr(config, "attention_dropout", None):
        return "it drops out at random, which shared tokens would do alike for all their rows; set dropout to 0"
    heads = config.num_attention_heads
    return why_no_attention(
        device,
        dtype or model.dtype,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Most difference of packed and padded logprobs, root mean square in their own standard deviations, by type."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What decides on a kind of device whether a pack pays, for the padded batch where unsure.

    `operations` a second that a large matrix product reaches. `call_s` and `sequence_s`, what one more call of the
    attention takes, and one more sequence in a call, forward and backward.
    """

    operations: float
    call_s: float
    sequence_s: float


COSTS = {
    "cuda": Costs(4e14, 3e-4, 0.0),  # some 30 launches a call, with gathering and merging
    "cpu": Costs(1e11, 0.0, 1e-4),  # where a call takes its sequences one by one
}
LAYER_OPERATIONS = 72
"""A layer has about 12 · hidden² weights, each used in two operations forward and four backward for every token."""


def pays(pack: Pack, hidden_size: int) -> bool:
    """Whether a layer's work on the tokens that the pack saves takes longer than what its attention adds.

    A rule on the shape alone, not a stopwatch: the same run takes the same way each time.
    """
    costs = COSTS[pack.ids.device.type]
    saved_s = (pack.padded_tokens - len(pack)) * LAYER_OPERATIONS * hidden_size**2 / costs.operations
    sequences = sum(len(call.spans) for call in pack.calls)
    return saved_s > len(pack.calls) * costs.call_s + sequences * costs.sequence_s


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

    Raises:
        ConfigError: Not all of its layers were given the pack, so that tokens saw other paths.
    """
    outputs = model(
        input_ids=pack.ids,
        attention_mask=torch.ones(1, 1, 1, 1, device=pack.ids.device),  # 4-D: no mask is made, and none is used
        position_ids=pack.positions,
        shift_labels=pack.labels,
        fused_lm_head=True,
        shared_prefix_pack=pack,
    )
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    layers = inner.config.get_text_config().num_hidden_layers
    if len(pack.takers.ids) != layers:
        raise ConfigError(
            f"The model hands packs on to the attention of {len(pack.takers.ids)} of its {layers} layers only, so "
            "shared prefixes cannot be computed once. Set shared_prefix_forward: off."
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
) -> list[Pack]:
    """A pack for each `size` rows, in order; the arguments are those of `pack_rows`.

    There are as many packs as TRL would take padded forwards, so that ranks agree on their number whatever their rows
    share.
    """
    batches = zip(*(torch.split(rows, size) for rows in (input_ids, attention_mask, wanted)), strict=True)
    return [pack_rows(ids, mask, logits_to_keep, loss, multiple_of=multiple_of) for ids, mask, loss in batches]


def forward_packs(model: torch.nn.Module, packs: Sequence[Pack]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, T) logprobs and, if the head gives them, entropies of the rows of all packs: `forward_pack` of each."""
    values = [forward_pack(model, pack) for pack in packs]
    entropies = [entropies for _, entropies in values if entropies is not None]
    return torch.cat([logprobs for logprobs, _ in values]), torch.cat(entropies) if entropies else None


def sharing_ratio(packs: Sequence[Pack]) -> float:
    """How many tokens the rows hold for each token that is computed."""
    return sum(pack.leaf_tokens for pack in packs) / sum(map(len, packs))


@torch.no_grad()
def why_packs_differ(model: PreTrainedModel) -> str | None:
    """Why logprobs of a few rows differ packed and padded, beyond rounding; None where they do not.

    `model` is as for `forward_pack`, with its weights in place, under the autocast that it trains with.
    """
    device = model.get_input_embeddings().weight.device
    # Three rows that start alike, of ids all over the vocabulary: equal tokens would hide what attention does.
    drawn = torch.arange(1, 41, device=device) * 7919 % model.config.get_text_config().vocab_size
    rows = torch.stack([torch.cat([drawn[:20], drawn[start : start + 8]]) for start in (20, 24, 32)])
    labels, keep = rows.clone(), 16
    labels[:, :-keep] = NO_LABEL
    training = model.training
    model.eval()
    try:
        padded = model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=labels, fused_lm_head=True)
        packed, _ = forward_pack(model, pack_rows(rows, torch.ones_like(rows), keep))
    except Exception as fault:  # whatever the model's own code raises at a pack is the answer, and is told in full
        return f"a forward over a pack failed: {type(fault).__name__}: {fault}"
    finally:
        model.train(training)
    expected = padded.log_probs[:, -keep:].float()
    difference = float((packed.float() - expected).square().mean().sqrt() / expected.std().clamp(min=1e-9))
    limit = max(ROUNDING.get(dtype, max(ROUNDING.values())) for dtype in computed_in(model, device))
    if difference <= limit:
        return None
    return f"a pack's logprobs are {difference:.2g} standard deviations off those of padded rows; {limit} is rounding"

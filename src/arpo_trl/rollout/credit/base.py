"""The interface of a credit, and the layout of a batch's tokens.

Credits that compare branches read a tree as segments. A segment starts at a turn at the root or under an observation
that branches. It ends before the next such turn. All its nodes have the same leaves.

The layout of two leaves that share their first turn `a` and its tool result `t`:

    # ids:   a a t t b b      token_nodes: 1 1 2 2 3 3
    # ids:   a a t t c        token_nodes: 1 1 2 2 4 -1

`token_nodes` (B, T) has for each completion token the number of its node, unique in the batch, and −1 for padding.
Pure: imports only torch and the tree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.tree import Leaf, NodeKind, RolloutTree


class Credit(ABC):
    """Turns the advantages of leaves into advantages and weights of tokens.

    @register_credit("winners_only")
    class WinnersOnly(Credit):
        def __call__(self, trees, rewards, advantages):
            return advantages.clamp(min=0), None  # the rows of all leaves, tree by tree
    """

    name: ClassVar[str] = "unregistered"
    """The credit's name in the settings; `register_credit` sets it."""
    weighs: ClassVar[bool] = False
    """Whether the credit may return weights. If so, the trainer counts each batch's tokens again over all ranks."""
    reads_logprobs: bool = False
    """Whether the credit reads the sampling logprobs of turns, so that the engine must return them."""
    reads_entropies: bool = False
    """Whether the trainer sets `entropy_scores` before each call in training. This costs a forward pass."""
    entropy_scores: torch.Tensor | None = None
    """(B, T) of the next call: z-scores of the policy's entropies over the batch's trained tokens on all ranks. 0 on
    tokens that are not trained. None in evaluation."""
    reads_answers: bool = False
    """Whether the trainer sets `answer_probabilities` before each call in training. This costs a forward pass. The
    credit then has a `template`: the text with which the model would give the answer, with the placeholder
    {answer}."""
    template: str = ""
    trained: torch.Tensor | None = None
    """(B,) bool of the next call: the leaves in the loss. `mask_truncated_completions` excludes truncated ones. None:
    all."""
    answer_probabilities: Sequence[Mapping[int, float]] = ()
    """For each tree of the next call: the probability of the row's reference answer after the root and after each
    observation, by node: exp of the mean logprob of the answer's tokens. Empty in evaluation."""

    gathered: Callable[[list[float]], list[float]] = staticmethod(lambda values: values)
    """Returns the values of all ranks. A collective: a credit that calls it does so once per call, on every rank. The
    trainer sets it."""

    @abstractmethod
    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return advantages (B, T) and weights (B, T) for the tokens of B leaves; T is the length of the longest leaf.

        A token's loss is multiplied by its weight. Where the loss averages over tokens, the token counts as that many.
        None means 1 for all tokens. Values on padding are ignored. If each token has its leaf's advantage, return
        advantages (B,): the batch then keeps TRL's layout.

        Args:
            trees: Trees with B leaves in total. The rows are the `tree.leaves()` of all trees, tree by tree.
            rewards: (B,), weighted and summed over the reward functions; NaN if none applied to a leaf.
            advantages: (B,), as GRPO computes them, or with the chosen `advantage_baseline`.
        """

    def compared(self, rewards: torch.Tensor) -> torch.Tensor:
        """(B,) bool: the leaves that can be compared with others: they are in the loss, and have a reward."""
        known = ~rewards.isnan()
        return known if self.trained is None else known & self.trained.to(known.device)


def attribute(
    credit: Credit, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `credit` and pad its (B, T) results with zeros to (B, `width`). Advantages (B,) stay as they are.

    Raises:
        ConfigError: A result does not have the documented type or shape, or is not finite on a token.
    """
    returned = credit(trees, rewards.clone(), advantages.clone())  # a credit may change its arguments
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ConfigError(
            f"The credit {credit.name!r} returned {type(returned).__name__}; expected a tuple of advantages, and "
            "weights or None."
        )
    made, weights = returned
    made = _padded(made, trees, advantages, width, f"The credit {credit.name!r} returned advantages", flat=True)
    if weights is not None:
        weights = _padded(weights, trees, advantages, width, f"The credit {credit.name!r} returned weights")
        if not credit.weighs:
            raise ConfigError(
                f"The credit {credit.name!r} returned weights, but `weighs` of its class is False, so the loss would "
                "count its tokens wrongly. Set `weighs = True`."
            )
    return made, weights


def _padded(
    values: torch.Tensor,
    trees: Sequence[RolloutTree],
    advantages: torch.Tensor,
    width: int,
    subject: str,
    *,
    flat: bool = False,
) -> torch.Tensor:
    """`flat`: whether the shape (B,) is accepted, too."""
    lengths = [len(leaf.ids) for tree in trees for leaf in tree.leaves()]
    expected = len(lengths), max(lengths)
    if not isinstance(values, torch.Tensor):
        raise ConfigError(f"{subject} of type {type(values).__name__}; expected a tensor of shape {expected}.")
    if values.shape != expected and not (flat and values.shape == expected[:1]):
        raise ConfigError(
            f"{subject} of shape {tuple(values.shape)}; expected (leaves, tokens of the longest leaf) = {expected}. "
            "Return tensors of the shape of `token_nodes(trees)`."
        )
    if values.is_complex() or values.layout != torch.strided:
        raise ConfigError(f"{subject} of {values.dtype} and {values.layout}; expected a dense tensor of real numbers.")
    values = values.detach()
    each = values if values.dim() == 2 else values.unsqueeze(1)
    is_token = torch.arange(each.size(1), device=each.device) < torch.tensor(lengths, device=each.device).unsqueeze(1)
    wrong = ~(each.double().abs() <= LARGEST) & is_token & advantages.isfinite().to(each.device).unsqueeze(1)
    if wrong.any():
        row = int(wrong.any(dim=1).nonzero()[0])
        raise ConfigError(
            f"{subject} that are not finite or exceed {LARGEST:.0e}, such as {float(each[row][wrong[row]][0])} for "
            f"leaf {row} of {len(lengths)}. An update with them would destroy the model."
        )
    return values if values.dim() == 1 else torch.nn.functional.pad(values, (0, width - values.size(1)))


def shares_nodes(trees: Sequence[RolloutTree]) -> bool:
    """Whether several leaves share a token after the prompt."""
    return any(len(node.children) > 1 for tree in trees for node in tree.observations())


def token_nodes(trees: Sequence[RolloutTree]) -> torch.Tensor:
    """(B, T) int64: the node of each completion token, −1 for padding.

    Node indices are unique only within a tree, so those of a later tree are offset by the sizes of the earlier ones.
    """
    rows, offset = [], 0
    for tree in trees:
        rows += [torch.tensor(leaf.token_nodes) + offset for leaf in tree.leaves()]
        offset += len(tree.nodes)
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def counted_nodes(token_nodes: torch.Tensor, trained: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool: the tokens that are not padding, of the leaves in the loss (`Credit.trained`). And for each of them
    the number of its node, from 0 without gaps."""
    real = token_nodes >= 0
    if trained is not None:
        real &= trained.to(real.device).unsqueeze(1)
    return real, torch.unique(token_nodes[real], return_inverse=True)[1]


def mean_over_leaves(
    advantages: torch.Tensor, token_nodes: torch.Tensor, trained: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, T) advantages: each token has the mean over the leaves that share it; 0 on padding.

    Args:
        advantages: (B,), or (B, T).
        trained: `Credit.trained`. The other leaves do not count, and get 0.
    """
    real, node = counted_nodes(token_nodes, trained)
    per_token = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)).expand_as(token_nodes)[real]
    # A shared token is in the same column of each of its leaves.
    column = torch.arange(token_nodes.size(1), device=token_nodes.device).expand_as(token_nodes)[real]
    token = torch.unique(node * token_nodes.size(1) + column, return_inverse=True)[1]
    count = torch.bincount(token)
    total = torch.zeros(len(count), dtype=per_token.dtype, device=per_token.device).index_add_(0, token, per_token)
    result = torch.zeros_like(token_nodes, dtype=advantages.dtype)
    result[real] = (total / count)[token]
    return result


class Segments:
    """One tree cut into segments. A segment is named by the index of its first turn.

    Segments(tree, first_row=8).rows[1]      # the batch's rows of the leaves below turn 1

    Args:
        compared: For each row of the batch, whether it counts; None: all rows do.
    """

    def __init__(self, tree: RolloutTree, first_row: int, compared: Sequence[bool] | None = None):
        self.tree = tree
        self.first_row = first_row
        self.compared = compared
        self.rows: dict[int, list[int]] = defaultdict(list)
        """Segment → the rows of its leaves that count, in order."""
        self.of: dict[int, int] = {}
        """Node → the segment that contains it."""
        self.paths: list[list[int]] = []
        """For each leaf, the segments from the root down to it."""
        for row, leaf in enumerate(tree.leaves(), first_row):
            path: list[int] = []
            for node in leaf.nodes:
                if node.kind is NodeKind.TURN and (node.parent == 0 or self.siblings(node.index)):
                    path.append(node.index)
                    self.rows[node.index] += [row] if self.counts(row) else []
                self.of[node.index] = path[-1]
            self.paths.append(path)

    def counts(self, row: int) -> bool:
        return self.compared is None or self.compared[row]

    def siblings(self, segment: int) -> list[int]:
        """The other segments under the observation above `segment`; none at the root, where the group's baseline
        compares them."""
        fork = self.fork(segment)
        return [child for child in self.tree.nodes[fork].children if child != segment] if fork else []

    def forks(self) -> dict[int, list[int]]:
        """Observation that branches → the rows of the leaves below it that count."""
        found: dict[int, list[int]] = defaultdict(list)
        for segment, rows in self.rows.items():
            if self.siblings(segment):
                found[self.fork(segment)] += rows
        return found

    def fork(self, segment: int) -> int:
        """The observation that `segment` starts under; node 0 at the root."""
        return self.tree.nodes[segment].parent or 0

    def below(self, segment: int) -> list[int]:
        """The segments directly under `segment`; none if it ends in a leaf."""
        return [other for other in self.rows if self.above(other) == segment]

    def above(self, segment: int) -> int | None:
        """The segment above `segment`; None at the root."""
        fork = self.fork(segment)
        return self.of[fork] if fork else None


def cut_into_segments(trees: Sequence[RolloutTree], compared: torch.Tensor | None = None) -> list[Segments]:
    """The segments of each tree, with the rows of its leaves in the batch. `compared` (B,): `Credit.compared`."""
    counting = None if compared is None else compared.tolist()
    made: list[Segments] = []
    first_row = 0
    for tree in trees:
        made.append(Segments(tree, first_row, counting))
        first_row += len(made[-1].paths)
    return made


def by_segment(
    cut: Sequence[Segments], advantages: torch.Tensor, value: Callable[[Segments, int, int], float]
) -> torch.Tensor:
    """(B, T): each token has `value(segments of its tree, its segment, its row)`; 0 on padding and in rows that do not
    count."""
    rows: list[torch.Tensor] = []
    for segments in cut:
        for row, leaf in enumerate(segments.tree.leaves(), segments.first_row):
            counts = segments.counts(row)
            values = [value(segments, segments.of[node.index], row) if counts else 0.0 for node in leaf.nodes]
            rows.append(_per_token(leaf, values, advantages.dtype))
    return pad_sequence(rows, batch_first=True).to(advantages.device)


def by_leaf(
    trees: Sequence[RolloutTree], advantages: torch.Tensor, of_turns: Sequence[Sequence[float]]
) -> torch.Tensor:
    """(B, T): each token of a leaf's turn has the turn's value in `of_turns`; 0 elsewhere."""
    rows: list[torch.Tensor] = []
    for tree in trees:
        for leaf in tree.leaves():
            turns = iter(of_turns[len(rows)])
            values = [next(turns) if node.kind is NodeKind.TURN else 0.0 for node in leaf.nodes]
            rows.append(_per_token(leaf, values, advantages.dtype))
    return pad_sequence(rows, batch_first=True).to(advantages.device)


def _per_token(leaf: Leaf, of_nodes: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """(T,): each token of the leaf has its node's value."""
    lengths = torch.tensor([len(node.ids) for node in leaf.nodes])
    return torch.tensor(of_nodes, dtype=dtype).repeat_interleave(lengths)


LARGEST = 1e18
"""The largest reward, advantage or weight. TRL computes with float32: the squares of larger ones overflow, and so does
the standard deviation of a group."""
ROUNDING = 1e-6
"""The relative difference of rewards, sums of a few float32 numbers, that counts as rounding."""


def are_close(values: Sequence[float]) -> bool:
    """Whether values, at least one, are equal up to rounding."""
    return math.isclose(max(values), min(values), rel_tol=ROUNDING, abs_tol=1e-8)


def z_scores(values: Sequence[float], among: Sequence[float] | None = None) -> list[float]:
    """Distances to the mean in sample standard deviations; 0 if there is no deviation beyond rounding. NaN is skipped
    and gets 0.

    Args:
        among: The values that determine mean and deviation. None: `values`.
    """
    known = [value for value in (values if among is None else among) if not math.isnan(value)]
    if len(known) < 2 or are_close(known):
        return [0.0] * len(values)
    middle = fmean(known)
    deviation = math.sqrt(math.fsum((value - middle) ** 2 for value in known) / (len(known) - 1))
    return [0.0 if math.isnan(value) else (value - middle) / deviation for value in values]

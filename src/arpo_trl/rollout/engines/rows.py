"""The state of the live turns of a transformers model, one row each."""

from __future__ import annotations

import numpy as np
import torch

from arpo_trl.rollout.engines.base import TurnRequest


class RowState:
    """Tensors with one row per live turn: sampled tokens, positions, limits and random numbers."""

    def __init__(self, device: torch.device):
        self.device = device
        self.next_id = torch.zeros(0, dtype=torch.long, device=device)
        self.position = torch.zeros(0, dtype=torch.long, device=device)
        self.written = torch.zeros(0, dtype=torch.long, device=device)
        self.limit = torch.zeros(0, dtype=torch.long, device=device)
        self.probe = torch.zeros(0, dtype=torch.long, device=device)
        self.ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self.entropies = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self.uniforms = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self.seen = torch.zeros(0, 0, dtype=torch.long, device=device)  # prompt and completion; only with `keep_ids`

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
                self.seen[row, : len(request.ids)] = torch.tensor(request.ids)

    def uniform(self, n: int) -> torch.Tensor:
        return self.uniforms[:n].gather(1, self.written[:n].unsqueeze(1)).squeeze(1)

    def in_probe(self, n: int) -> torch.Tensor:
        return self.written[:n] < self.probe[:n]

    def history(self, n: int) -> torch.Tensor:
        """(n, longest) ids of prompt and completion. A shorter row is padded with its first id."""
        columns = torch.arange(self.longest(n) + 1, device=self.device)
        seen = self.seen[:n, : len(columns)]
        return torch.where(columns <= self.position[:n].unsqueeze(1), seen, seen[:, :1])

    def history_of(self, row: int) -> torch.Tensor:
        """(1, length) ids of a single row."""
        return self.seen[row : row + 1, : int(self.position[row]) + 1]

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


def _grown(tensor: torch.Tensor, rows: int, columns: int | None = None) -> torch.Tensor:
    """`tensor`, zero-padded to at least `rows` (and `columns`); the same object if it is large enough."""
    shape = [max(tensor.size(0), rows)]
    if columns is not None:
        shape.append(max(tensor.size(1), columns))
    if list(tensor.shape) == shape:
        return tensor
    larger = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    larger[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return larger

"""KV cache of a transformers model: one row per live turn, and the states of finished turns for their continuations.

The buffers have the maximum length of the longest turn and are allocated when a turn first needs them. So a rollout
that does not fit into memory fails immediately and not hours later. The error names the setting to lower.
`SlotCache.clear` frees the buffers. Python's garbage collector might not do so before the next rollout allocates its
buffers, because layers and cache refer to each other.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from arpo_trl.errors import EngineError

BLOCK = 32
"""Positions are reserved and attended in blocks of this size. This gives fewer distinct sizes, aligned for kernels.

A caching allocator (CUDA's) can reuse a block only for tensors that are no larger. If tensors grew by one position per
step, nearly every step would leave an unused block."""
GIB = 1 << 30

RowStates = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one row in one layer, each (heads, length, dim)."""


class KVCacheLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, positions, dim). Each row is written at its current positions."""

    is_sliding = False
    is_initialized: bool
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: SlotCache):
        super().__init__()
        self._cache = cache

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._make_room(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._make_room(key_states, value_states)
        rows, length = self._cache.rows, self._cache.length
        positions = self._cache.positions.to(key_states.device)  # layers may be on several devices
        index = torch.arange(rows.start, rows.stop, device=key_states.device).unsqueeze(1)
        # Advanced indices around a slice put the indexed axes first: (rows, queries, heads, dim).
        self.keys[index, :, positions] = key_states.transpose(1, 2)
        self.values[index, :, positions] = value_states.transpose(1, 2)
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        for states in (self.keys, self.values):
            known = states[:, :, :length]  # index_copy_ is several times faster here than assignment to a list of rows
            known.index_copy_(0, torch.tensor(targets, device=states.device), known[sources])

    def read(self, row: int, length: int) -> RowStates:
        return self.keys[row, :, :length].clone(), self.values[row, :, :length].clone()

    def write(self, row: int, states: RowStates) -> None:
        keys, values = states
        length = keys.size(1)
        self._make_room(keys[None], values[None])
        self.keys[row, :, :length], self.values[row, :, :length] = keys, values

    def clear(self) -> None:
        if self.is_initialized:
            self.keys = self.values = torch.empty(0)
            self.is_initialized = False

    def _make_room(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Grow the buffers to the size that the cache has reserved; `keys` and `values` are (any, heads, any, dim).

        Keys and values can differ in dtype and dim. Under autocast a model's rotary embedding or norm may produce
        float32 keys with bfloat16 values, and latent attention has wider keys than values.
        """
        rows, positions = self._cache.max_rows, self._cache.max_positions
        if self.is_initialized and (self.keys.size(0), self.keys.size(2)) == (rows, positions):
            return
        wanted = [(rows, like.size(1), positions, like.size(3)) for like in (keys, values)]
        self._cache.check_room(sum(like[0, :, 0].nbytes for like in (keys, values)), keys.device)
        old = (self.keys, self.values) if self.is_initialized else ()
        self.keys, self.values = (like.new_zeros(shape) for like, shape in zip((keys, values), wanted, strict=True))
        for room, before in zip((self.keys, self.values), old, strict=False):
            room[: before.size(0), :, : before.size(2)] = before
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.length, 0

    def get_seq_length(self) -> int:
        return self._cache.length

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache layers, and the rows and positions that the next forward writes to.

    Args:
        num_layers: The number of layers with keys and values.
        most_rows: The maximum number of rows needed, which limits growth; None if unknown.
        way_out: A sentence for errors that says how to need less memory.
    """

    def __init__(self, num_layers: int, *, most_rows: int | None, way_out: str):
        self.rows, self.length = slice(0, 0), 0
        self.positions = torch.empty(0, 0, dtype=torch.long)
        self.max_rows = self.max_positions = 0
        self._most_rows, self._way_out = most_rows, way_out
        super().__init__(layers=[KVCacheLayer(self) for _ in range(num_layers)])

    def aim(self, rows: slice, positions: torch.Tensor, longest: int) -> None:
        """Set the rows and the positions (rows, queries) of the next forward. All positions are below `longest`."""
        self.rows, self.positions = rows, positions
        self.length = min(_blocks(longest), self.max_positions)

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of the rows `sources` to the rows `targets`."""
        for layer in self._filled if length else []:
            layer.copy(sources, targets, length)

    def read(self, row: int, length: int) -> list[RowStates]:
        """A copy of the row's first `length` keys and values, per layer."""
        return [layer.read(row, length) for layer in self._filled]

    def write(self, row: int, layers: list[RowStates]) -> None:
        """Write the keys and values that `read` returned to the row's first positions."""
        for layer, states in zip(self._filled, layers, strict=True):
            layer.write(row, states)

    @property
    def _filled(self) -> list[KVCacheLayer]:
        """The layers that have keys and values. In some models several layers share those of one."""
        return [layer for layer in self.layers if layer.is_initialized]

    def reserve(self, rows: int, positions: int) -> None:
        """Reserve rows and positions. Rows grow in powers of two, so that growth is rare."""
        if rows > self.max_rows:
            doubled = 1 << (rows - 1).bit_length()
            most = self._most_rows or 0
            self.max_rows = min(doubled, most) if most >= rows else doubled
        self.max_positions = max(self.max_positions, _blocks(positions))

    def clear(self) -> None:
        """Free all buffers, even if something, for example a traceback, still refers to the cache."""
        for layer in self.layers:
            layer.clear()

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def most_bytes(self) -> int:
        """The size in bytes of the buffers with the maximum number of rows; 0 before the first forward."""
        rows = max(self.max_rows, self._most_rows or 0)
        return self.nbytes * rows // self.max_rows if self.max_rows else 0

    def described(self) -> str:
        """The size of the buffers and its factors, as text."""
        rows = max(self.max_rows, self._most_rows or 0)
        each = self.most_bytes // max(1, rows * self.max_positions * len(self.layers))
        return (
            f"{rows} rows × {self.max_positions} positions × {len(self.layers)} layers × {each} bytes = "
            f"{self.most_bytes / GIB:.2f} GiB"
        )

    def check_room(self, bytes_each: int, device: torch.device) -> None:
        """Check that a new layer buffer fits on `device` while the old one still exists.

        Args:
            bytes_each: The layer's bytes per row and position.

        Raises:
            EngineError: The buffer does not fit.
        """
        layer = self.max_rows * self.max_positions * bytes_each
        free = free_bytes(device)
        if free is not None and layer > free:
            raise EngineError(
                f"Sampling needs {layer * len(self.layers) / GIB:.2f} GiB on {device} for the keys and values of "
                f"{self.max_rows} rows × {self.max_positions} positions × {len(self.layers)} layers. The next layer "
                f"takes {layer / GIB:.2f} GiB, but only {free / GIB:.2f} GiB are free. {self._way_out}"
            )


class PrefixCache:
    """Keys and values of the most recently finished turns, up to `max_bytes`."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._states: dict[int, list[RowStates]] = {}

    def keep(self, request: int, layers: list[RowStates]) -> None:
        """Keep the keys and values of the turn `request`, one pair per layer. Evicts the oldest turns if necessary."""
        self._states[request] = layers
        self._bytes += _bytes_of(layers)
        while self._bytes > self._max_bytes:
            self._bytes -= _bytes_of(self._states.pop(next(iter(self._states))))

    def length(self, request: int) -> int:
        """The number of positions kept for a turn, its prefix included; 0 if it is not in the cache."""
        layers = self._states.get(request)
        return layers[0][0].size(1) if layers else 0

    def layers(self, request: int) -> list[RowStates]:
        return self._states.get(request, [])

    def clear(self) -> None:
        self._states.clear()
        self._bytes = 0


def free_bytes(device: torch.device) -> int | None:
    """The bytes available for new tensors on `device`; None if they cannot be determined."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch frees the memory that it has reserved but does not use before it raises an error.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` means that memory ran out. torch has no class for this on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


def _bytes_of(layers: list[RowStates]) -> int:
    return sum(states.nbytes for layer in layers for states in layer)

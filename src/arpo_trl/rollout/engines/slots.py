"""Keys and values of the live turns of a transformers model, a row each, and of finished ones that others continue.

The buffers are as long as the longest turn may become and are made when a turn first asks for them, so that a rollout
which has no room ends there, with what to lower, and not hours later. They are emptied by `SlotCache.clear`, not left
to Python's garbage collector: layers and cache refer to each other, and a collector that counts objects may not come
by before the next rollout's buffers are made.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from arpo_trl.errors import EngineError

BLOCK = 32
"""Positions are reserved and attended to in blocks: fewer sizes, aligned for kernels.

An allocator that keeps what it has given out (CUDA's) can use a block again only for what is no larger. Tensors that
grow by a position a step would leave a block behind for nearly each."""
GIB = 1 << 30

RowStates = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one row in one layer, each (heads, length, dim)."""


class KVCacheLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, positions, dim), written at each row's own positions."""

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
        positions = self._cache.positions.to(key_states.device)  # layers may lie on several devices
        index = torch.arange(rows.start, rows.stop, device=key_states.device).unsqueeze(1)
        # Advanced indices around a slice put the indexed axes first: (rows, queries, heads, dim).
        self.keys[index, :, positions] = key_states.transpose(1, 2)
        self.values[index, :, positions] = value_states.transpose(1, 2)
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        for states in (self.keys, self.values):
            known = states[:, :, :length]  # index_copy_ is several times as fast here as assignment to a list of rows
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
        """Grows the buffers to what the cache has reserved; `keys` and `values` are (any, heads, any, dim).

        Each keeps the type and the width it comes in: under autocast a model's rotary embedding or norm may leave keys
        in float32 where values are bfloat16, and latent attention has keys that are wider than values.
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
    """The layers, and the rows and positions that the next forward writes to.

    Args:
        num_layers: Layers that keep keys and values.
        most_rows: Rows that will be needed at most, where that is known: growth stops there.
        way_out: What to do where there is no room, a sentence.
    """

    def __init__(self, num_layers: int, *, most_rows: int | None, way_out: str):
        self.rows, self.length = slice(0, 0), 0
        self.positions = torch.empty(0, 0, dtype=torch.long)
        self.max_rows = self.max_positions = 0
        self._most_rows, self._way_out = most_rows, way_out
        super().__init__(layers=[KVCacheLayer(self) for _ in range(num_layers)])

    def aim(self, rows: slice, positions: torch.Tensor, longest: int) -> None:
        """Points the next forward at `rows`, its queries at `positions` (rows, queries), all below `longest`."""
        self.rows, self.positions = rows, positions
        self.length = min(_blocks(longest), self.max_positions)

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Gives the rows `targets` the first `length` positions of the rows `sources`."""
        for layer in self._filled if length else []:
            layer.copy(sources, targets, length)

    def read(self, row: int, length: int) -> list[RowStates]:
        """The row's first `length` keys and values, layer by layer, copied."""
        return [layer.read(row, length) for layer in self._filled]

    def write(self, row: int, layers: list[RowStates]) -> None:
        """Puts what `read` gave into the row's first positions."""
        for layer, states in zip(self._filled, layers, strict=True):
            layer.write(row, states)

    @property
    def _filled(self) -> list[KVCacheLayer]:
        """The layers that have keys and values; some models share those of a few layers."""
        return [layer for layer in self.layers if layer.is_initialized]

    def reserve(self, rows: int, positions: int) -> None:
        """Makes room, in powers of two for rows so that growth stays rare."""
        if rows > self.max_rows:
            doubled = 1 << (rows - 1).bit_length()
            most = self._most_rows or 0
            self.max_rows = min(doubled, most) if most >= rows else doubled
        self.max_positions = max(self.max_positions, _blocks(positions))

    def clear(self) -> None:
        """Lets go of all buffers, whoever still refers to the cache: a traceback may."""
        for layer in self.layers:
            layer.clear()

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def most_bytes(self) -> int:
        """What the buffers take with as many rows as will be needed at most; 0 before the first forward."""
        rows = max(self.max_rows, self._most_rows or 0)
        return self.nbytes * rows // self.max_rows if self.max_rows else 0

    def described(self) -> str:
        """The size of the buffers and what it consists of."""
        rows = max(self.max_rows, self._most_rows or 0)
        each = self.most_bytes // max(1, rows * self.max_positions * len(self.layers))
        return (
            f"{rows} rows × {self.max_positions} positions × {len(self.layers)} layers × {each} bytes = "
            f"{self.most_bytes / GIB:.2f} GiB"
        )

    def check_room(self, bytes_each: int, device: torch.device) -> None:
        """Returns if a layer of `bytes_each` a row and position has room on `device`, next to what it grows from.

        Raises:
            EngineError: It has not.
        """
        layer = self.max_rows * self.max_positions * bytes_each
        free = free_bytes(device)
        if free is not None and layer > free:
            raise EngineError(
                f"Sampling needs {layer * len(self.layers) / GIB:.2f} GiB on {device} for the keys and values of "
                f"{self.max_rows} rows × {self.max_positions} positions × {len(self.layers)} layers, a layer at a "
                f"time; the next takes {layer / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free. {self._way_out}"
            )


class PrefixCache:
    """Keys and values of finished turns, the newest that fit into `max_bytes`."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._states: dict[int, list[RowStates]] = {}

    def keep(self, request: int, layers: list[RowStates]) -> None:
        """Keeps one pair per layer for the turn `request`, dropping the oldest turns."""
        self._states[request] = layers
        self._bytes += _bytes_of(layers)
        while self._bytes > self._max_bytes:
            self._bytes -= _bytes_of(self._states.pop(next(iter(self._states))))

    def length(self, request: int) -> int:
        """Positions that are kept of a turn and what it continued, 0 if nothing is."""
        layers = self._states.get(request)
        return layers[0][0].size(1) if layers else 0

    def layers(self, request: int) -> list[RowStates]:
        return self._states.get(request, [])

    def clear(self) -> None:
        self._states.clear()
        self._bytes = 0


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a new tensor may take on `device`; None where nobody can be asked."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds without using it, it gives back before it gives up.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what `error` says; for a CPU's memory torch has no class."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


def _bytes_of(layers: list[RowStates]) -> int:
    return sum(states.nbytes for layer in layers for states in layer)

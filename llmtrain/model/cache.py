"""Keys and values of past tokens, for generation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.ops import KeyLengths


class LayerCache:
    """The keys and values of one block, in buffers allocated at first use. Every row of the batch has the same length."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B,K,S,d] and return all of them [B,K,length,d]."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and {end} are needed; give KVCache a larger capacity")
        if self._keys is None:
            self._keys, self._values = (t.new_empty((*t.shape[:2], self.capacity, t.shape[3])) for t in (k, v))
        self._keys[:, :, self.length : end], self._values[:, :, self.length : end] = k, v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """Append k, v [B,K,S,d] and attend with q [B,H,S,d], which stands at their places: [B,H,S,d]."""
        offset = self.length
        k, v = self.update(k, v)
        return ops.attention(q, k, v, mask=mask, q_offset=offset)


class KVCache:
    """One LayerCache per block, made as blocks ask for it: `model(tokens, ..., cache=KVCache(capacity))`, under no_grad.

    `capacity` is the longest sequence in tokens. Every row of the batch has the same length.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._layers: dict[str, LayerCache] = {}

    @property
    def length(self) -> int:
        """Tokens cached so far."""
        return next((layer.length for layer in self._layers.values()), 0)

    def layer(self, block: str) -> LayerCache:
        """The cache of the block of this name."""
        return self._layers.setdefault(block, LayerCache(self.capacity))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; 0 starts anew with the same buffers."""
        for layer in self._layers.values():
            layer.length = min(layer.length, length)

    def positions(self, tokens: Tensor) -> Tensor:
        """Positions [1,S] of the tokens [B,S] that come next."""
        return torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[None]


class SlotCache:
    """Keys and values of `slots` sequences, each with a length of its own, in one pair of buffers [slots,K,capacity,d] per block.

    A forward pass takes a view of it as its `cache`: `fill` to append several tokens to some slots, `step` to append one token to each
    of the first slots. The views leave `lengths` alone; the caller raises them when the pass is done.
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self.lengths = [0] * slots
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}

    def fill(self, first: int, count: int) -> "SlotFill":
        """View for a pass over tokens [count,S] that follow what the slots first..first+count hold, which is equally long in all."""
        return SlotFill(self, slice(first, first + count), self.lengths[first])

    def step(self, count: int) -> "SlotStep":
        """View for a pass over tokens [count,1], one for each of the first `count` slots, whatever their lengths."""
        return SlotStep(self, self.lengths[:count])

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        length = self.lengths[target] = self.lengths[source]
        for buffer in (b for pair in self._buffers.values() for b in pair):
            buffer[target, :, :length] = buffer[source, :, :length]

    def buffers(self, block: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The block's buffers, allocated like k and v [B,K,S,d] at first use."""
        if block not in self._buffers:
            shapes = [(self.slots, t.shape[1], self.capacity, t.shape[3]) for t in (k, v)]
            # Zeros: the step reads beyond a short row's end with weight zero, and 0 * NaN is NaN.
            self._buffers[block] = k.new_zeros(shapes[0]), v.new_zeros(shapes[1])
        return self._buffers[block]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers allocated so far."""
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)


class SlotFill:
    """A pass of several tokens over neighbouring slots of equal length; its own block views."""

    def __init__(self, cache: SlotCache, rows: slice, length: int):
        self.cache, self.rows, self.length = cache, rows, length

    def layer(self, block: str) -> "FillLayer":
        """The view of one block."""
        return FillLayer(self, block)


class FillLayer:
    """One block of a SlotFill."""

    def __init__(self, view: SlotFill, block: str):
        self.view, self.block = view, block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """As LayerCache.attend, over the slots of the view."""
        view, start, end = self.view, self.view.length, self.view.length + k.shape[2]
        if end > view.cache.capacity:
            raise ValueError(f"the cache holds {view.cache.capacity} tokens per slot and {end} are needed")
        keys, values = (buffer[view.rows] for buffer in view.cache.buffers(self.block, k, v))
        keys[:, :, start:end], values[:, :, start:end] = k, v
        if start:
            k, v = keys[:, :, :end], values[:, :, :end]
        return ops.attention(q, k, v, mask=mask, q_offset=start)


class SlotStep:
    """A pass of one token per slot over the first slots; what all blocks share is made once."""

    def __init__(self, cache: SlotCache, lengths: Sequence[int]):
        if max(lengths) >= cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens per slot and {max(lengths) + 1} are needed")
        self.cache, self.starts = cache, tuple(lengths)
        self.reach = KeyLengths(length + 1 for length in lengths)
        self._index: tuple[Tensor, Tensor] | None = None

    def layer(self, block: str) -> "StepLayer":
        """The view of one block."""
        return StepLayer(self, block)

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Put new [B,K,1,d] at each slot's end and return the buffer up to the longest: [B,K,T,d]."""
        if self.reach.equal:
            buffer[: len(self.starts), :, self.starts[0]] = new[:, :, 0]
        else:
            if self._index is None:
                self._index = tuple(torch.tensor(x, device=new.device) for x in (range(len(self.starts)), self.starts))
            rows, ends = self._index
            buffer[rows, :, ends] = new[:, :, 0]
        return buffer[: len(self.starts), :, : self.reach.longest]


class StepLayer:
    """One block of a SlotStep."""

    def __init__(self, view: SlotStep, block: str):
        self.view, self.block = view, block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """Append k, v [B,K,1,d] and attend with q [B,H,1,d], each row over its own length: [B,H,1,d]."""
        keys, values = self.view.cache.buffers(self.block, k, v)
        keys, values = self.view.write(keys, k), self.view.write(values, v)
        return ops.decode_attention(q, keys, values, lengths=self.view.reach, window=mask.window)


def cache_bytes(cfg: ModelConfig, *, slots: int, capacity: int, itemsize: int) -> int:
    """Bytes of the keys and values of `slots` sequences of `capacity` tokens, all blocks together."""
    return cfg.layers * slots * capacity * cfg.kv_heads * (cfg.head_dim + cfg.value_head_dim) * itemsize

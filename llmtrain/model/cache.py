"""Keys and values of past tokens, for generation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.model.host_cache import HostBlocks
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
    of the first slots. The views leave `lengths` alone; the caller raises them when the pass is done. The blocks of `host` have their
    buffers in the host's memory.
    """

    def __init__(self, slots: int, capacity: int, *, host: HostBlocks | None = None):
        self.slots, self.capacity, self.host = slots, capacity, host
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

    def on_host(self, block: str) -> bool:
        """Whether the block's buffers lie in the host's memory."""
        return self.host is not None and block in self.host

    def buffers(self, block: str, k: Tensor, v: Tensor, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The block's buffers, allocated like k and v [B,K,S,d] at first use, on their device if not given."""
        if block not in self._buffers:
            # Zeros: the step reads beyond a short row's end with weight zero, and 0 * NaN is NaN.
            keys, values = (t.new_zeros(self.slots, t.shape[1], self.capacity, t.shape[3], device=device) for t in (k, v))
            self._buffers[block] = keys, values
        return self._buffers[block]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers allocated so far."""
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)


class SlotFill:
    """A pass of several tokens over neighbouring slots of equal length; its own block views."""

    def __init__(self, cache: SlotCache, rows: slice, length: int):
        self.cache, self.rows, self.length = cache, rows, length

    def layer(self, block: str):
        """The view of one block."""
        return self.cache.host.fill(self, block) if self.cache.on_host(block) else FillLayer(self, block)

    def places(self, block: str, k: Tensor, v: Tensor, *, device: torch.device | None = None) -> list[Tensor]:
        """Where the new k and v [B,K,S,d] belong."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.cache.capacity:
            raise ValueError(f"the cache holds {self.cache.capacity} tokens per slot and {end} are needed")
        return [buffer[self.rows, :, start:end] for buffer in self.cache.buffers(block, k, v, device=device)]

    def seen(self, block: str, k: Tensor, v: Tensor) -> list[Tensor]:
        """All keys and values [B,K,T,d] up to the end of the new k and v."""
        return [buffer[self.rows, :, : self.length + k.shape[2]] for buffer in self.cache.buffers(block, k, v)]


class FillLayer:
    """One block of a SlotFill."""

    def __init__(self, view: SlotFill, block: str):
        self.view, self.block = view, block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """As LayerCache.attend, over the slots of the view."""
        view = self.view
        for new, place in zip((k, v), view.places(self.block, k, v)):
            place.copy_(new)
        if view.length:
            k, v = view.seen(self.block, k, v)
        return ops.attention(q, k, v, mask=mask, q_offset=view.length)


class SlotStep:
    """A pass of one token per slot over the first slots; what all blocks share is made once."""

    def __init__(self, cache: SlotCache, lengths: Sequence[int]):
        if max(lengths) >= cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens per slot and {max(lengths) + 1} are needed")
        self.cache, self.starts = cache, tuple(lengths)
        self.reach = KeyLengths(length + 1 for length in lengths)
        self._index: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def layer(self, block: str):
        """The view of one block."""
        return self.cache.host.step(self, block) if self.cache.on_host(block) else StepLayer(self, block)

    def attend(self, block: str, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """Append k, v [B,K,1,d] and attend with q [B,H,1,d], each row over its own length: [B,H,1,d]."""
        keys, values = self.cache.buffers(block, k, v)
        return ops.decode_attention(q, self._write(keys, k), self._write(values, v), lengths=self.reach, window=mask.window)

    def _write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Put new [B,K,1,d] at each slot's end and return the buffer up to the longest: [B,K,T,d]."""
        if self.reach.equal:
            buffer[: len(self.starts), :, self.starts[0]] = new[:, :, 0]
        else:
            if new.device not in self._index:
                self._index[new.device] = tuple(torch.tensor(x, device=new.device) for x in (range(len(self.starts)), self.starts))
            rows, ends = self._index[new.device]
            buffer[rows, :, ends] = new[:, :, 0]
        return buffer[: len(self.starts), :, : self.reach.longest]


class StepLayer:
    """One block of a SlotStep."""

    def __init__(self, view: SlotStep, block: str):
        self.view, self.block = view, block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """As SlotStep.attend."""
        return self.view.attend(self.block, q, k, v, mask=mask, ops=ops)


def cache_bytes(cfg: ModelConfig, *, slots: int, capacity: int, itemsize: int) -> int:
    """Bytes of the keys and values of `slots` sequences of `capacity` tokens, all blocks together."""
    return cfg.layers * slots * capacity * cfg.kv_heads * (cfg.head_dim + cfg.value_head_dim) * itemsize

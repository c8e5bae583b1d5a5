"""Keys and values of past tokens, for generation."""

import torch
from torch import Tensor


class LayerCache:
    """The keys and values of one block, in buffers allocated at first use."""

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

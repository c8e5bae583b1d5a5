"""What is computed: one rank's part of an attention branch, and a model that answers a prompt."""

from typing import Any, NamedTuple


class Branch(NamedTuple):
    """Causal attention, output projection and all-reduce. Heads and their width are those of all ranks."""

    tokens: int = 6144
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 16

    @property
    def nbytes(self) -> int:
        """Of the tensor that is summed, in float32."""
        return 4 * self.tokens * self.hidden


class Prompt(NamedTuple):
    """A Llama, and the tokens of its prompt."""

    tokens: int = 2048
    layers: int = 4
    hidden: int = 512
    heads: int = 8
    ffn: int = 1408

    def model(self) -> dict[str, Any]:
        """Its model section."""
        shape = {"layers": self.layers, "hidden": self.hidden, "attention": {"heads": self.heads}, "ffn": {"hidden": self.ffn}}
        return shape | {"vocab_size": 1024, "max_seq_len": self.tokens + 1}

    @property
    def nbytes(self) -> int:
        """Of what is summed: the embedding, and two branches of every block."""
        return 4 * self.tokens * self.hidden * (2 * self.layers + 1)

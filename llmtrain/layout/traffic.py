"""The bytes that one rank sends in an optimizer step, by axis of the mesh and kind of collective, in closed form.

Convention: what a rank sends in a ring of n ranks. An all-gather and a reduce-scatter send (n - 1) x one shard, an all-reduce
2 (n - 1) / n x the tensor, an all-to-all (n - 1) / n x the tensor, a send the tensor. Receives count for nothing: every byte that
is sent is one that arrives. `calls` are what the rank hands to its process groups. Tests count both in real worlds.

B rows of a micro-batch, L positions of a row on this rank of cp, s = L / t of them on this rank of tp, D hidden, e bytes of an activation.
"""

from collections.abc import Sequence
from math import ceil, lcm
from typing import NamedTuple

from llmtrain.config.parameters import BYTES, loss_rows
from llmtrain.config.run import RunConfig
from llmtrain.layout.balance import Groups
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.schedule import with_communication
from llmtrain.layout.shards import Shards, Unit
from llmtrain.layout.steps import Segment


class Row(NamedTuple):
    """`calls` collectives of one kind over one axis in an optimizer step, for which this rank sends `bytes`."""

    axis: str
    kind: str
    calls: int
    bytes: float


def sent(kind: str, size: float, ranks: int) -> float:
    """Bytes that a rank of `ranks` sends. `size` is a shard's for all_gather and reduce_scatter, else the tensor's, in bytes."""
    match kind:
        case "all_gather" | "reduce_scatter":
            return (ranks - 1) * size
        case "all_reduce":
            return 2 * (ranks - 1) * size / ranks
        case "all_to_all":
            return (ranks - 1) * size / ranks
        case "send":
            return size
    raise ValueError(f"collective {kind!r}: known are all_gather, reduce_scatter, all_reduce, all_to_all, send")


def traffic(cfg: RunConfig, shape: MeshShape, segment: Segment, *, rank: int, scalar: int = 8) -> list[Row]:
    """What global rank `rank` sends in one step of `segment`: rows by axis and kind, only those that occur.

    Axes are those of the mesh, `fsdp` (dp_shard x cp), `efsdp` (what shards experts), `ep_outer` and `ep_inner` (nodes) and `world`. Tokens
    are taken to go to all experts alike, and none to be dropped. Validation, checkpoints and the start of a run are not part of a step. A
    schedule that splits backward passes (zero_bubble, zbv, dualpipev) repeats collectives of tp, cp and ep in the second half; here they
    count once, so for these it is a lower bound.

    Args:
        cfg: the run; model.vocab_size is set.
        shape: its mesh.
        segment: steps of one batch size and length.
        rank: whose traffic.
        scalar: bytes of a number in the loop's sums: 8, or 4 on a device without float64.
    """
    return _Step(cfg, shape, segment, rank, scalar).rows()


class _Step:
    def __init__(self, cfg: RunConfig, shape: MeshShape, segment: Segment, rank: int, scalar: int):
        self.cfg, self.shape, self.model, self.scalar = cfg, shape, cfg.model, scalar
        self.shards = Shards(cfg, shape, rank=rank)
        phase = segment.phase
        self.batch = phase.micro_batch
        self.micros = segment.batch // (shape.dp * phase.micro_batch)
        self.local = ceil(ceil(phase.seq_len / shape.cp) / shape.tp)  # s
        self.e = BYTES[cfg.precision.compute]
        self.high = max(4, self.e)  # of softmax, routing, and the sums of the ring
        self.forwards = 2 if cfg.train.recompute in ("selective", "full") else 1  # selective repeats collectives as well
        self.sends = self.forwards + ("permute" in cfg.train.recompute)  # of rows to their experts
        self.widenings = self.forwards + ("mla_up" in cfg.train.recompute)  # of narrow vectors, up to the attention itself
        self.groups = self._groups(segment)
        self._found: dict[tuple[str, str], list[float]] = {}

    def _groups(self, segment: Segment) -> Groups | None:
        """The groups of sequences over which a loss balances experts."""
        balance = self.model.ffn.balance if self.model.ffn.kind == "moe" else None
        if balance is None:
            return None
        phase = segment.phase
        return Groups.of_step(balance, batch=segment.batch, rows=phase.micro_batch, seq_len=phase.seq_len, ranks=self.shape.dp)

    def rows(self) -> list[Row]:
        stages = self.shards.stages()
        for stage in stages:
            self._tensor_ends(stage)
            for unit in self.shards.units(stage):
                self._parameters(unit)
            self._balance(self._mixtures(stage))
        blocks = sum(len(self.shards.blocks(stage)) + self._heads(stage) for stage in stages)
        mixtures = sum(map(self._mixtures, stages))
        self._attention(self.micros * blocks)
        self._context(self.micros * blocks)
        self._dense(self.micros * (blocks - mixtures))
        self._experts(self.micros * mixtures)
        self._pipeline()
        self._gradient_sum()
        self._scalars()
        return [Row(axis, kind, int(calls), size) for (axis, kind), (calls, size) in self._found.items()]

    def _add(self, axis: str, kind: str, calls: float, size: float, ranks: int, *, pieces: int = 1) -> None:
        """`calls` times a collective of `size` bytes, see `sent`, which is made in `pieces`."""
        if ranks > 1 and calls:
            row = self._found.setdefault((axis, kind), [0, 0.0])
            row[0] += calls * pieces
            row[1] += calls * sent(kind, size, ranks)

    def _heads(self, stage: int) -> int:
        return self.model.mtp.heads if self.shards.last(stage) else 0

    def _mixtures(self, stage: int) -> int:
        """Blocks of `stage`, those of multi-token prediction included, that are mixtures of experts."""
        if self.model.ffn.kind != "moe":
            return 0
        return sum(index >= self.model.ffn.dense_layers for index in self.shards.blocks(stage)) + self._heads(stage)

    # --- activations --------------------------------------------------------------------------------------------------------------

    def _tensor_ends(self, stage: int) -> None:
        """Embedding, head and loss under tp."""
        tp, rows, heads = self.shape.tp, self.batch * self.local, self._heads(stage)
        hidden = rows * self.model.hidden * self.e
        embedded = self.micros * (self.shards.first(stage) + heads)
        self._add("tp", "reduce_scatter", embedded, hidden, tp)
        self._add("tp", "all_gather", embedded, hidden, tp)
        if self.shards.last(stage):
            passes, pieces = self.micros * (1 + heads), -(-rows // loss_rows(self.model.vocab_size, self.cfg.train.loss_chunk))
            self._add("tp", "all_gather", passes, hidden, tp, pieces=pieces)
            self._add("tp", "all_gather", passes, 2 * tp * rows * self.high, tp, pieces=pieces)
            self._add("tp", "reduce_scatter", passes, hidden, tp, pieces=pieces)

    def _attention(self, times: int) -> None:
        a = self.model.attention
        if a.kind == "mla":
            self._branch(times, [a.query_rank or self.model.hidden, a.kv_rank], positions=self.local, gathers=self.widenings)
            shared = self.batch * self.local * a.rope_dim * self.e
            self._add("tp", "all_gather", times * self.widenings, shared, self.shape.tp)
            self._add("tp", "reduce_scatter", times, shared, self.shape.tp)
        else:
            self._branch(times, [self.model.hidden], positions=self.local, gathers=self.forwards)

    def _dense(self, times: int) -> None:
        self._branch(times, [self.model.hidden], positions=self.batch * self.local, gathers=self.forwards)

    def _branch(self, times: int, widths: Sequence[int], *, positions: int, gathers: int) -> None:
        """Rows of these widths are gathered, so often going forward, for products split by columns; what a product split by rows gives is
        scattered. Backward, rows are gathered again and their gradients scattered, and the gradient of what was scattered is gathered."""
        tp, pieces = self.shape.tp, max(1, min(self.cfg.parallel.tp_chunks, positions))
        rows = self.batch * self.local * self.e
        for width in widths:
            self._add("tp", "all_gather", times * (gathers + 1), rows * width, tp, pieces=pieces)
            self._add("tp", "reduce_scatter", times, rows * width, tp, pieces=pieces)
        self._add("tp", "reduce_scatter", times * self.forwards, rows * self.model.hidden, tp, pieces=pieces)
        self._add("tp", "all_gather", times, rows * self.model.hidden, tp, pieces=pieces)

    def _experts(self, times: int) -> None:
        if not times:
            return
        tokens, k, etp, ep = self.batch * self.local, self.model.ffn.top_k, self.shape.etp, self.shape.ep
        hidden, forwards, sends = tokens * (self.model.ffn.descend or self.model.hidden) * self.e, times * self.forwards, times * self.sends
        if self.model.ffn.capacity is not None:  # whole sequences decide what finds room: probabilities and numbers of experts
            self._add("tp", "all_gather", forwards, 2 * tokens * k * self.high, self.shape.tp)
            self._add("cp", "all_gather", forwards, 2 * tokens * self.shape.tp * k * self.high, self.shape.cp)
        # The width of experts is split: tokens, probabilities and numbers of experts are gathered, results scattered.
        self._add("tp", "all_gather", sends + times, hidden, etp)
        self._add("tp", "all_gather", sends, tokens * k * self.high, etp)
        self._add("tp", "all_gather", sends, tokens * k * 8, etp)
        self._add("tp", "reduce_scatter", times * (self.forwards + 1), hidden, etp)
        self._add("tp", "reduce_scatter", times, tokens * k * self.high, etp)
        if self.shape.ep_inner is not None:
            self._nodes(times, tokens=etp * tokens, hidden=etp * hidden)
            return
        # Rows to the experts and back, and how many there are.
        self._add("ep", "all_to_all", sends, 8 * self.model.ffn.experts, ep)
        self._add("ep", "all_to_all", sends + times * (self.forwards + 2), etp * k * hidden, ep)

    def _nodes(self, times: int, *, tokens: int, hidden: float) -> None:
        """Hierarchical dispatch of so many tokens, of `hidden` bytes."""
        sends, k, experts = times * self.sends, self.model.ffn.top_k, self.model.ffn.experts
        inner, outer = self.shape.ep_inner, self.shape.ep_outer
        # To the other nodes: how many go to each expert, tokens with probabilities and numbers of experts; and sums of results back.
        self._add("ep_outer", "all_gather", sends, 8 * (experts + 1), outer)
        self._add("ep_outer", "all_gather", sends + times, hidden, outer)
        self._add("ep_outer", "all_gather", sends, tokens * k * self.high, outer)
        self._add("ep_outer", "all_gather", sends, tokens * k * 8, outer)
        self._add("ep_outer", "reduce_scatter", times * (self.forwards + 1), hidden, outer)
        self._add("ep_outer", "reduce_scatter", times, tokens * k * self.high, outer)
        # Within the node all choices of a rank's share of everybody's tokens, which are as many as those of its own.
        self._add("ep_inner", "all_to_all", sends, 8 * experts // outer, inner)
        self._add("ep_inner", "all_to_all", sends + times * (self.forwards + 2), k * hidden, inner)

    def _context(self, times: int) -> None:
        n, d, dv, tp = self.shape.cp, self.model.head_dim, self.model.value_head_dim, self.shape.tp
        ring = self.cfg.parallel.cp_kind == "ring"  # on which queries, keys and values alone are made again
        forwards, places = times * (self.forwards if ring else self.widenings), self.batch * self.local * tp  # B L
        heads, kv_heads = self.model.attention.heads // tp, max(1, self.model.kv_heads // tp)
        keys_values = places * (d + dv) * kv_heads
        match self.cfg.parallel.cp_kind:
            case "all_gather":
                self._add("cp", "all_gather", forwards, keys_values * self.e, n)
                self._add("cp", "reduce_scatter", times, keys_values * self.e, n)
            case "ring":
                self._add("cp", "send", (n - 1) * (forwards + times), keys_values * self.e, n)
                self._add("cp", "send", (n - 1) * times, keys_values * self.high, n)
            case "ulysses":
                there = places * (d * heads + (d + dv) * lcm(kv_heads, n)) * self.e
                self._add("cp", "all_to_all", forwards + times, there, n)
                self._add("cp", "all_to_all", forwards + times, places * dv * heads * self.e, n)

    def _balance(self, mixtures: int) -> None:
        """Choices of each expert in every group of sequences, summed over the ranks that share these, for all layers of a stage at once."""
        if not mixtures or self.groups is None:
            return
        together = self._together()
        _, number = self.groups.numbered(together, 0)
        size = number * mixtures * self.model.ffn.experts * 8
        for axis in ("tp", "cp", *(("dp_shard", "dp_replicate") if self.groups.over_ranks else ())):
            self._add(axis, "all_reduce", self.micros // together, size, getattr(self.shape, axis))

    def _together(self) -> int:
        """Micro-batches that are forwarded before the first of them is differentiated, as they share what balances experts."""
        return self.groups.window if self.groups is not None and self.shards.plan is None else 1

    def _pipeline(self) -> None:
        plan, place = self.shards.plan, self.shards.place["pp"]
        if plan is None:
            return
        sends = sum(action.kind.startswith("SEND") for action in with_communication(plan.schedule(self.micros))[place])
        self._add("pp", "send", sends, self.batch * self.local * self.model.hidden * self.e, plan.ranks)
        ends = {plan.rank_of(0), plan.rank_of(plan.stages - 1)}
        if plan.copies_embedding and len(ends) == 2 and place in ends:
            table = sum(held.elements for held in self.shards.held() if held.name == "embedding.weight")
            self._add("pp", "send", 1, table * BYTES[self.cfg.precision.params], plan.ranks)

    # --- parameters and gradients -------------------------------------------------------------------------------------------------

    def _parameters(self, unit: Unit) -> None:
        """Gathered for every pass, or once per step in a pipeline; gradients are reduced once per step."""
        if not self.shards.sharded:
            return
        ranks, _ = self.shards.sharding(unit)
        shard = sum(weight.padded(ranks) for weight in unit.weights)
        axis, precision = "efsdp" if unit.kind == "experts" else "fsdp", self.cfg.precision
        gathers, reductions = self._passes(unit)
        self._add(axis, "all_gather", gathers, shard * BYTES[precision.compute], ranks)
        self._add(axis, "reduce_scatter", reductions, shard * BYTES[precision.reduce], ranks)
        self._add("dp_replicate", "all_reduce", reductions, shard * BYTES[precision.reduce], self.shape.dp_replicate)

    def _passes(self, unit: Unit) -> tuple[int, int]:
        """How often FSDP2 gathers the unit in a step, and how often it reduces its gradients."""
        if self.shape.pp > 1:
            return 1, 1
        again = self.cfg.parallel.reshard_after_forward and not unit.stays
        if unit.kind != "embedding":
            return self.micros * (1 + again) + self._in_vain(unit), 1
        # Its backward pass does not need it. Multi-token prediction embeds in between: after the first of these backward passes FSDP2 takes
        # it to be done, and gathers it for the others.
        more = self.model.mtp.heads
        return self.micros * (1 + more * (1 + again)), 1 + (more > 0)

    def _in_vain(self, unit: Unit) -> int:
        """At the end of the first of several backward passes that follow several forward passes, FSDP2 gathers ahead what the forward pass
        before the last one ended with: the head, unless the root has parameters, which are still there."""
        root = self.model.tie_embeddings or self.model.position.kind == "learned" or self.model.mtp.heads > 0
        together = self._together()
        return self.micros // together if unit.kind == "head" and together > 1 and not root else 0

    def _scalars(self) -> None:
        """Targets, over ranks that read different samples; loss and gradient norm in one; whether a rank was asked to stop."""
        for axis in ("dp_replicate", "dp_shard"):
            self._add(axis, "all_reduce", 1, self.scalar, getattr(self.shape, axis))
        ffn, layers = self.model.ffn, self.model.expert_layers + self.model.mtp.heads
        moe = ffn.kind == "moe"
        experts = moe + layers * (moe and ffn.router.bias_rate is not None)  # the loss that balances, norms of the routers' biases
        for numbers in (2 + experts, 1):
            self._add("world", "all_reduce", 1, numbers * self.scalar, self.shape.world)
        if moe:
            self._add("world", "all_reduce", 1, layers * (ffn.experts + 1) * 8, self.shape.world)

    def _gradient_sum(self) -> None:
        partial = sum(held.elements for held in self.shards.held() if held.partial)
        self._add("tp", "all_reduce", 1 if partial else 0, partial * BYTES[self.cfg.precision.params], self.shape.tp)

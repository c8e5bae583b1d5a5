"""Seconds of the parts of one case: blocks and stages, sends between them, gradient reduction, the update."""

import math
from collections import Counter
from collections.abc import Callable, Iterable

from llmtrain.simulate.actions import Times
from llmtrain.simulate.blocks import block_work, embedding_work, head_work, mtp_work
from llmtrain.simulate.case import Case
from llmtrain.simulate.held import Held, block_held, blocks_of
from llmtrain.simulate.links import group, seconds
from llmtrain.simulate.rates import Machine, Rates, machine
from llmtrain.simulate.work import GROUPED, Item, Send, Work

TENSORS = 6
"""Parameters of a block: two norms, and products in and out of attention and feed-forward branch."""
OPTIMIZER_BYTES = 34
"""Of an element in an update: gradient read twice (norm, update), master and both moments read and written, 16-bit weight written."""


class Pricer:
    """The parts of one case's time."""

    def __init__(self, case: Case, rates: Rates, known: dict[tuple, Times] | None = None):
        self.case, self.rates, self.known = case, rates, {} if known is None else known
        self.machine: Machine = machine(
            case.hardware, rates, dtype=case.dtype, fused=case.habits.fused, older=case.habits.older_attention, parted=case.cp > 1
        )
        self.copies = case.model.ffn.top_k if case.model.ffn.kind == "moe" else 1
        hides = case.habits.ep_hidden or case.overlap_micro_batches
        self.hidden = {
            "tp": rates.tp_hidden if case.habits.tp_hidden else 0.0,
            "behind": rates.behind,
            "cp": rates.cp_hidden if case.cp_kind == "ring" else 0.0,
            "ep": rates.ep_hidden if hides else 0.0,
        }
        self.dp_hidden = rates.dp_hidden if case.habits.dp_hidden else 0.0
        if self.machine.shared:
            self.hidden, self.dp_hidden = {}, 0.0
        # A rank that has all experts has all tokens, however they are spread.
        self.busiest = 1.0 if case.ep == 1 else rates.imbalance if case.imbalance is None else case.imbalance

    def work(self, work: Work) -> Times:
        """Of one piece of work."""
        parts: Counter = Counter()
        forward = self._device(work.forward, parts) + self._sends(work.forward_sends, parts)
        again = self._device(work.again, parts, "recomputation") + self._sends(work.again_sends, parts, "recomputation")
        inputs = self._device(work.inputs, parts) + self._sends(work.backward_sends, parts)
        weights = self._device(work.weights, parts)
        return Times(forward, inputs + again, weights, parts)

    def _device(self, items: Iterable[Item], parts: Counter, label: str | None = None) -> float:
        found, launches, spent = self.machine, 0, 0.0
        for item in items:
            one = found.time(item)
            if item.kind == GROUPED or item.name == "permute":
                one *= self.busiest
            launches += item.launches
            spent += one
            parts[label or item.kind] += one
        waits = launches * found.launch * (1 if self.case.habits.fused else 1.6) - (0.0 if found.shared else spent)
        if waits > 0:  # a processor that computes starts the next operator when it is done with this one
            parts["host"] += waits
            spent += waits
        return spent

    def _sends(self, sends: Iterable[Send], parts: Counter, label: str | None = None) -> float:
        spent = 0.0
        for send in sends:
            where = group(self.case, send.axis)
            around = send.axis == "cp" and self.case.cp_kind == "ring"
            one = seconds(self.machine, where, send.kind, send.size, copies=self.copies, around=around)
            one *= 1 - self.hidden.get(send.hides, 0.0)
            if send.axis.startswith("ep"):
                one *= self.busiest
            parts[label or f"{send.axis.split('_')[0]} sends"] += one
            spent += one
        return spent

    def block(self, *, dense: bool) -> Times:
        """Of one block, gathering of sharded parameters included."""
        found = self._once(("block", dense), lambda: self.work(block_work(self.case, dense=dense))).copy()
        if self.case.shard == "zero3" and self.case.pp == 1:
            self._gathers(found, block_held(self.case, dense=dense))
        return found

    def _once(self, part: tuple, made: Callable[[], Times]) -> Times:
        """`made`, or what another case with the same part has made."""
        key = (*part, *self.case.part)
        if key not in self.known:
            self.known[key] = made()
        return self.known[key]

    def _gathers(self, times: Times, held: Held) -> None:
        """FSDP: parameters come before each pass and gradients go after the backward pass, beside the computation."""
        width, summed = self.case.width, self.case.habits.gradient_bytes
        gather, reduce = self._traffic("all_gather", held, width), self._traffic("reduce_scatter", held, summed)
        if self.machine.shared:  # what is gathered and reduced is copied into place by the cores that compute
            gather, reduce = (one + 2 * held.all * size * self.machine.byte for one, size in ((gather, width), (reduce, summed)))
        share = self.dp_hidden
        forward = _beside(times.forward, gather, share)
        again = gather if self.case.reshard else 0.0
        backward = _beside(times.backward, again + reduce / (1 if self.case.habits.reduces_each else self.case.micros), share)
        times.parts["dp sends"] += forward - times.forward + backward - times.backward
        times.inputs += backward - times.backward
        times.forward = forward

    def _traffic(self, kind: str, held: Held, size: float) -> float:
        """Of dense parameters over fsdp and experts over efsdp."""
        spent = 0.0
        for axis, elements in (("fsdp", held.dense), ("efsdp", held.experts)):
            where = group(self.case, axis)
            shard = elements * size / (where.ranks if kind != "all_reduce" else 1)
            spent += seconds(self.machine, where, kind, shard)
        if self.case.replicas > 1 and kind == "reduce_scatter":
            whole = held.dense / group(self.case, "fsdp").ranks + held.experts / group(self.case, "efsdp").ranks
            spent += seconds(self.machine, group(self.case, "dp_replicate"), "all_reduce", whole * size)
        return spent

    def stages(self) -> tuple[Times, ...]:
        """Of every stage of the pipeline."""
        case = self.case
        dense = self.block(dense=True) if case.model.ffn.kind != "moe" or case.model.ffn.dense_layers else Times()
        mixture = self.block(dense=False) if case.model.ffn.kind == "moe" else Times()
        found = []
        for stage in range(case.stages):
            one = Times()
            plain, mixed = blocks_of(case, stage)
            one.add(dense, plain)
            one.add(mixture, mixed)
            if stage == 0:
                one.add(self._once(("embedding",), lambda: self.work(embedding_work(case))))
            if stage == case.stages - 1:
                one.add(self._once(("head",), lambda: self.work(head_work(case))))
                for _ in range(case.model.mtp.heads):
                    one.add(mixture if case.model.ffn.kind == "moe" else dense)
                    for work in mtp_work(case):
                        one.add(self.work(work))
            found.append(one)
        return tuple(found)

    def transfer(self) -> float:
        """An activation from stage to stage."""
        case = self.case
        if case.pp == 1:
            return 0.0
        size = case.rows * case.model.hidden * 2 / case.tp  # each rank of tp sends its part, whether or not that is all it has
        return seconds(self.machine, group(case, "pp"), "send", size)

    def reduction(self, held: Held) -> tuple[float, float]:
        """Gradients to their owners, and parameters back, once a step."""
        case, size, habits = self.case, self.case.habits.gradient_bytes, self.case.habits
        if case.shard == "zero3" and case.pp == 1:
            return 0.0, 0.0
        if case.shard == "none" or habits.reduces_whole:
            pieces = math.ceil(held.all * size / habits.bucket_bytes) if habits.bucket_bytes else 1
            reduced = pieces * self._traffic("all_reduce", Held(held.dense / pieces, held.experts / pieces), size)
            if case.shard == "none":
                return reduced, 0.0
            copies = self.machine.launch * TENSORS * sum(case.split) / case.pp * group(case, "fsdp").ranks
            return reduced, self._traffic("all_gather", held, 2) + copies
        times = case.micros if habits.reduces_each and case.shard == "zero2" else 1
        return times * self._traffic("reduce_scatter", held, size), self._traffic("all_gather", held, habits.weight_bytes or 2)

    def update(self, held: Held) -> float:
        """The optimizer's own time."""
        case = self.case
        sharded = case.shard != "none"
        owned = held.dense / (group(case, "fsdp").ranks if sharded else 1) + held.experts / (group(case, "efsdp").ranks if sharded else 1)
        moved = 4 * case.parameter_bytes * owned / self.rates.host_link if "optimizer" in case.offload else 0.0
        moved += self.machine.launch * case.habits.tensor_launches * TENSORS * sum(case.split) / case.pp
        return moved + (owned * OPTIMIZER_BYTES + held.all * 2 * case.habits.gradient_bytes) * self.machine.byte


def _beside(computing: float, sending: float, share: float) -> float:
    """Both, if `share` of the shorter one hides."""
    return max(computing, sending) + (1 - share) * min(computing, sending)

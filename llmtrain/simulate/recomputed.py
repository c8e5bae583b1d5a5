"""What the backward pass computes and sends again."""

from llmtrain.simulate.case import Case
from llmtrain.simulate.work import GROUPED, PASS, PRODUCT, Item, Send, Work

_NAMES = {
    "activation": ("activation",),
    "norms": ("norms",),
    "attention": ("attention", "scores", "softmax"),
    "mla_up": ("q up", "kv up", "rope"),
    "permute": ("permute",),
    "experts": ("permute", "experts in", "activation"),
    "moe": ("router", "permute", "experts in", "experts out", "activation", "descend", "ascend", "shared in", "shared out"),
}


def again(work: Work, case: Case) -> tuple[list[Item], list[Send]]:
    """What is computed and sent again in the backward pass."""
    what = case.recompute
    if "full" in what:
        share, unread = case.recomputed, _unread(case)
        items = [item for item in work.forward if item.name != unread]
        items = [item._replace(flops=share * item.flops, bytes=share * item.bytes, launches=share * item.launches) for item in items]
        return items, [send._replace(size=share * send.size) for send in work.forward_sends]
    if "half_products" in what:
        kept = [item for item in work.forward if item.kind == PASS]
        halves = [item._replace(flops=item.flops / 2, bytes=item.bytes / 2) for item in work.forward if item.kind in (PRODUCT, GROUPED)]
        return kept + halves, [send for send in work.forward_sends if send.kind != "reduce_scatter"]
    if "selective" in what:
        return [item for item in work.forward if item.kind == PASS], list(work.forward_sends)
    names = {name for option in what for name in _NAMES.get(option, ())}
    sent = ("dispatch",) if {"permute", "experts"} & what else ("dispatch", "combine") if "moe" in what else ()
    return [item for item in work.forward if item.name in names], [send for send in work.forward_sends if send.name in sent]


def _unread(case: Case) -> str:
    """torch's checkpoint stops at the last tensor that the backward pass reads: not the last product's result, but for a norm."""
    return "ffn out" if case.habits.stops_early and case.model.norm.placement == "pre" else ""

"""The operators and collectives of feed-forward branches: dense networks, and mixtures of experts with their router and dispatch."""

from llmtrain.config.model import ModelConfig
from llmtrain.simulate.case import Case
from llmtrain.simulate.work import GROUPED, PASS, Item, Work


def network(work: Work, model: ModelConfig, case: Case, *, width: float, tp: int, rows: float, name: str = "ffn") -> None:
    """A dense feed-forward network of `width` that tp ranks share."""
    gated, inside, e = model.ffn.activation == "swiglu", width / tp, case.width
    work.product(f"{name} in", m=rows, n=inside * (2 if gated else 1), k=model.hidden, case=case)
    forward, backward = (3, 5) if gated else (2, 3)
    work.passes("activation", forward=forward * e * rows * inside, backward=backward * e * rows * inside, case=case)
    work.product(f"{name} out", m=rows, n=model.hidden, k=inside, case=case)


def experts(work: Work, model: ModelConfig, case: Case) -> None:
    """Router, dispatch, experts, combine."""
    ffn, e, own = model.ffn, case.width, case.rows / (case.tp if case.spread or case.etp == 1 else 1)
    gated, width = ffn.activation == "swiglu", ffn.descend or model.hidden
    work.forward.append(Item("router", PASS, bytes=own * (model.hidden * e * 2 + ffn.experts * 4 * 8), launches=14))
    work.inputs.append(Item("router", PASS, bytes=own * (model.hidden * e * 4 + ffn.experts * 4 * 10), launches=14, backward=True))
    if ffn.descend:
        work.product("descend", m=own, n=ffn.descend, k=model.hidden, case=case)
        work.product("ascend", m=own, n=model.hidden, k=ffn.descend, case=case)
    if ffn.shared_experts:
        network(work, model, case, width=ffn.shared_hidden, tp=1, rows=own, name="shared")
    rows = own * ffn.top_k * case.etp  # at the experts of a rank, on average
    local, inside = ffn.experts / case.ep, ffn.hidden / case.etp
    work.product("experts in", m=rows / local, n=inside * (2 if gated else 1), k=width, count=local, case=case, kind=GROUPED)
    forward, backward = (3, 5) if gated else (2, 3)
    work.passes("activation", forward=forward * e * rows * inside, backward=backward * e * rows * inside, case=case)
    work.product("experts out", m=rows / local, n=width, k=inside, count=local, case=case, kind=GROUPED)
    sorts = (2 if case.ep > 1 and local > 1 else 1) * 2  # before it is sent and at its expert, there and back
    moved = sorts * 2 * e * rows * width
    work.passes("permute", forward=moved, backward=moved, case=case, launches=8 * sorts)
    _dispatch(work, case, own=own, width=width)


def _dispatch(work: Work, case: Case, *, own: float, width: float) -> None:
    """Tokens to their experts and back."""
    ffn, e = case.model.ffn, case.width
    copies = ffn.top_k if case.habits.gathers_rows and case.ep > 1 else 1
    if case.etp > 1:
        gathered = own * width * e * copies
        work.send("experts gather", "all_gather", "tp", gathered, "tp", back="reduce_scatter")
        work.send("experts scatter", "reduce_scatter", "tp", gathered, "tp", back="all_gather")
    size = own * ffn.top_k * width * e * (case.etp if copies == 1 else 1)
    if case.ep == 1:
        return
    if case.hierarchical > 1:
        work.send("dispatch between nodes", "all_gather", "ep_outer", own * width * e, "ep", back="reduce_scatter")
        work.send("combine between nodes", "reduce_scatter", "ep_outer", own * width * e, "ep", back="all_gather")
        work.send("dispatch", "all_to_all", "ep_inner", size, "ep")
        work.send("combine", "all_to_all", "ep_inner", size, "ep")
        return
    kind = "once_per_node" if case.habits.sends_once else "all_to_all"
    work.send("dispatch", kind, "ep", size, "ep")
    work.send("combine", kind, "ep", size, "ep")

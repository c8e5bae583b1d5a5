"""Mistakes put between a wrapper and torch_npu, each of which some column has to catch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """A mistake in what `case` calls: `change(name, operator)` gives the operator to call instead."""

    name: str
    case: str
    change: Callable[[str, Callable], Callable]


def only(op: str, mistake: Callable[..., tuple[tuple, dict[str, Any]]]) -> Callable[[str, Callable], Callable]:
    """`mistake(*args, **kwargs)` gives the arguments that `op` gets instead."""

    def change(name: str, operator: Callable) -> Callable:
        if name != op:
            return operator

        def call(*args, **kwargs):
            args, kwargs = mistake(*args, **kwargs)
            return operator(*args, **kwargs)

        return call

    return change


def after(op: str, mistake: Callable[[Any], Any]) -> Callable[[str, Callable], Callable]:
    """`mistake(results)` gives what `op` returns instead."""

    def change(name: str, operator: Callable) -> Callable:
        return (lambda *args, **kwargs: mistake(operator(*args, **kwargs))) if name == op else operator

    return change


def keywords(op: str, **values: Any) -> Callable[[str, Callable], Callable]:
    """Keyword arguments replaced by values, by functions of what they were, or (None) left out."""

    def mistake(*args, **kwargs):
        for name, value in values.items():
            assert name in kwargs, f"{op} is not called with {name}"
            if value is None:
                del kwargs[name]
            else:
                kwargs[name] = value(kwargs[name]) if callable(value) else value
        return args, kwargs

    return only(op, mistake)


def renamed(op: str, **names: str) -> Callable[[str, Callable], Callable]:
    return only(op, lambda *args, **kwargs: (args, {names.get(name, name): value for name, value in kwargs.items()}))


def positional(op: str, place: int, value: Callable[..., Any]) -> Callable[[str, Callable], Callable]:
    """One positional argument replaced by a function of all of them."""
    return only(op, lambda *args, **kwargs: ((*args[:place], value(*args), *args[place + 1 :]), kwargs))


def swapped(*places: int) -> Callable[[Any], Any]:
    def swap(results):
        results = list(results)
        results[places[0]], results[places[1]] = results[places[1]], results[places[0]]
        return tuple(results)

    return swap


FA, GRAD, GMM = "npu_fusion_attention", "npu_fusion_attention_grad", "npu_grouped_matmul"


def both_lengths(change: Callable[[list[int]], list[int]]) -> dict[str, Callable]:
    return {"actual_seq_qlen": change, "actual_seq_kvlen": change}


MUTATIONS = [
    Mutation("pre_tokens in the place of pre_tockens", "attention-window", renamed(FA, pre_tockens="pre_tokens")),
    Mutation("scale_value in the place of scale", "attention-causal", renamed(FA, scale="scale_value")),
    Mutation("head_num: that of key heads", "attention-causal", positional(FA, 3, lambda q, k, *_: k.shape[1])),
    Mutation("head_num: that of key heads, packed", "attention-documents", positional(FA, 3, lambda q, k, *_: k.shape[1])),
    Mutation("BSND in the place of BNSD", "attention-causal", positional(FA, 4, lambda *_: "BSND")),
    Mutation("lengths with a leading 0", "attention-documents", keywords(FA, **both_lengths(lambda ends: [0, *ends]))),
    Mutation(
        "lengths that are not running sums",
        "attention-documents",
        keywords(FA, **both_lengths(lambda ends: [b - a for a, b in zip([0, *ends], ends)])),
    ),
    Mutation("no lengths", "attention-documents", keywords(FA, actual_seq_qlen=None, actual_seq_kvlen=None)),
    Mutation("one document of all", "attention-documents", keywords(FA, **both_lengths(lambda ends: ends[-1:]))),
    Mutation("mask of the other polarity", "attention-causal", keywords(FA, atten_mask=lambda mask: ~mask)),
    Mutation("no mask", "attention-causal", keywords(FA, atten_mask=None)),
    Mutation("no mask, packed", "attention-documents", keywords(FA, atten_mask=None)),
    Mutation("no sparse mode", "attention-causal", keywords(FA, sparse_mode=None)),
    Mutation("sparse mode that does not exist", "attention-causal", keywords(FA, sparse_mode=9)),
    Mutation("triangle from the upper left", "attention-cache", keywords(FA, sparse_mode=2)),
    Mutation("distances of the band swapped", "attention-window", renamed(FA, pre_tockens="next_tockens", next_tockens="pre_tockens")),
    Mutation("window one too long", "attention-window", keywords(FA, pre_tockens=lambda n: n + 1)),
    Mutation("no scale", "attention-causal", keywords(FA, scale=None)),
    Mutation("keys and values swapped", "attention-causal", only(FA, lambda q, k, v, *rest, **kw: ((q, v, k, *rest), kw))),
    Mutation("maximum and sum swapped", "attention-lse", after(FA, swapped(1, 2))),
    Mutation("statistics in the default order", "attention-documents-lse", keywords(FA, softmax_layout=None)),
    Mutation("no mask in a part", "attention_part-causal", keywords(FA, atten_mask=None)),
    Mutation("no scale in the gradient", "attention_part_backward-causal", keywords(GRAD, scale_value=None)),
    Mutation(
        "maximum and sum swapped in the gradient",
        "attention_part_backward-causal",
        renamed(GRAD, softmax_max="softmax_sum", softmax_sum="softmax_max"),
    ),
    Mutation("gradients of keys and values swapped", "attention_part_backward-full", after(GRAD, swapped(1, 2))),
    Mutation("no mask in the gradient", "attention_part_backward-causal", keywords(GRAD, atten_mask=None)),
    Mutation("epsilon left out", "rms_norm", only("npu_rms_norm", lambda x, weight, eps: ((x, weight), {}))),
    Mutation("eps in the place of epsilon", "rms_norm", only("npu_rms_norm", lambda x, weight, eps: ((x, weight), {"eps": eps}))),
    Mutation("1 / rms in the place of the sum", "add_rms_norm", after("npu_add_rms_norm", swapped(1, 2))),
    Mutation("norm and sum swapped", "add_rms_norm", after("npu_add_rms_norm", swapped(0, 2))),
    Mutation("another tensor in the place of the sum", "add_rms_norm", positional("npu_rms_norm_backward", 1, lambda dy, x, *_: x + 1)),
    Mutation("pairs rotated, not halves", "rope", positional("npu_rotary_mul", 3, lambda *_: "interleave")),
    Mutation("rotated backwards", "rope", positional("npu_rotary_mul", 2, lambda x, cos, sin, _: -sin)),
    Mutation("cos and sin swapped", "rope", only("npu_rotary_mul", lambda x, cos, sin, mode: ((x, sin, cos, mode), {}))),
    Mutation("up before gate", "swiglu", positional("npu_swiglu", 0, lambda x, _: x.roll(x.shape[-1] // 2, -1))),
    Mutation("halves of another dim", "swiglu", positional("npu_swiglu", 1, lambda *_: 0)),
    Mutation("mean of the losses", "cross_entropy", positional("npu_cross_entropy_loss", 3, lambda *_: "mean")),
    Mutation(
        "-100 as a target",
        "cross_entropy",
        positional("npu_cross_entropy_loss", 1, lambda _, target, *__: target * 0 - 100),
    ),
    Mutation(
        "probabilities in the place of their logarithms",
        "cross_entropy",
        positional("npu_cross_entropy_loss_backward", 1, lambda _, log_probs, *__: log_probs.exp()),
    ),
    Mutation("sizes read as running sums", "grouped_mm", keywords(GMM, group_list_type=0)),
    Mutation("weight not transposed for the gradient", "grouped_mm", only(GMM, lambda x, w, **kw: ((x, [untransposed(w[0])]), kw))),
    Mutation("no group_type", "grouped_mm", keywords(GMM, group_type=None)),
    Mutation("rows as groups of the weight's gradient", "grouped_mm", keywords(GMM, group_type=0)),
    Mutation("split_item that does not exist", "grouped_mm", keywords(GMM, split_item=9)),
    Mutation("a flat list of experts", "permute", positional("npu_moe_token_permute", 1, lambda _, ids: ids.flatten()[: len(ids)])),
    Mutation("places read as the order", "permute", after("npu_moe_token_permute", lambda r: (r[0], r[1].argsort().int()))),
    Mutation("the order read as places", "unpermute", positional("npu_moe_token_unpermute", 1, lambda _, at, __: at.argsort().int())),
    Mutation("no probabilities", "unpermute", only("npu_moe_token_unpermute", lambda rows, places, _: ((rows, places), {}))),
    Mutation("k of another call", "gating", positional("npu_moe_gating_top_k_softmax", 2, lambda *_: 1)),
]


def untransposed(weight):
    """The stack of matrices as it was before it was transposed."""
    return weight if weight.is_contiguous() else weight.transpose(1, 2)

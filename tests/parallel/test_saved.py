"""Activations that are computed again or wait on the host: the same gradients bit for bit, and the bytes that each option says it frees."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from held import PANGU, Held, build_model, kept
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.compat import memory_of
from llmtrain.config.run import RunConfig
from llmtrain.device.host_copies import Copy, HostCopies
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.model.moe import MoE
from llmtrain.ops import Mask
from llmtrain.parallel.cast import apply_cast
from llmtrain.parallel.check import check_parallel
from llmtrain.parallel.offload import apply_offload
from llmtrain.parallel.recompute import MODULES, apply_recompute

EVERY = list(MODULES)
SMALL = {"vocab_size": 61, "layers": 3, "hidden": 32, "max_seq_len": 48, "norm": {"placement": "sandwich"}, "init": {"std": 0.2}}
MODELS = {
    "dense": SMALL | {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": True}, "ffn": {"hidden": 40}},
    "gpt": SMALL
    | {
        "attention": {"heads": 4, "qkv_bias": True},
        "ffn": {"hidden": 40, "activation": "gelu", "bias": True},
        "norm": {"kind": "layer_norm"},
        "position": {"kind": "learned"},
    },
    "latent": SMALL
    | {
        "attention": {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6},
        "ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "shared_experts": 1},
        "mtp": {"heads": 1},
    },
    "dropping": SMALL
    | {
        "attention": {"kind": "mla", "heads": 4, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6, "softmax_scale": 0.5},
        "ffn": {
            "kind": "moe",
            "experts": 4,
            "top_k": 2,
            "hidden": 16,
            "descend": 8,
            "activation": "gelu",
            "bias": True,
            "capacity": {"factor": 0.5},
        },
    },
}
INPUTS = ["block_input", "attention_input", "ffn_input"]
CASES = [
    *(("dense", what, ()) for what in (["norms"], ["activation"], ["norms", "activation"])),
    *(("gpt", what, ()) for what in (["norms"], ["activation"])),
    *(("latent", [name], ()) for name in EVERY),
    *((model, EVERY, ()) for model in ("latent", "dropping")),
    ("dense", "none", INPUTS),
    ("dense", "full", ["block_input"]),
    *((model, "none", [*INPUTS, "expert_output"]) for model in ("latent", "dropping")),
    *((model, EVERY, ["block_input", "expert_output"]) for model in ("latent", "dropping")),
]


def gradients(model, times: int = 1) -> dict[str, torch.Tensor]:
    """Of all parameters, after so many backward passes over one forward pass, with documents and heads that look ahead."""
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
    following, after = tokens.roll(-1, 1), tokens.roll(-2, 1)
    ahead = {"ahead": [(following, after)]} if model.mtp is not None else {}
    out = model(tokens, mask=Mask(documents=((10, 14), (24,))), targets=following, **ahead)
    loss = out["ce_sum"] + (out["mtp_weight"] * out["mtp_ce_sum"] if ahead else 0)
    for time in range(times):
        loss.backward(retain_graph=time < times - 1)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def spared(name: str, what="none", offload=(), *, dtype=torch.float64, copies: HostCopies | None = None):
    model = build_model(MODELS[name], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype.itemsize == 2:
        apply_cast(model, dtype)
    apply_recompute(model, what)
    apply_offload(model, offload, copies or HostCopies())
    return model


@pytest.mark.parametrize(("name", "what", "offload"), CASES, ids=str)
def test_gradients_are_those_of_a_model_that_keeps_everything(name, what, offload):
    model, alone = spared(name, what, offload), spared(name)
    assert list(dict(model.named_parameters())) == list(dict(alone.named_parameters()))
    found, expected = gradients(model), gradients(alone)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())


@pytest.mark.parametrize("name", ["dense", "latent"])
def test_casts_are_those_of_the_forward_pass(name):
    what = EVERY if name == "latent" else ["norms", "activation"]
    found, expected = (gradients(spared(name, how, dtype=torch.bfloat16)) for how in (what, "none"))
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


def test_a_second_backward_pass_finds_everything_again():
    once, twice = (gradients(spared("latent", EVERY, ["block_input", "expert_output"]), times) for times in (1, 2))
    assert all(torch.equal(twice[name], 2 * gradient) for name, gradient in once.items())


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("what", "again"),
    [
        (["activation"], {"aten::silu": 2}),  # of the experts, and of the shared one
        (["norms"], {"aten::linalg_vector_norm": 4}),  # of both branches and both narrow vectors: post norms give what nothing keeps
        (["permute"], {"aten::bincount": 1}),
        (["mla_up"], {"llmtrain::tiled_attention": 0, "aten::mm": 2}),
    ],
    ids=str,
)
def test_each_module_is_computed_once_more_and_nothing_else(what, again):
    counts = []
    for how in ("none", what):
        model = spared("latent", how)
        with Calls() as calls:
            gradients(model)
        counts.append(calls.found)
    blocks = 3 + 1  # that of the head too
    watched = ("aten::silu", "aten::linalg_vector_norm", "aten::bincount", "llmtrain::tiled_attention", "aten::mm", "aten::argsort.stable")
    assert {name: counts[1][name] - counts[0][name] for name in again} == {name: blocks * times for name, times in again.items()}
    assert all(counts[1][name] == counts[0][name] for name in watched if name not in again and not (what == ["permute"] and "sort" in name))
    assert counts[0]["llmtrain::tiled_attention"] == blocks


def test_without_gradients_everything_is_as_ever():
    model = spared("latent", EVERY, ["block_input", "expert_output"])
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        found, expected = (m(tokens, mask=Mask())["logits"] for m in (model, spared("latent")))
    assert torch.equal(found, expected) and not model.saving.on


# --- bytes ------------------------------------------------------------------------------------------------------------------------------

D, H, NOPE, ROPE, V, Q, KV, K, F = 256, 4, 128, 64, 128, 48, 16, 8, 64  # of PANGU
FREED = {
    "norms": 2 * D + Q + KV,
    "activation": 2 * (K + 1) * F,  # silu(gate), and its product with up
    "mla_up": 2 * H * (NOPE + ROPE) + H * (NOPE + V),
    "permute": K * D,
    "block_input": D,
    "attention_input": D,
    "ffn_input": D,
    "expert_output": K * D,
}
PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
TABLE = {
    "nothing": {},
    **{f"`recompute: [{name}]`": {"recompute": [name]} for name in EVERY},
    "all four": {"recompute": EVERY},
    **{f"`offload: [{name}]`": {"offload": [name]} for name in (*INPUTS, "expert_output")},
    "all four, `offload: [block_input, expert_output]`": {"recompute": EVERY, "offload": ["block_input", "expert_output"]},
    "`recompute: selective`": {"recompute": "selective"},
    "`recompute: full`": {"recompute": "full"},
    "`recompute: full`, `offload: [block_input]`": {"recompute": "full", "offload": ["block_input"]},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return {name: kept(PANGU, **options) for name, options in TABLE.items()}


@pytest.mark.parametrize("option", FREED)
def test_an_option_frees_what_it_says_and_nothing_else(measured, option):
    kind = "offload" if "put" in option else "recompute"
    assert measured["nothing"] - measured[f"`{kind}: [{option}]`"] == 4 * FREED[option]


def test_options_add_up(measured):
    assert measured["nothing"] - measured["all four"] == 4 * sum(FREED[name] for name in EVERY)
    both = measured["all four, `offload: [block_input, expert_output]`"]
    assert measured["all four"] - both == 4 * (FREED["block_input"] + FREED["expert_output"])
    assert measured["`recompute: full`"] == 4 * D and measured["`recompute: full`, `offload: [block_input]`"] == 0


def test_kernels_forms_of_queries_keys_and_values_go_too():
    """SDPA saves values padded to the width of keys instead of those that it was given."""
    everything, less = (kept(PANGU, recompute=what, kernels={"attention": "sdpa"}) for what in ("none", ["mla_up"]))
    assert everything - less == 4 * 3 * H * (NOPE + ROPE)


def test_the_page_has_what_was_measured(measured):
    rows = {name: f"| {name} | {size:,.0f} | {size / measured['nothing']:.0%} |" for name, size in measured.items()}
    missing = [row for row in rows.values() if row not in re.sub(r" +", " ", PAGE.read_text())]
    assert not missing, "docs/memory.md should say:\n" + "\n".join(missing)


# --- the host ---------------------------------------------------------------------------------------------------------------------------


class Followed(HostCopies):
    """A device apart from the host: what it is asked to copy, in order, and what it holds of that."""

    def __init__(self):
        self.events: list[tuple[str, int]] = []
        self.there: dict = {}
        self.held: dict = {}
        self.peak = 0

    def _copy(self, tensor, into):
        copy = super()._copy(tensor, into)
        leaves = memory_of(tensor) not in self.there
        if leaves:
            self.there[memory_of(into)] = len(self.there)
        number = self.there[memory_of(into if leaves else tensor)]
        self.events.append(("out" if leaves else "back", number))
        self.held[memory_of(tensor if leaves else into)] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for key, size in self.held.items() if not key.expired()))
        return copy if leaves else Noted(copy, lambda: self.events.append(("needed", number)))


class Noted(Copy):
    def __init__(self, copy, note):
        self.__dict__.update(copy.__dict__)
        self.note = note

    def wait(self):
        self.note()
        return super().wait()


LAYERS = 6


def followed(offload, what="none") -> Followed:
    copies = Followed()
    model = build_model(MODELS["dense"] | {"layers": LAYERS}, dtype=torch.float64)
    apply_recompute(model, what)
    apply_offload(model, offload, copies)
    gradients(model)
    return copies


@pytest.mark.parametrize("what", ["none", "full", ["norms"]], ids=str)
def test_a_block_is_fetched_while_the_one_after_it_works(what):
    copies = followed(["block_input"], what)
    assert copies.events[:LAYERS] == [("out", block) for block in range(LAYERS)]
    # The last two are still there. Every other one is asked for before the one after it is needed.
    expected = [("back", 3)]
    for block in (3, 2, 1, 0):
        expected += [("back", block - 1)] * (block > 0) + [("needed", block)]
    assert copies.events[LAYERS:] == expected


def test_the_device_holds_two_blocks_of_what_is_away():
    copies = followed(INPUTS)
    block = 3 * 2 * 24 * 32 * 8
    assert 2 * block <= copies.peak < 3 * block and len(copies.there) == 3 * LAYERS


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_stays_behind(backward):
    """Also where nobody collects garbage, or takes anything back."""
    left = []
    for what, offload in (("none", ()), (EVERY, ["block_input", "expert_output"])):
        copies = Followed()
        model = spared("dropping", what, offload, copies=copies)
        with Held(*model.parameters()) as held:
            logits = model(torch.arange(24)[None], mask=Mask())["logits"]
            if backward:
                logits.sum().backward()
                model.zero_grad()
            del logits
        left.append(held.bytes())
    assert left[0] == left[1] < 1000 and all(key.expired() for key in copies.held)


def test_a_layer_without_a_dispatcher_is_refused():
    for apply in (lambda m: apply_recompute(m, ["permute"]), lambda m: apply_offload(m, ["expert_output"], HostCopies())):
        model = build_model(MODELS["latent"], dtype=torch.float64)
        next(module for module in model.modules() if isinstance(module, MoE)).routed = lambda *given, meanwhile=None: None
        with pytest.raises(UserError, match=r"train\.(recompute permute|offload expert_output): function has no dispatcher of its own"):
            apply(model)


def test_selective_is_refused_where_a_backward_pass_comes_in_halves():
    cfg = RunConfig.model_validate(
        {
            "model": {"layers": 4, "vocab_size": 61},
            "train": {"steps": 1, "recompute": "selective"},
            "parallel": {"pp": 2, "schedule": "zero_bubble"},
        }
    )
    shape, plan = MeshShape.from_config(cfg.parallel), StepPlan.from_config(cfg)
    with pytest.raises(UserError, match=r"train\.recompute selective: .* one backward pass, which parallel\.schedule zero_bubble makes"):
        check_parallel(cfg, shape, plan, device="cpu")
    named = cfg.model_copy(update={"train": cfg.train.model_copy(update={"recompute": ["norms"]})})
    check_parallel(named, shape, plan, device="cpu")

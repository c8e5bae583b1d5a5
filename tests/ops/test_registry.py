"""The contract of the op registry."""

import pytest
import torch

from llmtrain.ops import Call, KernelUnavailable, choose, implementations, op_names, register, resolve
from llmtrain.ops.registry import unregister

CPU = Call(device="cpu", dtype=torch.float32)


@pytest.fixture
def toy():
    """An op with a slow reference and a picky fast implementation."""
    register("toy", "reference", speed=0)(lambda x: x)
    register("toy", "fast", speed=5, dtypes=(torch.float32,), supports=lambda call: "wants heads" if call.heads is None else None)(
        lambda x: x + 1
    )
    yield
    for name in ("reference", "fast"):
        unregister("toy", name)


def test_auto_takes_the_fastest_that_serves_and_says_why_not(toy):
    choice = choose("toy", CPU)
    assert (choice.name, choice.rejected) == ("reference", {"fast": "wants heads"})
    assert choose("toy", Call(device="cpu", dtype=torch.float32, heads=2)).name == "fast"


def test_a_named_one_that_cannot_serve_raises_and_names_the_option(toy):
    with pytest.raises(KernelUnavailable, match=r"kernels\.toy=fast: fast wants heads; serving this call: auto, reference"):
        resolve({"toy": "fast"}, CPU)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [({"toi": "fast"}, r"kernels\.toi: no such op, did you mean toy\?"), ({"toy": "fsat"}, r"kernels\.toy=fsat: .*did you mean fast\?")],
)
def test_unknown_names_get_a_suggestion(toy, kernels, message):
    with pytest.raises(KernelUnavailable, match=message):
        resolve(kernels, CPU)


def test_resolve_serves_every_op_and_a_plugin_op(toy):
    ops = resolve({"toy": "reference"}, CPU)
    assert set(ops.choices) == set(op_names())
    assert ops.toy(3) == 3 and ops.choices["toy"].reason == "named in the configuration"
    with pytest.raises(AttributeError, match="no op 'nothing'"):
        _ = ops.nothing


def test_a_pair_registers_once(toy):
    with pytest.raises(ValueError, match="registered already"):
        register("toy", "fast", speed=1)(lambda x: x)


def test_the_probe_is_asked_once():
    asked = []
    register("toy", "probed", speed=0, probe=lambda: asked.append(1) or "no library")(lambda x: x)
    try:
        for _ in range(2):
            with pytest.raises(KernelUnavailable, match="nothing serves float32 on cpu: probed no library"):
                choose("toy", CPU)
    finally:
        unregister("toy", "probed")
    assert len(asked) == 1


@pytest.mark.parametrize(("facts", "reason"), [({"backward": True}, "has no backward"), ({"deterministic": True}, "not deterministic")])
def test_limits_on_backward_and_determinism(facts, reason):
    register("toy", "limited", speed=0, backward=False, deterministic="deterministic" not in facts)(lambda x: x)
    try:
        assert choose("toy", Call(device="cpu", dtype=torch.float32, backward=False)).name == "limited"
        with pytest.raises(KernelUnavailable, match=reason):
            choose("toy", Call(**{"device": "cpu", "dtype": torch.float32, "backward": False, **facts}))
    finally:
        unregister("toy", "limited")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_everything_has_an_implementation_on_the_cpu(dtype):
    for extra in ({}, {"return_lse": True}, {"documents": True, "window": 4, "offsets": True}):
        resolve({}, Call(device="cpu", dtype=dtype, parameter_dtype=torch.float32, **extra))


@pytest.mark.parametrize("op", op_names())
def test_the_slowest_implementation_serves_fp64_on_every_device(op):
    reference = next(entry for entry in implementations(op) if entry.speed == 0)
    for device in ("cpu", "cuda", "npu"):
        assert reference.refusal(Call(device=device, dtype=torch.float64)) is None


def test_lse_and_volta_bf16_fall_to_the_reference_with_reasons():
    assert choose("attention", Call(device="cpu", dtype=torch.float32, return_lse=True)).rejected["sdpa"] == "returns no log-sum-exp"
    volta = choose("attention", Call(device="cuda", dtype=torch.bfloat16, capability=(7, 0)))
    assert volta.name == "reference" and "7.0" in volta.rejected["sdpa"]


def test_the_optimizer_is_chosen_by_the_parameters_dtype():
    register("adamw", "wide", speed=9, dtypes=(torch.float64,))(lambda groups, **_: None)
    try:
        assert choose("adamw", Call(device="cpu", dtype=torch.bfloat16, parameter_dtype=torch.float64)).name == "wide"
        assert choose("adamw", Call(device="cpu", dtype=torch.float64, parameter_dtype=torch.float32)).name == "fused"
    finally:
        unregister("adamw", "wide")

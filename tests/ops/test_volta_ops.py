"""When the Volta kernels are chosen."""

from dataclasses import replace

import pytest
import torch

from llmtrain.ops import Call, KernelUnavailable, choose, registry, volta_attention


@pytest.fixture(autouse=True)
def with_nvrtc(monkeypatch):
    """As on a machine that can compile for sm_70."""
    entries = registry._REGISTRY["attention"]
    monkeypatch.setitem(entries, "fast_volta", replace(entries["fast_volta"], probe=lambda: None))


def call(**facts):
    return Call(**{"device": "cuda", "dtype": torch.float16, "capability": (7, 0), "head_dim": 128, "value_head_dim": 128} | facts)


def test_it_serves_on_volta_when_named_and_auto_waits_for_a_measurement():
    for facts in ({}, {"return_lse": True, "deterministic": True}):
        assert choose("attention", call(**facts), "fast_volta").name == "fast_volta"
        assert not choose("attention", call(**facts)).name.startswith("fast_volta")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"capability": (9, 0)}, "compute capability 7.0, not 9.0; fast_volta_check"),
        ({"dtype": torch.bfloat16}, "serves float16, not bfloat16"),
        ({"head_dim": 192}, "head dims up to 128, not 192"),
        ({"device": "cpu", "capability": None}, "runs on cuda, not on cpu"),
    ],
)
def test_its_refusals(facts, message):
    with pytest.raises(KernelUnavailable, match=message):
        choose("attention", call(**facts), "fast_volta")


def test_the_check_is_never_chosen_and_has_to_be_switched_on(monkeypatch):
    cpu = call(device="cpu", capability=None)
    with pytest.raises(KernelUnavailable, match=f"set {volta_attention.SWITCH}=1"):
        choose("attention", cpu, "fast_volta_check")
    assert choose("attention", cpu).name != "fast_volta_check"

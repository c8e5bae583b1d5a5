"""The stand-in itself: what is real in it, and that it cannot stay silent about what it lacks."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_npu", reason="all of tests/npu: torch_npu is not in this environment, `make test-npu` has one")

import npu_table
import stand_in

stand_in.start()

import torch  # noqa: E402

SUPPORT = Path(__file__).parent / "support"


def test_an_op_without_a_formula_raises():
    x = torch.ones(2, 4, 8, 8).npu()
    with pytest.raises(NotImplementedError, match="npu::npu_prompt_flash_attention has no formula"):
        torch.ops.npu.npu_prompt_flash_attention(x, x, x)


def test_calls_are_counted():
    before = stand_in.calls["npu_rms_norm"]
    torch.ops.npu.npu_rms_norm(torch.ones(2, 8).npu(), torch.ones(8).npu())
    assert stand_in.calls["npu_rms_norm"] == before + 1


def test_a_process_keeps_its_kind_of_stand_in():
    with pytest.raises(RuntimeError, match=r"\(True, True\) in this process; \(False, True\) needs another one"):
        stand_in.start(kernels=False)


def test_training_gives_the_cpus_numbers():
    def losses(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        x, found = torch.linspace(-1, 1, 40).view(5, 8).to(device), []
        for _ in range(4):
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses("npu") == losses("cpu")


def test_views_resizes_and_strides():
    x = torch.arange(24.0).view(4, 6)
    n = x.npu()
    n[1:, ::2].mul_(10)
    x[1:, ::2].mul_(10)
    assert n.cpu().device.type == "cpu" and n.cpu().double().numpy().sum() == x.sum()
    assert torch.equal(n.cpu(), x) and torch.equal(n.t()[2].cpu(), x.t()[2])
    out = torch.empty(0, device="npu")
    torch.mm(n, n.t(), out=out)
    assert torch.equal(out.cpu(), x @ x.t())
    assert torch.equal(torch.nonzero(n > 9).cpu(), torch.nonzero(x > 9))


def test_without_kernels_the_real_checks_refuse_and_nothing_computes():
    code = """
import stand_in
stand_in.start(kernels=False)
import torch, torch_npu
q = torch.empty(2, 8, 128, 64, device="npu", dtype=torch.bfloat16)
print(torch_npu.npu_fusion_attention(q, q, q, 8, "BNSD")[0].shape)
try:
    torch_npu.npu_fusion_attention(q, q, q, 8, "BNSD", sparse_mode=9)
except RuntimeError as error:
    print("refused:", error)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=SUPPORT, capture_output=True, text=True, timeout=300)
    assert "torch.Size([2, 8, 128, 64])" in ran.stdout and "refused:" in ran.stdout and "sparse_mode" in ran.stdout, ran.stdout + ran.stderr


def test_the_page_of_checks_is_up_to_date(request):
    if request.config.getoption("--write-table") or not _whole_tier(request):
        pytest.skip("only a run of the whole tier knows all checks")
    cells = {tuple(mark.args) for item in request.session.items for mark in item.iter_markers("npu_check")}
    assert npu_table.section(npu_table.NAME) == npu_table.render(cells), "`make test-npu ARGS=--write-table` writes docs/npu-checks.md"


def _whole_tier(request) -> bool:
    here = Path(__file__).parent
    files = {item.path for item in request.session.items}
    option = request.config.getoption
    return files >= set(here.rglob("test_*.py")) and not option("keyword") and not option("markexpr")

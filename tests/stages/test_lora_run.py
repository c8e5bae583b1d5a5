"""A run that trains adapters on two ranks: what its checkpoints hold, how it resumes, what PEFT and transformers make of its results."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_tokenizer import byte_level
from hf_models import make, save
from safetensors.torch import load_file
from worlds import run_world

from llmtrain.config.run import RunConfig
from llmtrain.convert.adapters import is_adapter
from llmtrain.convert.import_hf import model_config, read_weights
from llmtrain.errors import UserError
from llmtrain.ops import Mask
from llmtrain.stages import pretrain, sft
from llmtrain.stages.pretrained import check_base
from llmtrain.tools import convert
from llmtrain.tools.model_source import open_source
from llmtrain.tools.open_model import open_model
from llmtrain.train import checkpoint_state

pytestmark = pytest.mark.xdist_group("lora")
TUNE = """
device: cpu
model: {pretrained: base}
lora: {rank: 4}
data: {train: [{path: facts.jsonl, template: plain}]}
optim: {lr: 5e-3}
train: {steps: 6, seq_len: 32, global_batch: 4, micro_batch: 1}
parallel: {dp_shard: 2}
checkpoint: {every: 3, keep_last: 5, export: hf}
"""
TOKENS = torch.arange(4, 44).view(2, 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, and two runs: one whole, one that goes on from the half of the other's checkpoints."""
    pytest.importorskip("transformers", reason="it makes the model")
    place = tmp_path_factory.mktemp("lora")
    save(make("llama", {"vocab_size": 400, "tie_word_embeddings": True}), place / "base")
    byte_level(place / "base")
    facts = [{"prompt": f"What is {a} + {b}? ", "response": f"It is {a + b}."} for a in range(1, 5) for b in range(1, 4)]
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    (place / "tune.yaml").write_text(TUNE)

    def tune(name: str) -> None:
        words = {"folder": str(place), "config": "tune.yaml", "name": name}
        assert run_world("sft_world:tune", 2, args=words, folder=tmp_path_factory.mktemp(name)) == 0

    tune("whole")
    shutil.copytree(place / "runs/whole", place / "runs/again", symlinks=True)
    shutil.rmtree(place / "runs/again/checkpoints/step-00000006")
    shutil.rmtree(place / "runs/again/hf")
    tune("again")
    return place


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def logits_of(folder) -> torch.Tensor:
    with torch.no_grad():
        return open_model(folder, device="cpu").model(TOKENS, mask=Mask())["logits"]


def test_it_learns_and_resumes_bit_for_bit(here):
    found = losses(here / "runs/whole")
    assert len(found) == 6 and found[-1] < found[0] - 0.1
    assert losses(here / "runs/again") == found
    one, two = (load_file(here / f"runs/{run}/hf/adapter_model.safetensors") for run in ("whole", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_checkpoints_hold_the_model_as_it_was_and_moments_of_adapters_alone(here):
    stored = checkpoint_state.read_metadata(here / "runs/whole/checkpoints/step-00000006").state_dict_metadata
    moments = {name.removesuffix(".exp_avg") for name in stored if name.endswith(".exp_avg")}
    assert moments == {name.removesuffix(".weight") for name in stored if is_adapter(name.removesuffix(".weight"))}
    assert len(moments) == 2 * 2 * 7
    with open_source("runs/whole") as source:
        for name, tensor in read_weights("base", model_config("base")):
            assert torch.equal(source.adapters.read(name), tensor), name


def test_peft_and_our_tools_read_the_run_alike(here):
    peft = pytest.importorskip("peft", reason="it is what the folder is for")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained("base")
    AutoTokenizer.from_pretrained("runs/whole/hf")
    with torch.no_grad():
        plain = base(TOKENS).logits
        expected = peft.PeftModel.from_pretrained(base, "runs/whole/hf")(TOKENS).logits
    found = logits_of("runs/whole")
    assert (expected - plain).abs().max() > 0.05
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_converted_alone_and_merged(here, capsys):
    convert.main(["runs/whole", "alone", "--to", "hf"])
    assert f"{2 * 4 * (2 * 64 + 2 * 48 + 3 * 80):,} parameters of runs/whole" in capsys.readouterr().out
    one, two = (load_file(here / f"{folder}/adapter_model.safetensors") for folder in ("runs/whole/hf", "alone"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (here / "alone/adapter_config.json").read_text() == (here / "runs/whole/hf/adapter_config.json").read_text()
    convert.main(["runs/whole", "merged", "--to", "hf", "--merge", "--verify"])
    expected = logits_of("runs/whole")
    assert (logits_of("merged") - expected).abs().max() < 1e-5 * expected.abs().max()
    for words, said in (
        (["runs/whole", "x", "--to", "native"], "--to native takes a whole model: give --merge too"),
        (["runs/whole", "x", "--to", "hf", "--verify"], "--verify takes a whole model"),
        (["base", "x", "--to", "native", "--merge"], "holds no adapters"),
    ):
        with pytest.raises(UserError, match=said):
            convert.main(words)


def test_dry_run_counts_what_is_trained(here, capsys):
    assert pretrain.main(["-c", "tune.yaml", "--dry-run"], verb="sft") == 0
    out = capsys.readouterr().out
    assert "adapters, which are trained" in out and f"{2 * 4 * (2 * 64 + 2 * 48 + 3 * 80):>18,}" in out
    assert "not with adapters (lora.rank 4)" in out and "one step of a 2-layer miniature" in out


def test_defaults_and_what_is_refused(here):
    given = {"model": {"pretrained": "base"}, "train": {"steps": 100}, "lora": {"rank": 4}}
    assert sft.settled(RunConfig.load(given)).optim.lr == 2e-4
    with pytest.raises(UserError, match="an adapter alone; give the run that trained it"):
        open_model("runs/whole/hf")
    with pytest.raises(UserError, match=r"give model\.pretrained"):
        check_base(RunConfig.load({"model": {"vocab_size": 9}, "lora": {"rank": 4}}))

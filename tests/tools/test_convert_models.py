"""`llmtrain convert` as it is called: Hugging Face, GGUF and run folders into each other, whole or not at all."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from hf_models import make, save, tokens
from safetensors.torch import load_file, save_file
from tiny_gguf import write as write_gguf

from llmtrain import cli
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.tools import convert, verify_model
from llmtrain.tools.model_source import open_source
from llmtrain.tools.open_model import open_model

transformers = pytest.importorskip("transformers", reason="conversions are checked against transformers")


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main(["convert", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def tokenizer_file(folder):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a")).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A Qwen3 with tokenizer, chat template and generation settings."""
    folder = save(make("qwen3", {"head_dim": 16, "num_hidden_layers": 3}), tmp_path_factory.mktemp("source") / "hf", shard="20KB")
    tokenizer_file(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.6}')
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_to_native_and_back(hf, tmp_path, capsys):
    code, out, err = run(capsys, hf, tmp_path / "run", "--to", "native", "--verify")
    assert code == 0, err
    assert "parameters of" in out and "verify: logits differ by at most" in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "tokenizer", "checkpoints", "latest"} and {p.name for p in tmp_path.iterdir()} == {"run"}
    cfg = RunConfig.model_validate(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    assert cfg.model.layers == 3 and cfg.tokenizer.path == str(tmp_path / "run/tokenizer")
    code, out, err = run(capsys, tmp_path / "run", tmp_path / "back", "--to", "hf", "--verify", "--shard-size", "20KB")
    assert code == 0, err
    assert equal(weights(tmp_path / "back"), weights(hf))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes(), name
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == [0, 5]


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_to_native_and_back(family, dtype, tmp_path, capsys):
    """What is rounded is rounded once; biases of routers never are."""
    source = save(make(family, {}), tmp_path / "hf", shard="20KB")
    words = ["--dtype", dtype] if dtype else []
    for here, there, to in ((source, tmp_path / "run", "native"), (tmp_path / "run", tmp_path / "back", "hf")):
        code, out, err = run(capsys, here, there, "--to", to, "--verify", *words)
        assert code == 0 and "verify: logits differ by at most" in out, err
    expected = weights(source)
    biases = [name for name in expected if name.endswith("e_score_correction_bias")]
    assert len(biases) == (family == "deepseek_v3")
    rounded = {n: tensor if n in biases or dtype is None else tensor.bfloat16() for n, tensor in expected.items()}
    assert equal(weights(tmp_path / "back"), rounded)


def test_opened_in_16_bits_a_router_keeps_its_bias(tmp_path, capsys):
    folder = save(make("deepseek_v3", {}), tmp_path / "hf")
    run(capsys, folder, tmp_path / "run", "--to", "native")
    stored = weights(folder)["model.layers.1.mlp.gate.e_score_correction_bias"]
    for path in (folder, tmp_path / "run"):
        for name, dtype in (("bf16", torch.bfloat16), ("fp64", torch.float64)):
            router = open_model(path, device="cpu", dtype=name).model.blocks["1"].ffn.router
            assert router.weight.dtype == dtype and torch.equal(router.bias.double(), stored.double())


def test_heads_of_multi_token_prediction_are_left_out_and_said(tmp_path, capsys):
    folder = save(make("deepseek_v3", {"num_mtp_layers": 1}), tmp_path / "hf")
    held = load_file(folder / "model.safetensors")
    ahead = {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.2.mlp.gate.weight": torch.zeros(8, 32)}
    save_file(held | ahead, folder / "model.safetensors")
    code, _, err = run(capsys, folder, tmp_path / "out", "--to", "native")
    assert code == 0 and "layers 2, which predict further tokens (num_nextn_predict_layers), are left out" in err
    save_file(held | ahead | {"model.layers.3.eh_proj.weight": torch.zeros(32, 64)}, folder / "model.safetensors")
    code, _, err = run(capsys, folder, tmp_path / "no", "--to", "native")
    assert code == 1 and "not expected: model.layers.3.eh_proj.weight" in err


def test_a_moved_run_folder_keeps_its_tokenizer(hf, tmp_path, capsys):
    run(capsys, hf, tmp_path / "run", "--to", "native")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert load(None, ["--model.pretrained", str(tmp_path / "moved")]).run.tokenizer.path == str(tmp_path / "moved/tokenizer")
    assert run(capsys, tmp_path / "moved", tmp_path / "hf", "--to", "hf")[0] == 0
    assert (tmp_path / "hf/chat_template.jinja").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("to", ["native", "hf"])
def test_rounded_weights_are_compared_as_rounded(hf, tmp_path, capsys, to, dtype):
    code, out, err = run(capsys, hf, tmp_path / "out", "--to", to, "--dtype", dtype, "--verify")
    assert code == 0 and "verify:" in out, err
    with open_source(tmp_path / "out") as made, open_source(hf) as source:
        assert {tensor.dtype for _, tensor in made.weights()} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
        assert not torch.equal(made.tensors.read("head.weight").float(), source.tensors.read("head.weight"))


def test_a_wrong_conversion_is_noticed(hf, tmp_path, capsys, monkeypatch):
    whole = convert.export_hf

    def swapped(folder, cfg, tensors, **more):
        exchange = {"blocks.0.ffn.up_proj.weight": "blocks.0.ffn.gate_proj.weight"}
        exchange |= {b: a for a, b in exchange.items()}
        return whole(folder, cfg, ((exchange.get(name, name), tensor) for name, tensor in tensors), **more)

    monkeypatch.setattr(convert, "export_hf", swapped)
    code, out, err = run(capsys, hf, tmp_path / "out", "--to", "hf", "--verify")
    assert code == 1 and "does not compute what transformers does; it is kept" in err and "verify:" in out
    assert not verify_model.Comparison(float("nan"), 1.0).equal


def test_a_gguf_file(tmp_path, capsys):
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason="transformers reads GGUF files with it")
    model = make("llama", {"rms_norm_eps": 1e-3})
    file = write_gguf(model, tmp_path / "tiny.gguf")
    for to in ("hf", "native"):
        code, _, err = run(capsys, file, tmp_path / to, "--to", to, "--verify")
        assert code == 0, err
    assert equal(weights(tmp_path / "hf"), dict(model.state_dict()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-5)

    code, _, err = run(capsys, write_gguf(model, tmp_path / "long.gguf", rope_freqs=True), tmp_path / "no", "--to", "hf")
    assert code == 1 and "stretched by a tensor (rope_freqs), which transformers passes over" in err
    code, _, err = run(capsys, write_gguf(model, tmp_path / "other.gguf", architecture="gemma2"), tmp_path / "no", "--to", "hf")
    assert code == 1 and "architecture 'gemma2' cannot be imported; allowed: llama, qwen2, qwen3" in err
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:300])
    code, _, err = run(capsys, tmp_path / "short.gguf", tmp_path / "no", "--to", "hf")
    assert code == 1 and "is cut short or no GGUF file" in err and "Traceback" not in err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate"])
def test_packages_that_gguf_needs(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    code, _, err = run(capsys, tmp_path / "a.gguf", tmp_path / "out", "--to", "hf")
    assert code == 1 and f"{package} is missing: pip install llmtrain[hf]" in err


def test_verify_needs_transformers(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run(capsys, hf, tmp_path / "out", "--to", "native", "--verify")
    assert code == 1 and "pip install llmtrain[hf]" in err and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(hf, tmp_path, capsys):
    run(capsys, hf, tmp_path / "out", "--to", "hf")
    before = (tmp_path / "out/config.json").stat().st_mtime_ns
    code, _, err = run(capsys, hf, tmp_path / "out", "--to", "native")
    assert code == 1 and "out exists; --force replaces it" in err and (tmp_path / "out/config.json").stat().st_mtime_ns == before
    assert run(capsys, hf, tmp_path / "out", "--to", "native", "--force")[0] == 0
    assert (tmp_path / "out/config.yaml").exists() and not (tmp_path / "out/config.json").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/to_mother.txt").write_text("dear")
    code, _, err = run(capsys, hf, tmp_path / "letters", "--to", "hf", "--force")
    assert code == 1 and "no model's folder" in err and (tmp_path / "letters/to_mother.txt").exists()
    code, _, err = run(capsys, tmp_path / "out", tmp_path / "out/checkpoints", "--to", "hf", "--force")
    assert code == 1 and "is SRC or lies in it" in err


def test_a_failure_half_way_leaves_nothing_new(hf, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(hf, broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"]
    last = broken / index["model.layers.2.mlp.up_proj.weight"]
    held = load_file(last)
    held["model.layers.2.mlp.up_proj.weight"] = held["model.layers.2.mlp.up_proj.weight"][:5].clone()
    save_file(held, last)
    for to in ("hf", "native"):
        code, _, err = run(capsys, broken, tmp_path / "out", "--to", to)
        assert code == 1 and "has shape [5, 32], config.json makes it [48, 32]" in err
    run(capsys, hf, tmp_path / "out", "--to", "native")
    whole = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmtrain.train.checkpoint_state.write", full)
    code, _, err = run(capsys, hf, tmp_path / "out", "--to", "native", "--force")
    assert code == 1 and "cannot be written: No space left on device" in err
    assert {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == whole
    assert {p.name for p in tmp_path.iterdir()} == {"broken", "out"}


def test_words_that_make_no_sense(hf, tmp_path, capsys):
    for words, message in {
        (tmp_path / "nothing", tmp_path / "out", "--to", "hf"): "there is no such file or folder",
        (tmp_path, tmp_path / "out", "--to", "hf"): "it is none of them",
        (hf, tmp_path / "out", "--to", "hf", "--shard-size", "big"): "--shard-size 'big' is not allowed; allowed: a size such as 5GB",
    }.items():
        code, _, err = run(capsys, *words)
        assert code == 1 and message in err, err
    run(capsys, hf, tmp_path / "run", "--to", "native")
    code, _, err = run(capsys, tmp_path / "run", tmp_path / "out", "--to", "native", "--verify")
    assert code == 1 and "from a run folder to a run folder there is none" in err
    assert run(capsys, tmp_path / "run/checkpoints/step-00000000", tmp_path / "out", "--to", "native")[0] == 0
    assert convert._bytes("1.5GB") == 1_500_000_000 and convert._bytes("20kb") == 20_000 and convert._bytes("7") == 7

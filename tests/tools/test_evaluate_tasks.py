"""The model class for lm-eval against lm-eval's own for Hugging Face models, and a task over local files."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_models import make, save

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'llmtrain[eval]'")
transformers = pytest.importorskip("transformers", reason="the comparison is with transformers")
torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama of 300 tokens with a byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    path = save(make("llama", {"vocab_size": 300, "max_position_embeddings": 48, "eos_token_id": 0}), tmp_path_factory.mktemp("tiny"))
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(["what is the sum of one and two"] * 9, vocab_size=300, special_tokens=["<|endoftext|>"])
    library.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="module")
def both(folder):
    from lm_eval.models.huggingface import HFLM

    from llmtrain.tools.lm_eval_tasks import LlmtrainLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=2, device="cpu", max_length=48)
    return LlmtrainLM(str(folder), device="cpu", batch_size=2), theirs


def asked(*arguments):
    return [SimpleNamespace(args=args, arguments=args, repeats=1, metadata=(None, None, None)) for args in arguments]


PAIRS = [
    ("what is", " the sum"),
    ("", "one and two"),
    ("the sum of ", "one"),
    ("one and two and " * 12, "three"),
    ("x", " a much longer continuation, with 你好 in it"),
]


def test_loglikelihoods_equal_those_of_lm_eval(both):
    ours, theirs = (model.loglikelihood(asked(*PAIRS), disable_tqdm=True) for model in both)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({round(value, 3) for value, _ in ours}) == len(PAIRS)


def test_rolling_loglikelihoods_equal_those_of_lm_eval(both):
    texts = [("one and two " * 20,), ("short",)]
    ours, theirs = (model.loglikelihood_rolling(asked(*texts), disable_tqdm=True) for model in both)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generations_equal_those_of_lm_eval(both):
    first = both[0].generate_until(asked(("what is", {"until": [], "max_gen_toks": 10})), disable_tqdm=True)[0]
    stop = first[len(first) // 2 :][:2]
    wanted = [
        ("what is", {"until": [stop, "never"], "max_gen_toks": 10}),
        ("one and two " * 20, {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}),
        ("x", {"until": "zzz", "max_gen_toks": 6}),
    ]
    ours, theirs = (model.generate_until(asked(*wanted), disable_tqdm=True) for model in both)
    assert ours == theirs and ours[0] == first[: first.find(stop)]


def test_a_task_over_local_files(folder, tmp_path, monkeypatch, capsys):
    """The example's task file, by path, through the verb; its accuracy is counted here from the scores."""
    pytest.importorskip("datasets", reason="lm-eval reads task data with datasets")
    from llmtrain.errors import UserError
    from llmtrain.model.scoring import score
    from llmtrain.tools import evaluate
    from llmtrain.tools.open_model import open_model

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    task = "examples/lm_eval/arithmetic.yaml"
    assert evaluate.main([str(folder), "tasks", task, "--limit", "20", "--device", "cpu", "--out", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())["results"]["arithmetic_local"]
    opened = open_model(folder, device="cpu")
    right = 0
    for line in Path("examples/lm_eval/arithmetic.jsonl").read_text().splitlines()[:20]:
        item = json.loads(line)
        prompt = opened.encode(f"Question: {item['question']}\nAnswer:")
        scores = [score(opened.model, [(prompt, opened.encode(f" {choice}"))])[0].logprob for choice in item["choices"]]
        right += scores.index(max(scores)) == item["answer"]
    assert result["acc,none"] == pytest.approx(right / 20)
    assert "arithmetic_local" in capsys.readouterr().out
    with pytest.raises(UserError, match="'no_such_task_of_anybody' is not known"):
        evaluate.main([str(folder), "tasks", "no_such_task_of_anybody", "--device", "cpu"])

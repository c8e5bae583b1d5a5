"""A tokenizer exported with a model encodes in transformers as it does here."""

import io

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.convert.export import export_hf
from llmtrain.data.tokenizer import load
from llmtrain.model import build, initialise
from llmtrain.ops import Call, resolve

transformers = pytest.importorskip("transformers", reason="the export is checked against transformers")
LINES = [
    "The quality of mercy is not strained; it droppeth as the gentle rain from heaven.",
    "def area(radius):\n    return 3.14159 * radius ** 2  # square",
    "Über café naïve — 你好,世界 " + "🙂",
    " leading and  double  spaces\ttabs \n\nnewlines\n",
]


def sentencepiece_file(folder, **options):
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in LINES for line in text.splitlines()] * 4),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path = folder / "given.model"
    path.write_bytes(model.getvalue())
    return path


def json_file(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(folder / "given.json"))
    return folder / "given.json"


KINDS = {
    "sentencepiece with a space in front": lambda folder: sentencepiece_file(
        folder, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True
    ),
    "sentencepiece without a space in front": lambda folder: sentencepiece_file(
        folder, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False
    ),
    "tokenizer.json": json_file,
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers(kind, tmp_path):
    (tmp_path / "given").mkdir()
    ours = load(KINDS[kind](tmp_path / "given"))
    cfg = ModelConfig.model_validate(
        {"vocab_size": ours.vocab_size, "layers": 1, "hidden": 16, "attention": {"heads": 2}, "ffn": {"hidden": 16}}
    )
    model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32)), 64)
    initialise(model, cfg, 0)
    folder = export_hf(tmp_path / "hf", cfg, model.named_parameters(), tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line.lstrip() for line in LINES] if kind == "sentencepiece with a space in front" else LINES  # see export._write_tokenizer
    for line in lines:
        ids = theirs(line, add_special_tokens=False).input_ids
        assert ids == ours.encode(line)
        assert ids == theirs(line).input_ids, "a special token was added unasked"
    assert theirs.eos_token_id == ours.eod_id
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == ours.eod_id
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ours.eod_id

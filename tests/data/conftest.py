"""Small tokenizers and texts that the data tests share."""

import random
from pathlib import Path

import pytest

WORDS = ("crown", "day", "fair", "good", "hand", "heart", "king", "lady", "lord", "love", "my", "night", "O", "queen", "said", "sword")


def sentences(count, seed=0):
    """Lines of plain words, the same for the same arguments."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + draw.choice(".!?") for _ in range(count)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(sentences(400)) + "\n")
    return path


@pytest.fixture(scope="session")
def sp_model(text_file) -> Path:
    """A sentencepiece model of 340 pieces."""
    from llmtrain.data.train_tokenizer import train_sentencepiece

    return train_sentencepiece([str(text_file)], text_file.parent / "words.model", vocab_size=340)


@pytest.fixture(scope="session")
def hf_json(text_file) -> Path:
    """A byte-level BPE tokenizer.json of 320 ids with <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    model.train([str(text_file)], trainer)
    path = text_file.parent / "tokenizer.json"
    model.save(str(path))
    return path

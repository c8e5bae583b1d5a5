"""Tokenizers with the special tokens of chat templates."""

from pathlib import Path

import pytest
from chat_tokenizer import byte_level

from llmtrain.data.tokenizer import load


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return byte_level(tmp_path_factory.mktemp("chat-tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load(folder)

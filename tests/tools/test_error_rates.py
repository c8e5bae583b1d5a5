"""Mixed and character error rates against counts by hand."""

import json
import sys

import pytest

from llmtrain.errors import UserError
from llmtrain.tools import error_rates, evaluate

HERE = pytest.importorskip("rapidfuzz", reason="needs rapidfuzz: pip install rapidfuzz")
REFERENCES = ["我 很 喜欢 machine learning。", "yes"]
HYPOTHESES = ["我很喜歡 Machine earning", "yes yes"]


@pytest.fixture(params=["without jieba", "with jieba"])
def segments(request, monkeypatch):
    if request.param == "without jieba":
        monkeypatch.setitem(sys.modules, "jieba", None)
    else:
        pytest.importorskip("jieba", reason="needs jieba: pip install jieba")


def test_rates_are_sums_over_the_corpus(segments):
    mixed, character = error_rates.error_rates(REFERENCES, HYPOTHESES)
    assert (mixed.edits, mixed.tokens) == (3, 7), "one character, one word, one word too many"
    assert mixed.rate == pytest.approx(3 / 7) and mixed.rate != pytest.approx((2 / 6 + 1) / 2), "no mean of utterances"
    assert (character.edits, character.tokens) == (5, 22)
    assert 0 < mixed.error < 0.5


def test_tokens(segments):
    assert error_rates.mixed_tokens("我想 check 一下 email") == ["我", "想", "check", "一", "下", "email"]
    assert error_rates.characters("我 ab") == ["我", "a", "b"]


def test_as_written_counts_case_and_punctuation(segments):
    assert error_rates.error_rates(["Yes."], ["yes"])[1].edits == 0
    assert error_rates.error_rates(["Yes."], ["yes"], normalised=False)[1].edits == 2


def test_the_verb(tmp_path, capsys):
    for name, lines in (("r", REFERENCES), ("h", HYPOTHESES)):
        (tmp_path / name).write_text("\n".join(lines))
    assert evaluate.main(["error-rate", str(tmp_path / "r"), str(tmp_path / "h"), "--out", str(tmp_path / "o.json")]) == 0
    assert "| mixed | 42.86 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["results"][0]["edits"] == 3
    for name in "rh":
        (tmp_path / name).write_text("a\u2028b\nc\n")  # two utterances
    assert evaluate.main(["error-rate", str(tmp_path / "r"), str(tmp_path / "h"), "--out", str(tmp_path / "o.json")]) == 0
    (tmp_path / "h").write_text("one")
    with pytest.raises(UserError, match="2 references and 1 hypotheses"):
        evaluate.main(["error-rate", str(tmp_path / "r"), str(tmp_path / "h")])
    with pytest.raises(UserError, match="hold no token"):
        error_rates.error_rates(["。"], ["x"])

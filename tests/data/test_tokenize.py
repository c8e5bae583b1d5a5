"""Text to token files: same bytes for any workers and interruptions, every format, every kind of bad input."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.data import inputs as inputs_module
from llmtrain.data import readers as readers_module
from llmtrain.data import tokenize as tokenize_module
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import ReadOptions, expand, plan_units
from llmtrain.data.readers import Problems, documents
from llmtrain.data.token_file import TokenFile
from llmtrain.data.tokenize import tokenize
from llmtrain.data.tokenizer import load

WORDS = ("the", "king", "queen", "night", "day", "love", "sword", "house", "came", "said", "my", "lord", "good", "speak", "stay")
TEXTS = ["The king said\nO my lord.", "  night\n\n", "中文 and the sword", "queen " * 40]


def sentences(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=8)) for _ in range(count)]


def small_units(monkeypatch, size=200):
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", (size, size))


def jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


def read(prefix, tokenizer):
    file = TokenFile(prefix)
    found = [file.document(i).tolist() for i in range(len(file))]
    assert all(d[-1] == tokenizer.eod_id for d in found)
    return [tokenizer.decode(d[:-1]) for d in found]


def pair(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def make_text(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return folder, {}


def make_jsonl(folder):
    return jsonl(folder / "a.jsonl", TEXTS, "body"), {"field": "body"}


def make_gzip(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(folder / "raw", TEXTS).read_bytes()))
    return folder / "a.jsonl.gz", {}


def make_parquet(folder):
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3, 4]}), folder / "a.parquet", row_group_size=1)
    return folder, {}


def make_separated(folder):
    (folder / "a.txt").write_text("<|end|>".join(TEXTS))
    return folder / "*.txt", {"split": "<|end|>"}


@pytest.mark.parametrize("make", [make_text, make_jsonl, make_gzip, make_parquet, make_separated])
def test_every_format_gives_the_same_documents(tmp_path, sp_model, make, monkeypatch):
    small_units(monkeypatch, 50)
    (tmp_path / "in").mkdir()
    source, options = make(tmp_path / "in")
    report = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1, options=ReadOptions(**options))
    strip = (lambda t: t.strip("\n")) if "split" in options else (lambda t: t)  # between separators, newlines at the ends belong to them
    assert read(tmp_path / "out", load(sp_model)) == [strip(t) for t in TEXTS]
    assert report.outputs == {str(tmp_path / "out"): (4, len(TokenFile(tmp_path / "out").tokens))}


def test_fsspec_url(tmp_path, sp_model):
    import fsspec

    with fsspec.open("memory://shelf/a.jsonl", "w") as file:
        file.write(json.dumps({"text": TEXTS[0]}) + "\n")
    tokenize(["memory://shelf/*.jsonl"], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert read(tmp_path / "out", load(sp_model)) == TEXTS[:1]


def test_hf_tokenizer(tmp_path, hf_json):
    tokenize([str(jsonl(tmp_path / "a.jsonl", TEXTS))], tmp_path / "out", tokenizer=hf_json, workers=1)
    assert read(tmp_path / "out", load(hf_json)) == TEXTS


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=12), min_size=1, max_size=12),
    size=st.integers(1, 40),
    block=st.integers(1, 8),
    split=st.sampled_from(["line", "blank", "b", "ab", "aa"]),
)
@example(texts=["a", "aa aaa"], size=2, block=1, split="aa")
def test_cutting_files_changes_nothing(tmp_path_factory, texts, size, block, split):
    """Documents of a file cut into small units are those of the whole file, in order."""
    folder = tmp_path_factory.mktemp("cut")
    for name, options in (("a.jsonl", ReadOptions()), ("a.txt", ReadOptions(split=split))):
        jsonl(folder / name, texts) if name == "a.jsonl" else (folder / name).write_text(" ".join(texts) + "\nend")
        files = expand([str(folder / name)], options)
        found = []
        for limit in (1 << 20, size):
            with pytest.MonkeyPatch.context() as patch:
                small_units(patch, limit)
                patch.setattr(inputs_module, "BLOCK", block)
                patch.setattr(readers_module, "BLOCK", 1 << 20 if limit > size else block)
                units = plan_units(files)
                found.append([d for unit in units for d in documents(unit, options, Problems("fail"))])
        assert found[0] == found[1]
        if name == "a.jsonl":
            assert found[0] == [t for t in texts if t.strip()]


def test_two_processes_write_the_same_bytes(tmp_path, sp_model, monkeypatch):
    small_units(monkeypatch, 2000)
    source = jsonl(tmp_path / "a.jsonl", ["\n".join(sentences(4, seed)) for seed in range(60)])
    for workers in (1, 2):
        tokenize([str(source)], tmp_path / f"out{workers}", tokenizer=sp_model, workers=workers, validation=0.3)
    for split in ("train", "validation"):
        assert pair(tmp_path / f"out1-{split}") == pair(tmp_path / f"out2-{split}")
    assert not list(tmp_path.glob("*.parts"))


def test_validation_is_a_fixed_part_of_the_documents(tmp_path, sp_model):
    texts = ["\n".join(sentences(2, seed)) for seed in range(200)]
    source = jsonl(tmp_path / "a.jsonl", texts + texts)
    tokenizer = load(sp_model)
    tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1, validation=0.25)
    train, validation = (read(tmp_path / f"out-{s}", tokenizer) for s in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts + texts)
    assert not set(train) & set(validation)  # copies of a text are on one side
    assert 30 < len(set(validation)) < 70
    tokenize([str(source)], tmp_path / "other", tokenizer=sp_model, workers=1, validation=0.25, seed=1)
    assert set(read(tmp_path / "other-validation", tokenizer)) != set(validation)


def test_goes_on_after_an_error_in_the_middle(tmp_path, sp_model, monkeypatch):
    small_units(monkeypatch, 500)
    source = jsonl(tmp_path / "a.jsonl", ["\n".join(sentences(3, seed)) for seed in range(40)])
    tokenize([str(source)], tmp_path / "whole", tokenizer=sp_model, workers=1)
    done = []

    def failing(job, coder, index, unit):
        if index == 5:
            raise KeyboardInterrupt
        done.append(index)
        return original(job, coder, index, unit)

    original = tokenize_module.run_unit
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_module, "run_unit", failing)
        tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert not (tmp_path / "out.bin").exists()
    report = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert done == [0, 1, 2, 3, 4]
    assert report.kept == 5
    assert report.units > 6
    assert pair(tmp_path / "out") == pair(tmp_path / "whole")


def test_damaged_parts_are_done_again(tmp_path, sp_model, monkeypatch):
    """As a power cut leaves them: a note beside tokens that never reached the disk, or half a note."""
    small_units(monkeypatch, 500)
    source = jsonl(tmp_path / "a.jsonl", ["\n".join(sentences(3, seed)) for seed in range(40)])
    tokenize([str(source)], tmp_path / "whole", tokenizer=sp_model, workers=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    parts = tmp_path / "out.parts"
    (parts / "unit-000000.bin").write_bytes(b"")
    (parts / "unit-000001.json").write_text('{"docum')
    (parts / "unit-000002.idx").unlink()
    report = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert report.kept == report.units - 3
    assert pair(tmp_path / "out") == pair(tmp_path / "whole")


def test_parts_that_a_kill_left_half_removed_do_not_count(tmp_path, sp_model, monkeypatch):
    small_units(monkeypatch, 100)
    source = jsonl(tmp_path / "a.jsonl", TEXTS)

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_module.shutil, "rmtree", killed)
        tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"out.{suffix}").unlink()
    next((tmp_path / "out.parts").glob("unit-*.bin")).write_bytes(b"")
    report = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert report.kept == 0
    assert read(tmp_path / "out", load(sp_model)) == TEXTS


def test_parts_of_another_call_are_not_used(tmp_path, sp_model, hf_json, monkeypatch):
    small_units(monkeypatch, 100)
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    said = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        tokenize([str(source)], tmp_path / "out", tokenizer=hf_json, workers=1)
    report = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1, say=said.append)
    assert report.kept == 0
    assert "starting anew" in said[0]
    assert read(tmp_path / "out", load(sp_model)) == TEXTS


def test_same_call_again_does_nothing(tmp_path, sp_model):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    first = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    again = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert first.outputs == again.outputs
    jsonl(source, TEXTS[:2])
    assert not tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1).up_to_date


RUN = """
import sys
from llmtrain.data import inputs
from llmtrain.data.tokenize import tokenize
if __name__ == "__main__":
    inputs.UNIT_BYTES = (20000, 20000)
    tokenize([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=2)
"""


def test_killed_process_goes_on(tmp_path, sp_model, monkeypatch):
    """kill -9 while two workers write: they end too, the finished units are kept, the result is the same."""
    small_units(monkeypatch, 20000)
    source = jsonl(tmp_path / "a.jsonl", ["\n".join(sentences(30, seed)) for seed in range(1500)])
    tokenize([str(source)], tmp_path / "whole", tokenizer=sp_model, workers=1)
    (tmp_path / "run.py").write_text(RUN)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "out"), str(sp_model)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out.parts/unit-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.bin").exists(), "finished before it could be killed; give the test more text"
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    report = tokenize([str(source)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert 3 <= report.kept < report.units
    assert pair(tmp_path / "out") == pair(tmp_path / "whole")


GOOD = b'{"text": "the king"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", r"a\.txt: is empty"),
        ("a.txt", b" \n\n ", r"a\.txt: holds no text"),
        ("a.txt", b"one\ntwo\xc3(", r"a\.txt: not UTF-8: byte 0xc3 at offset 7, line 2"),
        ("a.jsonl", GOOD + GOOD[:-3] + b"\n", r"a\.jsonl, line 2: not valid JSON: .* at column \d+"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl: not UTF-8: byte 0xff at offset 31, line 2"),
        ("a.jsonl", GOOD + b'{"body": "x"}\n', r"a\.jsonl, line 2: has no field 'text' \(--field\); it has 'body'"),
        ("a.jsonl", GOOD + b'{"text": 5}\n', r"a\.jsonl, line 2: field 'text' is a int, not a string"),
        ("a.jsonl", GOOD + b'["text"]\n', r"a\.jsonl, line 2: a JSON object is wanted, this is a list"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"a\.jsonl, line 2: field 'text' holds half of a surrogate pair"),
        ("a.jsonl", GOOD + b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n", r"a\.jsonl, line 2: not readable JSON"),
        ("a.jsonl", b'{"text": " "}\n', r"no document in the input \(1 records without text, 0 unreadable\)"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet: not a readable Parquet file"),
        ("a.doc", b"text\n", r"a\.doc: its suffix .*--format"),
    ],
)
def test_bad_input(tmp_path, sp_model, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        tokenize([str(tmp_path / name)], tmp_path / "out", tokenizer=sp_model, workers=1)
    assert not (tmp_path / "out.bin").exists()


def test_line_number_in_a_later_unit(tmp_path, sp_model, monkeypatch):
    small_units(monkeypatch, 100)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 50 + b"broken\n" + GOOD * 50)
    with pytest.raises(DataError, match=r"a\.jsonl, line 51: not valid JSON"):
        tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=sp_model, workers=1)


def test_error_in_a_worker_process(tmp_path, sp_model, monkeypatch):
    small_units(monkeypatch, 100)
    (tmp_path / "a.jsonl").write_bytes(GOOD * 50 + b"broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 51: not valid JSON"):
        tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=sp_model, workers=2)


def test_skipping_counts(tmp_path, sp_model):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"broken\n" + b'{"text": ""}\n' + GOOD + b"\xff\n")
    (tmp_path / "b.txt").write_bytes(b"")
    report = tokenize([str(tmp_path)], tmp_path / "out", tokenizer=sp_model, workers=1, options=ReadOptions(bad="skip"))
    assert (report.bad, report.empty) == (2, 1)
    assert "line 2" in report.messages[0]
    assert read(tmp_path / "out", load(sp_model)) == ["the king"] * 2


def test_windows_line_ends(tmp_path, sp_model):
    (tmp_path / "a.txt").write_bytes(b"the king\r\n\r\nmy lord\r\n")
    tokenize([str(tmp_path)], tmp_path / "out", tokenizer=sp_model, workers=1, options=ReadOptions(split="line"))
    assert read(tmp_path / "out", load(sp_model)) == ["the king", "my lord"]
    with pytest.raises(DataError, match=r"a\.txt: has Windows line ends"):
        tokenize([str(tmp_path)], tmp_path / "out", tokenizer=sp_model, workers=1, options=ReadOptions(split="blank"))


def test_missing_column_and_null(tmp_path, sp_model):
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    for field, words in (("body", r"has no column 'body' \(--field\); it has 'text'"), ("text", r"row group 0, row 1: 'text' is NoneType")):
        with pytest.raises(DataError, match=words):
            tokenize([str(tmp_path)], tmp_path / "out", tokenizer=sp_model, workers=1, options=ReadOptions(field=field))


def test_nothing_found(tmp_path, sp_model):
    for given_ in (tmp_path / "none.txt", tmp_path / "*.txt", tmp_path):
        with pytest.raises(DataError, match="no such file, or none with one of the suffixes"):
            tokenize([str(given_)], tmp_path / "out", tokenizer=sp_model)
    with pytest.raises(DataError, match=r"--validation 1\.0 is not a share"):
        tokenize([str(tmp_path)], tmp_path / "out", tokenizer=sp_model, validation=1.0)
    with pytest.raises(DataError, match=r"--workers 0 is not allowed; give 1 or more"):
        tokenize([str(tmp_path)], tmp_path / "out", tokenizer=sp_model, workers=0)


def test_no_validation_document(tmp_path, sp_model):
    with pytest.raises(DataError, match="out-validation: got no document; change --validation or --seed"):
        tokenize([str(jsonl(tmp_path / "a.jsonl", TEXTS))], tmp_path / "out", tokenizer=sp_model, workers=1, validation=1e-6)

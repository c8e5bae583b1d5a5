"""Conversation files as a data source: schemas, bad samples, rows, and what a batch of them is."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import ConversationSource, DataSource, TokenizerConfig
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET
from llmtrain.data.chat.packing import best_fit, epoch_rows, pack
from llmtrain.data.chat.schemas import messages_of, recognise
from llmtrain.data.dataset import build_dataset, to_batch
from llmtrain.data.errors import DataError
from llmtrain.data.packing import Sample
from llmtrain.data.shifted import shifted
from llmtrain.data.sources import CheckedSource, open_source

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RECORDS = {
    "messages": {"messages": QA},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "prompt_response": {"prompt": "q", "response": "a"},
}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def samples(path, folder, cache, *, seq_len=24, seed=3, shuffle=True, **options):
    source = ConversationSource(path=path, **({"template": "plain"} | options))
    return open_source(source, seq_len=seq_len, seed=seed, shuffle=shuffle, cache=cache, tokenizer=TokenizerConfig(path=str(folder)))


# --- schemas and files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", RECORDS)
def test_a_schema_is_recognised_and_read(schema):
    assert recognise([{"unlike": 1}, RECORDS[schema], RECORDS[schema]]) == schema
    assert messages_of(RECORDS[schema], schema) == QA
    assert messages_of(RECORDS[schema], schema, system="s") == [{"role": "system", "content": "s"}, *QA]


def test_an_instruction_with_input_and_a_system_message_of_its_own():
    record = {"instruction": "q", "input": "x", "output": "a", "system": "own"}
    assert [m["content"] for m in messages_of(record, "alpaca", system="s")] == ["own", "q\n\nx", "a"]


@pytest.mark.parametrize(
    ("record", "schema", "said"),
    [
        ({"prompt": "q"}, "prompt_response", "'response' is not there"),
        ({"prompt": "q", "response": None}, "prompt_response", "'response' is a NoneType"),
        ({"prompt": "q", "response": " \n"}, "prompt_response", "empty answer"),
        ({"messages": []}, "messages", "not a list of messages"),
        ({"messages": QA[:1]}, "messages", "no answer"),
        ({"messages": [*QA, QA[0]]}, "messages", "ends with a message of role 'user'"),
        ({"messages": [{"role": "owner", "content": "q"}]}, "messages", r"messages\[0\].role is 'owner'"),
        ({"conversations": ["q"]}, "sharegpt", r"conversations\[0\] is a str"),
        ({"conversations": [{"from": "human", "value": 1}]}, "sharegpt", r"conversations\[0\]: field 'value' is a int"),
    ],
)
def test_a_bad_record_is_explained(record, schema, said):
    with pytest.raises(DataError, match=said):
        messages_of(record, schema)


def test_json_parquet_and_jsonl_hold_the_same(tmp_path, folder):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    records = [{"prompt": f"What is {n} + 5?", "response": f" It is {n + 5}."} for n in range(9)]
    write(tmp_path / "x.jsonl", records)
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": records}))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    (tmp_path / "x.json.gz").write_bytes(gzip.compress((tmp_path / "x.json").read_bytes()))
    names = ("x.jsonl", "x.json", "x.parquet", "x.json.gz")
    kinds = {source.kind for source in RunConfig.load({"data": {"train": list(names)}}).data.train}
    found = [samples(str(tmp_path / name), folder, tmp_path / "c") for name in names]
    assert kinds == {"conversations"}
    for other in found[1:]:
        assert np.array_equal(found[0].conversations.tokens, other.conversations.tokens)
    assert [f.conversations.where[2].decode().rpartition("x.")[2] for f in found] == [
        "jsonl:3",
        "json:item 3",
        "parquet:row 3",
        "json.gz:item 3",
    ]


BAD = ['{"prompt": "q", "response": "a"}', "{", '{"prompt": "q"}', "", "[1]", '{"prompt": "q", "response": "<|im_end|>"}']


def test_bad_lines_are_fatal_or_counted(tmp_path, folder):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(BAD))
    with pytest.raises(DataError, match=r"bad.jsonl:2: not valid JSON.*bad: skip"):
        samples(str(file), folder, tmp_path)
    found = samples(str(file), folder, tmp_path, bad="skip")
    assert found.documents == 1 and found.conversations.bad == 4
    assert "4 bad samples skipped" in found.notes[1] and "bad.jsonl:3: field 'response'" in found.notes[1]
    file.write_text("\n".join(BAD[1:3]))
    with pytest.raises(DataError, match=r"none of 2 records can be used; the first: .*bad.jsonl:1"):
        samples(str(file), folder, tmp_path, bad="skip", schema="prompt_response")


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"text": "t"}\n', "no known schema .*they have 'text'"), ("", "is empty"), ("nonsense\n", "x.jsonl:1: not valid JSON")],
)
def test_a_file_of_something_else(tmp_path, folder, content, said):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        samples(str(tmp_path / "x.jsonl"), folder, tmp_path)


def test_without_a_tokenizer(tmp_path):
    path = write(tmp_path / "x.jsonl", [RECORDS["messages"]])
    with pytest.raises(DataError, match=r"tokenizer\.path"):
        open_source(ConversationSource(path=path), seq_len=8, seed=0, shuffle=True, cache=tmp_path)


def test_the_cache_follows_content_and_options(tmp_path, folder):
    path = write(tmp_path / "x.jsonl", [{"prompt": "q", "response": "a"}])

    def made():
        return len(list((tmp_path / "c").glob("conversations-*[0-9a-f]")))

    samples(path, folder, tmp_path / "c")
    samples(path, folder, tmp_path / "c", seq_len=50, seed=9)
    assert made() == 1
    assert samples(path, folder, tmp_path / "c", system="s").tokens > samples(path, folder, tmp_path / "c").tokens
    assert made() == 2
    write(tmp_path / "x.jsonl", [{"prompt": "q", "response": "a"}] * 2)
    assert samples(path, folder, tmp_path / "c").documents == 2
    assert made() == 3


# --- rows ------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 3), st.booleans())
def test_every_epoch_has_each_conversation_once_in_as_many_rows(lengths, seed, together):
    lengths, room = np.array(lengths), 20
    row = pack(lengths, room=room, together=together)["row"]
    rows = set()
    for key in (None, (seed, 0), (seed, 1)):
        found = epoch_rows(lengths, row, key=key)
        assert sorted(found["members"].tolist()) == list(range(len(lengths)))
        filled = [lengths[found["members"][a:b]].sum() for a, b in zip(found["first"], found["first"][1:])]
        assert all(0 < f <= room for f in filled)
        rows.add(len(filled))
        if key is None:
            firsts = found["members"][found["first"][:-1]].tolist()
            assert firsts == sorted(firsts), "without shuffling rows follow the file"
    assert len(rows) == 1
    assert not together or rows.pop() <= max(1, -(-2 * lengths.sum() // room)), "any two rows together hold more than one row's room"


def test_best_fit_takes_the_fullest_row_with_room():
    assert best_fit(np.array([7, 6, 5, 4, 3, 3]), 10).tolist() == [0, 1, 2, 1, 0, 2]


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 1000, 5000)
    rows = best_fit(np.sort(lengths)[::-1], 2049).max() + 1
    assert lengths.sum() / (rows * 2049) > 0.995


# --- samples ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Question and answer of many lengths, some too long for a row of 24."""
    draw = np.random.default_rng(1)
    records = [{"prompt": "q" * int(draw.integers(1, 9)), "response": "a" * int(draw.integers(1, 20))} for _ in range(60)]
    return write(tmp_path_factory.mktemp("talks") / "talks.jsonl", records)


def conversations(batch, row):
    """(tokens, targets) of each document of a row."""
    at, found = 0, []
    for length in batch.documents[row]:
        found.append((batch.tokens[row, at : at + length].tolist(), batch.targets[row, at : at + length].tolist()))
        assert batch.positions[row, at : at + length].tolist() == list(range(length))
        at += length
    return found


@pytest.mark.parametrize("options", [{}, {"pack": False}, {"loss": "all"}, {"too_long": "truncate"}])
def test_a_batch_is_what_its_lines_say(talks, folder, tokenizer, tmp_path, options):
    """Every token by hand: whole conversations, no target but the next token of an answer of the same conversation, padding without any."""
    source = ConversationSource(path=talks, template="plain", **options)
    data = build_dataset([source], seq_len=24, samples=None, seed=3, cache=tmp_path, tokenizer=TokenizerConfig(path=str(folder)))
    expected = Counter()
    for line in Path(talks).read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer.encode(record["prompt"])
        tokens = [*prompt, *tokenizer.encode(record["response"]), tokenizer.special["<|im_end|>"]]
        if len(tokens) <= 25 or "too_long" in options:
            first = 1 if options.get("loss") == "all" else len(prompt)
            targets = [t if i + 1 >= first else NO_TARGET for i, t in enumerate(tokens[1:25])]
            expected[tuple(tokens[:25]), tuple(targets)] += 1
    seen, batch = Counter(), data.batch(0, len(data))
    for row in range(len(data)):
        parts = conversations(batch, row)
        assert len(parts) <= 2 or options.get("pack", True)
        for tokens, targets in parts:
            if set(targets) == {NO_TARGET}:
                assert set(tokens) == {tokenizer.eod_id}, "a document without targets is padding"
                continue
            whole = targets[-1] != NO_TARGET  # its last token is the one after the row
            tokens = (*tokens, targets[-1]) if whole else tokens
            seen[tuple(tokens), tuple(targets if whole else targets[:-1])] += 1
    assert seen == expected
    assert data.epochs[0].documents == sum(expected.values()) and data.epochs[0].tokens == sum(len(t) * n for (t, _), n in expected.items())
    assert batch.target_count == sum(n * sum(t != NO_TARGET for t in targets) for (_, targets), n in expected.items())


def test_too_long_is_an_option(talks, folder, tmp_path):
    with pytest.raises(DataError, match=r"talks.jsonl:\d+: 2\d tokens, of which 25 fit"):
        samples(talks, folder, tmp_path, too_long="fail")
    assert "skipped" in samples(talks, folder, tmp_path).notes[-1]
    with pytest.raises(DataError, match="no conversation has an answer within 3 tokens"):
        samples(write(tmp_path / "x.jsonl", [{"prompt": "qZqZqZ", "response": "a"}]), folder, tmp_path, seq_len=2, too_long="truncate")


def test_samples_follow_from_seed_and_index(talks, folder, tmp_path):
    def epoch(number, cache, **options):
        found = samples(talks, folder, tmp_path / cache, **options)
        return [found.sample(number * found.samples_per_epoch + i).tokens.tolist() for i in reversed(range(found.samples_per_epoch))]

    first = epoch(0, "a")
    assert first == epoch(0, "b") != epoch(1, "b") == epoch(1, "a")
    assert epoch(0, "a", seed=4) != first
    assert epoch(0, "a", shuffle=False) == epoch(1, "a", shuffle=False)


def test_heads_that_look_ahead_are_asked_answers_alone(talks, folder, tmp_path):
    source = ConversationSource(path=talks, template="plain")
    data = build_dataset([source], seq_len=24, samples=None, seed=3, cache=tmp_path, tokenizer=TokenizerConfig(path=str(folder)))
    batch = data.batch(0, len(data))
    tokens, targets = shifted(batch, 1)
    for row in range(len(data)):
        at = 0
        for length in batch.documents[row]:
            here = batch.targets[row, at : at + length].tolist()
            assert targets[row, at : at + length].tolist() == [*here[1:], NO_TARGET]
            at += length
    seen = targets != NO_TARGET
    following = batch.tokens[:, 1:]
    assert (tokens[:, :-1][seen[:, :-1]] == following[seen[:, :-1]]).all() and seen.any()


def test_it_blends_with_tokens(talks, folder, tokenizer, tmp_path):
    from llmtrain.data.token_file import TokenWriter

    with TokenWriter(tmp_path / "t", np.uint16) as writer:
        writer.add(np.arange(1000) % 300)
    sources = [ConversationSource(path=talks, template="plain", weight=1), DataSource(path=str(tmp_path / "t"), weight=3)]
    data = build_dataset(sources, seq_len=24, samples=40, seed=3, cache=tmp_path, tokenizer=TokenizerConfig(path=str(folder)))
    counted = (data.batch(0, 40).targets != NO_TARGET).sum(1)
    assert (counted == 24).sum() == 30 and len(data.notes) == 2


def test_packed_conversations_never_see_each_other(talks):
    from llmtrain.errors import UserError

    with pytest.raises(UserError, match="document_mask"):
        RunConfig.load({"data": {"train": [talks], "document_mask": False}})
    assert RunConfig.load({"data": {"train": [{"path": talks, "pack": False}], "document_mask": False}})


# --- what people are shown -------------------------------------------------------------------------------------------------------------


def test_inspect_shows_schema_bad_lines_and_what_counts(tmp_path, folder, capsys):
    from llmtrain.tools.data import main

    good = [json.dumps({"prompt": f"What is {n} + 5?", "response": f" It is {n + 5}."}) for n in range(9)]
    (tmp_path / "x.jsonl").write_text("\n".join([*good[:2], "{", *good[2:]]))
    words = ["inspect", str(tmp_path / "x.jsonl"), "--tokenizer", str(folder), "--template", "plain", "--seq-len", "64", "--documents", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "9 conversations, schema prompt_response, template plain" in out
    assert "bad: 1 records" in out and "x.jsonl:3: not valid JSON" in out
    assert "What is 0 + 5?« It is 5.<|im_end|>»" in out and "What is 1" not in out
    count, total = (int(n) for n in re.search(r"^(\d+) of (\d+) tokens count", out, re.MULTILINE).groups())
    found = samples(str(tmp_path / "x.jsonl"), folder, tmp_path, bad="skip", seq_len=64)
    assert (count, total) == (found.conversations.counts.sum(), found.tokens)
    assert f"packed to 64: {found.samples_per_epoch} rows an epoch" in out and "one a row of 64: 9 rows an epoch" in out
    assert re.search(r"tokens per conversation: least \d+.*\n +\d+ to \d+ +\d #", out)
    assert main([*words, "--loss", "all"]) == 0
    assert "«What is 0 + 5? It is 5.<|im_end|>»" in capsys.readouterr().out


def test_what_is_learnt_has_a_colour(tokenizer):
    from llmtrain.data.chat.inspect import LEARNT, painted
    from llmtrain.data.chat.render import Renderer
    from llmtrain.data.chat.template import find_template

    text = painted(Renderer(find_template("chatml", tokenizer), tokenizer)(QA))
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNT] == ["«a<|im_end|>»"]


@pytest.mark.parametrize("learn", [np.ones(5, bool), np.ones(4, np.int64)])
def test_what_a_plugin_s_source_wants_learnt_is_checked(learn):
    class Given:
        samples_per_epoch = 2

        def __init__(self, learn):
            self.learn = learn

        def sample(self, index):
            return Sample(np.arange(5), np.empty(0, np.int64), self.learn)

    half = np.array([True, False, True, False])
    checked = CheckedSource(SimpleNamespace(kind="given"), Given(half), seq_len=4)
    assert to_batch([checked.sample(0)], indices=[0], document_mask=False).targets.tolist() == [[1, NO_TARGET, 3, NO_TARGET]]
    with pytest.raises(DataError, match="it must be 4 bools"):
        CheckedSource(SimpleNamespace(kind="given"), Given(learn), seq_len=4)

"""Transcripts in ASCEND's layout, and CSV columns, as inputs of every verb that reads text."""

import pytest

from llmtrain.data.ascend import normalise
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import ReadOptions, expand
from llmtrain.data.tokenize import tokenize
from llmtrain.stages.gap_texts import read_texts

HEAD = "id,path,transcription,duration,language,original_speaker_id,session_id,topic\n"
ROWS = [
    ("ses1_spk2_L2_3.0_1.0.wav", "“对 对”, 我在 study computer science。", "mixed", 1),
    ("ses1_spk1_L1_1.0_1.5.wav", "你好", "zh", 1),
    ("ses1_spk2_L10_9.0_1.0.wav", "okay, it's fine", "en", 1),
    ("ses2_spk3_L1_0.0_1.0.wav", "我 very happy", "mixed", 2),
    ("ses2_spk3_L2_1.0_1.0.wav", " ", "zh", 2),
]


def table(rows) -> str:
    quoted = [f'{n:05},waves/{path},"{text}",1.0,{language},1,{session},sports' for n, (path, text, language, session) in enumerate(rows)]
    return HEAD + "\n".join(quoted) + "\n"


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "train_metadata.csv").write_text(table(ROWS), encoding="utf-8")
    (tmp_path / "test_metadata.csv").write_text(table(ROWS[3:4]), encoding="utf-8")
    return tmp_path


def test_a_session_is_a_document_in_the_order_of_its_lines(corpus):
    first, second = read_texts([f"ascend:{corpus}"], ReadOptions())
    assert first.splitlines() == ["你好", "“对 对”, 我在 study computer science。", "okay, it's fine"]
    assert second == "我 very happy\n", "utterances without text are left out"


def test_language_split_and_normalisation(corpus):
    mixed = read_texts([f"ascend:{corpus}?language=mixed&normalise=yes&split=train,test"], ReadOptions())
    assert mixed == ["对 对 我在 STUDY COMPUTER SCIENCE\n", "我 VERY HAPPY\n", "我 VERY HAPPY\n"]
    assert normalise("It's  OK, 好吗？") == "IT'S OK 好吗"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?split=dev", "split=dev: 'dev' is none of train, validation, test"),
        ("?speaker=1", "no option 'speaker'; allowed are split, language, normalise"),
        ("?split=validation", "there is no .*validation_metadata.csv"),
    ],
)
def test_what_is_not_there(corpus, query, message):
    with pytest.raises(DataError, match=message):
        expand([f"ascend:{corpus}{query}"], ReadOptions())


def test_a_table_of_something_else(corpus):
    (corpus / "train_metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has no column 'transcription'; it has 'a', 'b'"):
        read_texts([f"ascend:{corpus}"], ReadOptions())


def test_tokenize_reads_it(corpus, tmp_path):
    from llmtrain.data.token_file import TokenFile
    from llmtrain.data.tokenizer import load
    from llmtrain.data.train_tokenizer import train_sentencepiece

    model = train_sentencepiece([f"ascend:{corpus}"], str(tmp_path / "t.model"), vocab_size=310, options=ReadOptions())
    report = tokenize([f"ascend:{corpus}?language=mixed"], str(tmp_path / "out"), tokenizer=str(model), options=ReadOptions(), workers=1)
    assert report.outputs[str(tmp_path / "out")][0] == 2
    text = load(model).decode(TokenFile(tmp_path / "out").document(1)[:-1].tolist())
    assert text.strip() == "我 very happy"
    again = tokenize([f"ascend:{corpus}"], str(tmp_path / "out"), tokenizer=str(model), options=ReadOptions(), workers=1)
    assert not again.up_to_date, "another choice of utterances is another input"


def test_columns_of_csv_files(tmp_path):
    (tmp_path / "a.csv").write_text('id,code\n1,"x = 1\ny = 2"\n2,z\n3\n', encoding="utf-8-sig")
    assert read_texts([str(tmp_path / "a.csv")], ReadOptions(field="code", bad="skip")) == ["x = 1\ny = 2", "z"]
    with pytest.raises(DataError, match="line 5: the row ends before column 'code'"):
        read_texts([str(tmp_path / "a.csv")], ReadOptions(field="code"))
    with pytest.raises(DataError, match=r"has no column 'text' .*'id', 'code'"):
        read_texts([str(tmp_path / "a.csv")], ReadOptions())
    (tmp_path / "b.txt").write_text("b")
    assert [file.path for file in expand([str(tmp_path)], ReadOptions())] == [str(tmp_path / "b.txt")], (
        "folders are not searched for tables"
    )

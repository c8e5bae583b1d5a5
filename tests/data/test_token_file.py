"""The .bin/.idx pair: byte layout, round trip, and every damage that is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.errors import DataError
from llmtrain.data.token_file import TokenFile, TokenWriter, token_dtype

# Two documents, [7, 258] and [3], written out by hand after Megatron-LM's indexed_dataset.py.
BIN = bytes.fromhex("0700 0201 0300")
IDX = bytes.fromhex(
    "4d4d49444944580000"  # MMIDIDX\0\0
    "0100000000000000"  # version 1
    "08"  # uint16
    "0200000000000000"  # sequences
    "0300000000000000"  # document indices
    "02000000 01000000"  # lengths
    "0000000000000000 0400000000000000"  # pointers
    "0000000000000000 0100000000000000 0200000000000000"  # document indices
)


def write(prefix, documents, dtype=np.uint16):
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def test_byte_layout_written_and_read(tmp_path):
    write(tmp_path / "ours", [[7, 258], [3]])
    assert (tmp_path / "ours.bin").read_bytes() == BIN
    assert (tmp_path / "ours.idx").read_bytes() == IDX
    (tmp_path / "theirs.bin").write_bytes(BIN)
    (tmp_path / "theirs.idx").write_bytes(IDX)
    file = TokenFile(tmp_path / "theirs")
    assert [file.document(i).tolist() for i in range(len(file))] == [[7, 258], [3]]
    assert file.offsets().tolist() == [0, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65_499), max_size=9), max_size=9), st.sampled_from([np.uint16, np.int32, np.int64]))
def test_round_trip(tmp_path_factory, documents, dtype):
    prefix = write(tmp_path_factory.mktemp("pair") / "x", documents, dtype)
    file = TokenFile(prefix)
    file.validate(65_500)
    assert file.dtype == dtype
    assert [file.document(i).tolist() for i in range(len(file))] == documents


def test_documents_of_several_sequences(tmp_path):
    """Megatron allows several sequences per document; a document is then all of them."""
    index = bytearray(IDX[:26] + (2).to_bytes(8, "little") + IDX[34:58] + (0).to_bytes(8, "little") + (2).to_bytes(8, "little"))
    (tmp_path / "x.bin").write_bytes(BIN)
    (tmp_path / "x.idx").write_bytes(index)
    file = TokenFile(tmp_path / "x")
    assert len(file) == 1
    assert file.document(0).tolist() == [7, 258, 3]
    assert file.offsets().tolist() == [0, 3]


def test_dtype_follows_megatrons_rule():
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def test_appended_files_equal_one_written_at_once(tmp_path):
    write(tmp_path / "a", [[1, 2], []])
    write(tmp_path / "b", [[3]])
    with TokenWriter(tmp_path / "both", np.uint16) as writer:
        writer.append_file(tmp_path / "a")
        writer.append_file(tmp_path / "b")
    write(tmp_path / "once", [[1, 2], [], [3]])
    for end in ("bin", "idx"):
        assert (tmp_path / f"both.{end}").read_bytes() == (tmp_path / f"once.{end}").read_bytes()


def damaged(tmp_path, *, bin_=BIN, idx=IDX):
    (tmp_path / "x.bin").write_bytes(bin_)
    (tmp_path / "x.idx").write_bytes(idx)
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"bin_": BIN[:-1]}, r"x\.bin: truncated: 5 bytes, its index needs 6"),
        ({"bin_": BIN + b"xx"}, r"x\.bin: 8 bytes, but its index ends at 6"),
        ({"idx": IDX[:20]}, r"x\.idx: truncated: 20 bytes"),
        ({"idx": IDX[:-1]}, r"x\.idx: .* need 82"),
        ({"idx": b"PARQUET\0\0" + IDX[9:]}, r"x\.idx: not a Megatron index"),
        ({"idx": IDX[:9] + b"\2" + IDX[10:]}, r"x\.idx: index version 2"),
        ({"idx": IDX[:17] + b"\6" + IDX[18:]}, r"x\.idx: token dtype code 6"),
        ({"idx": IDX[:-8] + b"\1" + IDX[-7:]}, r"x\.idx: document indices run from 0 to 1, not from 0 to 2"),
    ],
)
def test_damage_names_the_file(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        TokenFile(damaged(tmp_path, **files))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.bin: no such file"):
        TokenFile(tmp_path / "nothing")


def test_pointers_that_jump_are_found(tmp_path):
    idx = IDX[:34] + b"\1" + IDX[35:38] + b"\2" + IDX[39:]  # lengths 1 and 2, pointers 0 and 4
    file = damaged(tmp_path, bin_=BIN + b"\0\0", idx=idx)
    with pytest.raises(DataError, match=r"sequence 1 does not begin"):
        TokenFile(file).validate()


def test_id_outside_the_vocabulary(tmp_path):
    file = TokenFile(write(tmp_path / "x", [[7, 258], [3]]))
    file.validate(259)
    with pytest.raises(DataError, match=r"x\.bin: token 1 is 258, but the vocabulary has 258 ids"):
        file.validate(258)


def test_id_that_does_not_fit_the_dtype(tmp_path):
    with pytest.raises(DataError, match="token ids 1 to 65536 do not fit uint16"):
        write(tmp_path / "x", [[1, 65_536]])
    assert not list(tmp_path.iterdir())  # nothing half written stays

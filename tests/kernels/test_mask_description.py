"""The mask description."""

import subprocess
import sys

import pytest
from llmtrain_kernels.mask import Mask


def test_equal_masks_are_one_key():
    assert {Mask(documents=((2, 3),)): 1}[Mask(documents=((2, 3),))] == 1
    assert Mask() != Mask(causal=False)


def test_it_is_frozen_and_checked_only_when_used():
    mask = Mask(documents=((2, 3), (4,)))
    with pytest.raises(AttributeError):
        mask.causal = False
    with pytest.raises(ValueError, match=r"documents\[1\]=\(4,\) sums to 4; .* sum to 5"):
        mask.check(rows=2, end=5)


def test_long_layouts_are_shortened_in_errors():
    with pytest.raises(ValueError, match=r"1, \.\.\. 100 documents\)"):
        Mask(documents=((1,) * 100,)).check(rows=1, end=99)


@pytest.mark.parametrize(("end", "documents"), [(5, (2, 3)), (4, (2, 2)), (2, (2,)), (1, (1,))])
def test_clipping(end, documents):
    assert Mask(documents=((2, 3),), window=2).clipped(end) == Mask(documents=(documents,), window=2)


def test_it_needs_no_torch():
    code = "import sys, llmtrain_kernels.mask; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_made_of_a_mask_is_made_once():
    mask, made = Mask(documents=((2, 3),)), []
    assert [mask.once("sum", lambda mask: made.append(mask) or 5) for _ in range(3)] == [5, 5, 5] and made == [mask]
    assert mask.windowed(2) is mask.windowed(2) == Mask(documents=((2, 3),), window=2)
    assert mask == Mask(documents=((2, 3),)) and hash(mask) == hash(Mask(documents=((2, 3),)))

"""`llmtrain kernels`."""

import pytest

from llmtrain.errors import UserError
from llmtrain.tools.kernels import main


def test_the_table_names_choice_and_reason(capsys):
    assert main(["--device", "cpu", "--dtype", "fp64", "--lse"]) == 0
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert ["attention", "reference", "chosen", "the fastest that serves"] in lines
    assert ["attention", "sdpa", "refused", "returns no log-sum-exp"] in lines


def test_an_unknown_device_is_a_user_error():
    with pytest.raises(UserError, match="did you mean npu"):
        main(["--device", "npx"])

"""The table of errors: none may rise over docs/plan-errors.md, and nothing that may not be fitted is."""

from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.simulate.errors import check, digest, families, run
from llmtrain.simulate.fit import chosen, fit
from llmtrain.simulate.published import DATA, GATED, family_of, memory_error, read
from llmtrain.simulate.rates import Rates, fitted, stored
from llmtrain.simulate.step import price
from llmtrain.tools.plan.error_table import committed, page

PAGE = Path(__file__).parents[2] / "docs" / "plan-errors.md"


@pytest.fixture(scope="module")
def report():
    return run()


def test_no_error_rises_over_the_committed_table(report):
    before, now = committed(PAGE.read_text()), committed(page(report))
    assert before.keys() == now.keys()
    for source, (time, memory) in before.items():
        if source == "pairs":
            assert now[source][0] >= time - 0.0006
            continue
        for old, new in ((time, now[source][0]), (memory, now[source][1])):
            assert (old is None) == (new is None)
            assert old is None or new <= old + 0.0006, f"{source}: {new:.1%}, committed is {old:.1%}"


def test_the_page_is_the_generated_one(report):
    assert PAGE.read_text() == page(report)


def test_stored_rates_are_of_this_data_and_leave_every_family_out():
    assert stored()["data"] == digest()
    assert set(stored()["without"]) == set(families(read()))
    assert all(fitted(name) != fitted() for name in families(read()))


def test_a_family_is_not_fitted_to_its_own_rows():
    """Refitting without a family from the stored numbers changes nothing that matters; from its rows it would."""
    rows = [row for row in read() if row.gated and row.seconds]
    name = "Korthikanti et al. 2022"
    own, others = ([row for row in rows if (row.family == name) == mine] for mine in (True, False))
    again = fit(others, start=fitted(name), rounds=1)
    for row in own:
        case = chosen(row, fitted(name))
        assert price(case, again).seconds == pytest.approx(price(case, fitted(name)).seconds, rel=0.02)


def test_recalled_rows_are_shown_and_nothing_else(report):
    assert {one.published.row["provenance"] for one in report.shown}.isdisjoint(GATED)
    assert all(row.published.gated for source in report.sources for row in source.rows)


FAMILIES = {
    "MindSpeed-LLM 1.0.RC3 README figure": "MindSpeed-LLM 1.0.RC3 README",
    "Korthikanti et al. 2022 Fig. 7": "Korthikanti et al. 2022",
    "Korthikanti et al. 2022 Table 5 (arXiv 2205.05198)": "Korthikanti et al. 2022",
    "torchtitan benchmarks (Trainy/WhiteFiber)": "torchtitan benchmarks",
    "Megatron-Bridge performance summary 26.02": "Megatron-Bridge performance summary",
    "MindSpeed-LLM CI baseline (2.2.0)": "MindSpeed-LLM CI baseline",
}


@pytest.mark.parametrize(("source", "family"), FAMILIES.items())
def test_tables_and_figures_of_one_publication_are_one_family(source, family):
    assert family_of(source) == family


def test_every_row_says_where_it_is_from():
    rows = read()
    assert len(rows) == 191
    assert all(row.row["locator"] and row.row["provenance"] for row in rows)
    assert all(row.cases or row.reason for row in rows)


def test_other_rows_are_read_by_the_same_columns(tmp_path):
    """A file of its own: a source that the project has not seen, with what is not known left empty."""
    head = DATA.read_text().splitlines()[0]
    line = dict.fromkeys(head.split(","), "")
    line |= {"id": "X1", "source": "elsewhere", "provenance": "file", "model": "Llama-3-8B", "hardware": "H100", "n_dev": "8", "tp": "2"}
    line |= {"framework": "Megatron-Core", "precision": "bf16", "pp": "1", "seq": "8192", "gbs": "128", "mbs": "1", "step_s": "20"}
    path = tmp_path / "others.csv"
    path.write_text(head + "\n" + ",".join(line.values()) + "\n")
    rows = run(path).sources[0].rows
    assert rows[0].predicted == price(rows[0].case, fitted()).seconds and rows[0].case.dp == 4
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns"):
        run(path)
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "none.csv")


def test_rates_decide():
    """A check that cannot fail would check nothing: other rates give other errors."""
    rows = [row for row in read() if row.id in ("P083", "P009")]
    for row in rows:
        slow = price(row.cases[0], Rates(matrix_nvidia=0.4, matrix_ascend=0.4)).seconds
        assert slow > 1.3 * price(row.cases[0], Rates()).seconds
    assert len(check(rows).sources) == 2


def test_memory_is_compared_per_rank():
    row = next(row for row in read() if row.id == "P069")
    assert row.row["mem_gib"].count("|") == 7 and 0 < memory_error(row) < 0.15

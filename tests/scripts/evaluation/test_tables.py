"""The tables of results in a terminal, compared with tables by hand."""

import math

from scripts.evaluation import tables
from scripts.evaluation.perplexity import Predicted
from scripts.evaluation.statistics import Paired

SCORE = {"n": 1234, "chance": 0.25, "acc": 0.5, "stderr": 0.012, "acc_norm": 0.475, "p": 0.2}
LONG = "a_name_that_is_longer_than_the_column_of_a_model"


def test_a_line_an_exam_and_a_column_a_model():
    """In the order of the command line; subjects are indented and have an adjusted p."""
    first = {"cmmlu": SCORE, "cmmlu/law": SCORE | {"n": 8, "p": 0.001, "p_holm": 0.04}, "arc": SCORE | {"p": None}}
    second = {name: SCORE | {"acc": 0.75, "acc_norm": None, "p": 0.05} for name in first}
    lines = tables.score_table({"b": first, LONG: second}).splitlines()
    column = len("cmmlu")
    assert lines[0] == " " * (column + 17) + "  " + "b".ljust(31) + "…" + LONG[-29:]
    assert lines[1].split() == ["n", "chance", *["acc", "norm", "p"] * 2]
    assert [line.split() for line in lines[2:5]] == [
        ["cmmlu", "1,234", "25.0", "50.0", "±", "1.2", "47.5", "0.2", "75.0", "±", "1.2", "-", "0.05"],
        ["law", "8", "25.0", "50.0", "±", "1.2", "47.5", "0.04*", "75.0", "±", "1.2", "-", "0.05"],
        ["arc", "1,234", "25.0", "50.0", "±", "1.2", "47.5", "75.0", "±", "1.2", "-", "0.05"],
    ]
    assert lines[3].startswith("  law ")
    assert lines[1].index("n") == lines[2].index("4 ")  # figures are aligned
    assert lines[1].index("acc") + 3 == lines[2].index("50.0") + 4
    assert lines[1].rindex("acc") + 3 == lines[2].index("75.0") + 4
    assert "\n".join(lines[5:]) == tables.LEGEND


def test_names_as_long_as_a_column_lose_their_beginning():
    for length, shown in ((30, "x" * 30), (31, "…" + "x" * 29), (40, "…" + "x" * 29)):
        found = tables.position_table({"x" * length: {"arc": {}}})
        assert found.splitlines()[1] == f"  {shown}, arc: "


def test_places_of_each_model_and_benchmark_in_turn():
    shares = {"A": {"chosen": 1.0, "right": 0.25}, "B": {"chosen": 0.0, "right": 0.75}}
    assert tables.position_table({"b": {"siqa": shares, "arc": {}}, "a": {"arc": shares}}).splitlines() == [
        "share of answers by place: chosen / right",
        "  b, siqa: A 100.0 / 25.0, B 0.0 / 75.0",
        "  b, arc: ",
        "  a, arc: A 100.0 / 25.0, B 0.0 / 75.0",
    ]


def test_texts_that_were_predicted():
    found = Predicted(texts=3, tokens=2000, bytes=4000, nats=4000 * math.log(2))
    first, *lines = tables.predicted_table([("b", "z.txt", found), ("a", "y.txt", found)]).splitlines()
    assert first.split() == ["bits/byte", "nats/token", "tokens", "bytes", "file"]
    assert [line.split() for line in lines] == [
        ["b", "1.0000", "1.3863", "2,000", "4,000", "z.txt"],
        ["a", "1.0000", "1.3863", "2,000", "4,000", "y.txt"],
    ]
    assert first.index("tokens") + 6 == lines[0].index("2,000") + 5


def test_two_models_that_were_compared():
    pairs = {"siqa": Paired(1000, 20, 45, 0.025, 0.008, 0.0026), "arc": Paired(10, 2, 1, -0.1, 0.17, 0.05)}
    assert tables.compared_table([("b", "a", pairs)]).splitlines() == [
        "a against b",
        "  siqa: +2.5 ± 0.8 points, right alone 45 and 20 of 1,000, p 0.0026*",
        "  arc: -10.0 ± 17.0 points, right alone 1 and 2 of 10, p 0.05",
        "p: McNemar's exact test; * below 0.05",
    ]

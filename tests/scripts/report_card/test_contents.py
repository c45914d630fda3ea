"""The contents of a report on hand-made inputs: which sections it has, and the wording of each field."""

from pathlib import Path

from scripts.report_card.contents import (
    NOTHING,
    Cell,
    benchmark,
    exams,
    predicted_text,
    sections,
    side_by_side,
    training,
)
from scripts.report_card.stages_found import Found

PREDICTED = {"texts": 2, "tokens": 100, "bytes": 300, "nats": 207.94415416798357}  # 300 bits


def found(name: str, **about) -> Found:
    return Found(name, Path(f"/out/{name}.pth"), about)


def texts(row: list[Cell]) -> list[str]:
    return [cell.text for cell in row]


def test_who_chats_is_whoever_was_taught_to_answer():
    names = ("pretrain_512", "full_sft_512_moe", "rlhf_768", "lora/identity_512", "my_own")
    assert [found(name).chats for name in names] == [False, True, True, True, True]
    assert [found(name).stage for name in names] == ["pretrain", "full_sft", "rlhf", "lora", "my_own"]


def test_training_is_told_by_the_json_beside_the_weights():
    about = {"step": 1234, "tokens": 7_281_920, "seconds": 183.2, "data_path": "/data/a.jsonl"}
    stage = found("full_sft_512", **about, metrics={"loss": 1.5, "eval_loss": 2.25})
    section = training([stage], {"full_sft_512": {"parameters": {"parameters": 25_829_888}}})
    assert texts(section.rows[0]) == (
        ["full_sft_512", "25.83 M", "1,234", "7.28 M", "3.1 min", "1.5000", "2.2500", "a.jsonl"]
    )


def test_what_a_json_does_not_say_or_says_wrongly_is_left_open():
    strange = found("x_1", step="many", tokens=None, seconds=True, metrics=[1], data_path=7)
    for stage in (found("x_1"), strange):
        assert texts(training([stage], {}).rows[0])[1:] == [NOTHING] * 7


def test_a_mixture_is_told_by_its_files():
    for mix, told in (([["/data/a.jsonl", 0.7], ["b.jsonl", 0.3]], "a.jsonl, b.jsonl"), ([7, []], NOTHING)):
        assert texts(training([found("x_1", data_path=None, mix=mix)], {}).rows[0])[-1] == told


def test_bits_per_byte_stand_beside_a_bar_that_is_longest_for_the_worst():
    section = predicted_text({"a": PREDICTED, "b": PREDICTED | {"nats": PREDICTED["nats"] / 2}}, "held.jsonl")
    assert section.note.startswith("held.jsonl: 2 texts, 300 bytes.")
    assert section.rows[0] == [Cell("a"), Cell("1.000", 1.0), Cell("2.079")]
    assert section.rows[1] == [Cell("b"), Cell("0.500", 0.5), Cell("1.040")]


def test_exams_have_a_column_a_language_and_a_gap_where_one_was_not_asked():
    results = {
        "full_sft_256": {"exam eval_facts.jsonl": {"en": [3, 4], "zh": [1, 2]}},
        "lora/identity_256": {
            "exam eval_facts.jsonl": {"en": [0, 4], "zh": [2, 2]},
            "exam eval_lora_identity.jsonl": {"en": [1, 8]},
        },
        "pretrain_256": {},
    }
    section = exams(results)
    assert section.columns == ("", "facts, en (4)", "facts, zh (2)", "who it is now, en (8)")
    assert section.rows == [
        [Cell("full_sft_256"), Cell("75.0%", 0.75), Cell("50.0%", 0.5), Cell(NOTHING)],
        [Cell("lora/identity_256"), Cell("0.0%", 0.0), Cell("100.0%", 1.0), Cell("12.5%", 0.125)],
    ]


def test_a_score_stands_beside_chance_and_says_whether_it_differs():
    score = {"n": 1200, "acc": 0.264, "acc_norm": 0.25, "stderr": 0.0127, "chance": 0.25, "p": 0.26}
    open_ended = {"n": 9, "acc": 0.5, "acc_norm": None, "stderr": 0.1, "chance": None, "p": None}
    section = benchmark("cmmlu", {"a": {"cmmlu": score}, "b": {"cmmlu": score | {"acc": 0.3, "p": 0.0001}}})
    assert "1,200 questions. Chance level: 25.0%." in section.note
    assert section.rows[0] == [Cell("a"), Cell("26.4% ± 1.3%", 0.264, 0.25), Cell("25.0%"), Cell("0.26")]
    assert section.rows[1][-1] == Cell("0.0001 *")
    assert benchmark("own", {"a": {"own": open_ended}}).rows[0][2:] == [Cell(NOTHING), Cell(NOTHING)]


def test_answers_to_one_question_stand_together():
    said = {"pretrain_8": {"The sky": "is"}, "full_sft_8": {"Who?": "I."}, "rlhf_8": {"Who?": "Me."}}
    assert side_by_side(said) == [
        ("Who?", [("full_sft_8", "I."), ("rlhf_8", "Me.")]),
        ("The sky", [("pretrain_8", "is")]),
    ]


def test_only_what_there_is_has_a_section():
    stage = found("full_sft_8")
    assert [s.title for s in sections([stage], {}, {}, None, drawn=False)] == ["Training"]
    results = {"full_sft_8": {"answers": {"Who?": "I."}, "held out": PREDICTED}}
    whole = [s.title for s in sections([stage], results, {"x": "damaged"}, "t", drawn=True)]
    assert whole == ["Training", "Losses", "Bits per byte", "Answers", "Not evaluated"]

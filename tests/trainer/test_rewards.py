"""trainer/rewards.py: the value of each rule, attempts to cheat, and the syntax of --rewards."""

import pytest

from trainer.errors import UserError
from trainer.rewards import (
    REWARDS,
    Reply,
    accuracy_reward,
    format_reward,
    judge,
    language_reward,
    length_reward,
    read_rewards,
    repetition_reward,
    steps_reward,
)

GOOD = "<think>\n12 + 30 = 42\n</think>\n<answer>\n42\n</answer>"


def reply(text: str, expected="42", question="What is 12 + 30?", tokens=(1, 2, 3), finished=True, limit=64) -> Reply:
    return Reply([{"role": "user", "content": question}], text, expected, tokens, finished, limit)


def test_a_good_answer_gets_everything():
    assert format_reward(reply(GOOD)) == accuracy_reward(reply(GOOD)) == 1
    assert accuracy_reward(reply("42.")) == 1  # a model that has never been trained on thoughts
    assert format_reward(reply("42.")) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n42\n</think>\n<answer>\n41\n</answer>",  # it is only in the thought
        "<think>\n42\n</think>",
        "<think>\n42",
        "<think>\n1\n</think>\n<answer>\n41 or 42\n</answer>",
        "<think>\n1\n</think>\n<answer>\n41\n42\n</answer>",
        "<think>\n1\n</think>\n<answer>\n41\n</answer>\n<answer>\n42\n</answer>",
        "<think>\n1\n</think>\n<answer>\n42\n</answer>\n<answer>\n42\n</answer>",
        "<think>\n1\n</think>\n<think>\n1\n</think>\n<answer>\n42\n</answer>",
        "<think>\n1\n</think>\n<answer>\n<answer>\n42\n</answer>",
        "<think>\n\n</think>\n<answer>\n42\n</answer>",  # the thought is empty
        "<think>\n \n</think>\n<answer>\n42\n</answer>",
        "<answer>\n42\n</answer>\n<think>\n1\n</think>",
        "<answer>\n42\n</answer>",
        "<think>\n1\n</think>\n<answer>\n42\n</answer>\n43",
        "42\n<think>\n1\n</think>\n<answer>\n43\n</answer>",
        "<think>\n<answer>\n42\n</answer>\n</think>\n43",
        "41 42",
    ],
)
def test_an_answer_that_cheats_gets_nothing(text):
    assert accuracy_reward(reply(text)) == 0


@pytest.mark.parametrize(
    "text", [GOOD[:-1], f"{GOOD}\n", GOOD.replace("\n", " "), "<think>\n \n</think>\n<answer>\n42\n</answer>", ""]
)
def test_the_form_is_exact(text):
    assert format_reward(reply(text)) == 0


def test_white_space_around_the_tags_costs_the_form_and_not_the_answer():
    loose = "<think>12 + 30 = 42</think> <answer> 42 </answer>"
    assert (format_reward(reply(loose)), accuracy_reward(reply(loose))) == (0, 1)


def test_an_answer_that_was_cut_off_is_neither_right_nor_in_form():
    assert format_reward(reply(GOOD, finished=False)) == accuracy_reward(reply(GOOD, finished=False)) == 0
    assert length_reward(reply(GOOD, finished=False)) == -1


def test_length_costs_from_three_quarters_of_the_limit_on():
    costs = [length_reward(reply(GOOD, tokens=range(n), limit=64)) for n in (1, 48, 52, 56, 64)]
    assert costs == [0, 0, -0.25, -0.5, -1]


@pytest.mark.parametrize(
    ("thought", "share"),
    [
        ("12 + 30 = 42\n42 - 5 = 37", 1),
        ("12 + 30 = 43\n43 - 5 = 38", 1 / 2),  # the second continues from the first's value
        ("12+30=42 42 × 5 = 210, 210*5 = 1050", 1),
        ("12 + 31 = 43", 0),  # no answer was 31
        ("1 + 1 = 2\n2 + 2 = 4\n12 + 30 = 42", 1 / 3),
        ("12 + 30 = 42\n12 + 30 = 42", 1 / 2),  # counts once
        ("12 - 30 = 18", 0),
        ("forty-two", 0),
        ("", 0),
    ],
)
def test_steps_are_equations_that_follow(thought, share):
    asked = {"question": "What is 12 + 30 - 5?", "expected": "37"}
    assert steps_reward(reply(f"<think>\n{thought}\n</think>\n<answer>\n1\n</answer>", **asked)) == pytest.approx(share)
    assert steps_reward(reply(f"<think>\n{thought}", **asked)) == 0
    assert steps_reward(reply(thought, **asked)) == 0


def test_repetition_counts_the_four_grams_that_occurred_before():
    assert repetition_reward(reply("", tokens=range(9))) == 0
    assert repetition_reward(reply("", tokens=[1, 2, 3, 4] * 2)) == pytest.approx(-1 / 5)
    assert repetition_reward(reply("", tokens=[7] * 103)) == pytest.approx(-0.99)
    assert repetition_reward(reply("", tokens=[1, 2])) == 0


def test_the_language_is_the_questions():
    mixed = "<think>\n四 apples\n</think>\n<answer>\n42\n</answer>"
    assert language_reward(reply(mixed)) == pytest.approx(6 / 7)
    assert language_reward(reply(mixed, question="12 加 30 是多少？")) == pytest.approx(1 / 7)
    assert language_reward(reply(GOOD, question="12 加 30 是多少？")) == 1  # no letters except in the tags


def test_rules_are_picked_by_name_and_weighed(monkeypatch, tmp_path):
    (tmp_path / "my_rules.py").write_text("def halves(reply):\n    return len(reply.text) / 2\n\nlevel = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = read_rewards(["format:0.2", "accuracy", "my_rules:halves:-1.5", "my_rules:halves:2"][:3])
    assert [(reward.name, reward.weight) for reward in rewards] == [("format", 0.2), ("accuracy", 1), ("halves", -1.5)]
    assert judge(reply("42"), rewards) == [0, 1, 1]
    assert read_rewards(["my_rules:halves"])[0].weight == 1


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["beauty:1"], "choose from format, accuracy, length, repetition, language, steps"),
        (["nowhere:rule:1"], "nowhere cannot be imported"),
        (["json:nothing:1"], "json has no function nothing"),
        (["accuracy:nan"], "NAME:WEIGHT"),
        (["accuracy:1", "accuracy:2"], "twice"),
        ([":1"], "NAME:WEIGHT"),
    ],
)
def test_what_is_wrong_with_the_rewards_is_said_in_a_line(parts, words):
    with pytest.raises(UserError, match=words) as error:
        read_rewards(parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), None, "1", float("inf")])
def test_a_rule_that_gives_no_number_is_named(value):
    (plain,) = read_rewards(["accuracy"])
    with pytest.raises(UserError, match="the reward accuracy gave"):
        judge(reply(GOOD), [plain._replace(rule=lambda _: value)])


def test_every_rule_takes_an_empty_answer():
    for rule in REWARDS.values():
        assert rule(reply("", tokens=())) in (0, 1)

"""scripts/tools.py and scripts/tool_use/: schemas, the built-in tools, the loop that runs them, and both front ends."""

import json
import math
import random
from typing import Literal

import pytest

from scripts.tool_use.builtin import BUILT_IN, convert_units, registry_of, table
from scripts.tool_use.calculating import evaluate, written
from scripts.tool_use.react import TOO_MANY, act
from scripts.tool_use.registry import Registry, tool_of
from tests.running import call_script, run_script
from tests.scripts.openai_double import openai_double


def greet(name: str, times: int = 1, mood: Literal["glad", "sad"] = "glad", loud: bool = False) -> str:
    """Greet somebody,
    so many times.

    Args:
        name: who it is
        times: at most 3
    """
    if times > 3:
        raise ValueError("three times are enough")
    return f"{mood} {name} " * times


def test_the_schema_comes_from_signature_and_docstring():
    assert tool_of(greet).schema == {
        "name": "greet",
        "description": "Greet somebody, so many times.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "who it is"},
                "times": {"type": "integer", "description": "at most 3"},
                "mood": {"type": "string", "enum": ["glad", "sad"]},
                "loud": {"type": "boolean"},
            },
            "required": ["name"],
        },
    }
    with pytest.raises(TypeError, match="the parameter x has the type"):
        tool_of(lambda x: x)
    with pytest.raises(ValueError, match="two tools are named greet"):
        Registry([tool_of(greet), tool_of(greet)])


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("greet", {"name": "Ann", "times": 2}, "glad Ann glad Ann "),
        ("greet", {"name": "Ann", "times": 4}, "error: three times are enough"),
        ("greet", {"name": "Ann", "times": True}, "error: times must be of the type integer"),
        ("greet", {"name": "Ann", "mood": "odd"}, "error: mood must be one of glad, sad"),
        ("greet", {"times": 1}, "error: the argument 'name' is missing"),
        ("greet", {"name": "A", "x": 1}, "error: there is no argument 'x'; the arguments are name, times, mood, loud"),
        ("greet", None, "error: the arguments must be a JSON object"),
        ("other", {}, "error: there is no tool 'other'; the tools are greet"),
        ("greet", {"name": "x" * 9999}, "glad " + "x" * 1995 + "…"),
    ],
)
def test_whatever_a_call_asks_it_has_a_result(name, arguments, result):
    assert Registry([tool_of(greet)]).call(name, arguments) == result


def test_the_calculator_agrees_with_pythons_own_arithmetic():
    rng = random.Random(3)
    for _ in range(200):
        numbers = [str(rng.choice([rng.randint(1, 10**9), rng.randint(1, 9999) / 100])) for _ in range(4)]
        text = "".join(number + rng.choice("+-*/") for number in numbers)[:-1]
        assert math.isclose(evaluate(text), eval(text), rel_tol=1e-9, abs_tol=1e-6), text


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        *(("0.1 + 0.2", "0.3"), ("3×4÷6", "2"), ("（1−3）^3", "-8"), ("10/3", "3.33333333333"), ("sqrt(144)", "12")),
        *(
            ("2**-3", "0.125"),
            ("-7 // 2", "-4"),
            ("-7 % 3", "2"),
            ("min(3, 2) + max(1, 4) + abs(-1) + round(2.6)", "10"),
        ),
        ("123456789 * 987654321", "121932631112635269"),
    ],
)
def test_what_the_calculator_says(expression, result):
    assert written(evaluate(expression)) == result


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1 +", "x", "'a' * 3", "[1][0]", "True", "1j", "__import__('os')", "(1).real", "abs()", "sqrt(-1)"),
        *("9**9**9", "1e999", "1e308**9", "(2**2000)**2000", "1/0", "7 % 0", "0**-1", "(" * 150, "1+" * 200 + "1"),
        *("lambda: 1", "min(1)", "abs(1, 2)", "max(*[1])", "9" * 150 + "**" + "9" * 40),
    ],
)
def test_what_the_calculator_refuses_at_once(expression):
    with pytest.raises(ValueError, match=r"expression|calculated|large|zero|root"):
        evaluate(expression)


def test_calendar_units_and_table():
    tools = registry_of(["all"])
    assert [schema["function"]["name"] for schema in tools.schemas] == list(BUILT_IN)
    assert tools.call("calendar", {"date": "2024-02-28", "days": 2}) == "2024-03-01 Friday"
    assert tools.call("calendar", {"date": "2024-02-30"}).startswith("error: ")
    assert tools.call("calendar", {"date": "2024-02-28", "days": 10**12}).startswith("error: ")
    assert convert_units(90, "km/h", "m/s") == "25"
    assert convert_units(98.6, "F", "C") == "37"
    assert convert_units(26.2, "mi", "km") == "42.1648128"
    assert tools.call("convert_units", {"value": 1, "from_unit": "m", "to_unit": "kg"}).startswith("error: m cannot")
    name, count = next(iter(table().items()))
    assert tools.call("look_up", {"name": name.upper()}) == str(count)
    assert tools.call("look_up", {"name": "bread"}) == "error: there is no 'bread' in the table"


def scripted(*answers):
    asked, left = [], list(answers)

    def ask(talk):
        asked.append(list(talk))
        return left.pop(0)

    return ask, asked


def call(*expressions):
    calls = [{"name": "calculator", "arguments": {"expression": expression}} for expression in expressions]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_the_model_calls_sees_and_goes_on():
    question, end = {"role": "user", "content": "?"}, {"role": "assistant", "content": "5 and none"}
    ask, asked = scripted(call("2+3", "1/0"), end)
    told = []
    said = act(ask, [question], registry_of(["calculator"]), 5, lambda *pair: told.append(pair))
    results = [{"role": "tool", "content": text} for text in ("5", "error: division by zero")]
    assert said == [call("2+3", "1/0"), *results, end]
    assert asked == [[question], [question, *said[:3]]]
    assert told[0] == ('calculator({"expression": "2+3"})', "5")


def test_a_model_that_calls_without_end_is_stopped():
    ask, asked = scripted(*[call("1")] * 9)
    said = act(ask, [], registry_of(["calculator"]), 2)
    assert [turn["content"] for turn in said if turn["role"] == "tool"] == ["1", "1", TOO_MANY]
    assert len(asked) == 4


def test_the_script_lists_and_calls(capsys):
    call_script("scripts/tools.py")
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == list(BUILT_IN)
    call_script("scripts/tools.py", "calculator", '{"expression": "12 * 30"}')
    assert capsys.readouterr().out == "360\n"


def test_the_clients_loop_sends_results_back():
    wanted = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'}}
    with openai_double() as double:
        double.reply = lambda body: (
            ["It is ", body["messages"][-1]["content"]]
            if body["messages"][-1]["role"] == "tool"
            else [{"tool_calls": [wanted | {"index": 0}]}]
        )
        flags = ("--base_url", double.address, "--tools", "calculator")
        done = run_script("scripts/chat_openai_api.py", *flags, stdin="What is 6*7?\n")
    assert '[calculator({"expression": "6*7"}) = 42]' in done.stdout
    assert "It is 42" in done.stdout
    first, second = double.requests
    assert first["tools"][0]["function"]["name"] == "calculator"
    assert second["messages"][-2]["tool_calls"] == [wanted]
    assert second["messages"][-1] == {"role": "tool", "content": "42", "tool_call_id": "c1"}

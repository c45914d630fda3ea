"""scripts/serving/grammars.py: constrained answers from random weights, checked by jsonschema and re."""

import json
import re

import jsonschema
import pytest

from benchmarks.constrained import SCHEMAS
from model.inference.request import Request
from model.inference.scheduler import Engine
from model.tool_calls import split_calls
from scripts.serving.grammars import Grammars, calls_form, choice_form, pattern_form, schema_form
from tests.model.networks import network

PEOPLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "notes": {"type": "array", "items": {"type": "object"}},
        "age": {"type": "number"},
    },
    "required": ["name", "notes", "age"],
}
ADD = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}


@pytest.fixture(scope="module")
def grammars(tiny_tokenizer):
    return Grammars(tiny_tokenizer)


@pytest.fixture(scope="module")
def engine(tiny_tokenizer):
    return Engine(network(vocab_size=len(tiny_tokenizer), max_seq_len=512), tiny_tokenizer, slots=8)


def requests(constraint, count: int, most: int = 300, **settings) -> list[Request]:
    given = {"prompt": [1, 5, 9], "max_new_tokens": most, "temperature": 2.0, "constraint": constraint} | settings
    return [Request(seed=seed, **given) for seed in range(count)]


def test_fifty_schemas_from_random_weights(engine, grammars):
    assert len(SCHEMAS) == len({json.dumps(schema) for schema in SCHEMAS}) == 50
    asked = [request for schema in SCHEMAS for request in requests(grammars.make(schema_form(schema)), 3)]
    answers = engine.run(asked)
    for schema, answer in zip([schema for schema in SCHEMAS for _ in range(3)], answers, strict=True):
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.finish_reason == "stop"
    assert len({answer.text for answer in answers}) > len(answers) // 2


@pytest.mark.parametrize("most", [48, 90])
@pytest.mark.parametrize("schema", [PEOPLE, {"type": "object"}, {"type": "array", "items": {"type": "string"}}])
def test_what_is_open_is_closed_within_the_last_tokens(engine, grammars, schema, most):
    for answer in engine.run(requests(grammars.make(schema_form(schema)), 6, most)):
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.finish_reason == "stop"
        assert answer.count <= most


def test_what_cannot_be_closed_in_so_few_tokens_was_cut_off(engine, grammars):
    for answer in engine.run(requests(grammars.make(schema_form(PEOPLE)), 3, most=4)):
        assert (answer.finish_reason, answer.count) == ("length", 4)


def test_alone_and_in_company_an_answer_is_the_same(engine, grammars):
    constrained = [requests(grammars.make(schema_form(schema)), 1, 40)[0] for schema in (PEOPLE, *SCHEMAS[:3])]
    company = engine.run([*constrained, *requests(None, 3, 40)])
    alone = [engine.run([request])[0] for request in (*constrained, *requests(None, 3, 40))]
    assert [answer.text for answer in company] == [answer.text for answer in alone]


def test_drafts_change_nothing(tiny_tokenizer, grammars, engine):
    model = network(vocab_size=len(tiny_tokenizer), max_seq_len=512)
    drafting = Engine(model, tiny_tokenizer, slots=2, speculate=4)
    asked = requests(grammars.make(schema_form(PEOPLE)), 2, 60)
    assert [answer.text for answer in drafting.run(asked)] == [answer.text for answer in engine.run(asked)]


@pytest.mark.parametrize(
    "pattern", [r"\d+-\d+", r"[0-9]+-[0-9]+", r"[a-z/\"]{2,}@[a-z]+\.(com|org)", "(yes|no)\n.{0,5}", "为+"]
)
def test_a_pattern_is_matched_as_a_whole(engine, grammars, pattern):
    for answer in engine.run(requests(grammars.make(pattern_form(pattern), pattern=True), 4, 30)):
        assert re.fullmatch(pattern, answer.text)
        assert answer.finish_reason == "stop"


def test_one_of_several_texts(engine, grammars):
    choices = ["yes", 'no: "never"', "为 / perhaps\\"]
    texts = {a.text for a in engine.run(requests(grammars.make(choice_form(choices), pattern=True), 8))}
    assert texts <= set(choices)
    assert len(texts) > 1


@pytest.mark.parametrize("several", [True, False])
def test_forced_calls(engine, grammars, several):
    grammar = grammars.make(calls_form([ADD, {"name": "为"}], several))
    counts = set()
    for answer in engine.run(requests(grammar, 8, 120)):
        said, calls = split_calls(answer.text)
        assert said == ""
        assert answer.text.count("<tool_call>") == len(calls) >= 1
        counts.add(len(calls))
        for call in calls:
            assert call["name"] in ("add", "为")
            if call["name"] == "add":
                jsonschema.validate(call["arguments"], ADD["parameters"])
    assert (max(counts) > 1) == several


def test_penalties_and_probabilities_keep_to_the_form(engine, grammars):
    grammar = grammars.make(schema_form({"type": "array", "items": {"type": "boolean"}, "minItems": 9, "maxItems": 9}))
    settings = {"repetition_penalty": 1.5, "presence_penalty": 2.0, "top_k": 3, "top_p": 0.5, "logprobs": 2}
    (answer,) = engine.run(requests(grammar, 1, 100, **settings))
    assert len(json.loads(answer.text)) == 9
    assert all(token.logprob is not None for token in answer.tokens)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: schema_form({"type": "object", "properties": {"a": {"not": {}}}}), 'the schema keyword "not" is'),
        (lambda: schema_form({"if": {}, "then": {}}), 'the schema keyword "if", "then" is not supported'),
        (lambda: schema_form({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
        (lambda: schema_form({"type": "string", "format": "colour"}), "colour"),
        (lambda: schema_form({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: schema_form({"type": "text"}), "text"),
        (lambda: schema_form(False), "empty"),
        (lambda: pattern_form("(?=a)b"), "look-ahead"),
        (lambda: pattern_form("(a"), "unclosed group"),
        (lambda: calls_form([{"name": "f", "parameters": {"not": {}}}], True), 'f: the schema keyword "not"'),
    ],
)
def test_what_is_not_supported_is_named(make, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_grammar_is_made_once(grammars):
    form = schema_form({"type": "integer"})
    assert grammars.make(form) is grammars.make(form)

"""Fifty JSON schemas of the kinds that people ask for, all bounded, so that even random tokens come to an end."""

from typing import Any

WORD: dict[str, Any] = {"type": "string", "maxLength": 12}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 999}
SIGNED: dict[str, Any] = {"type": "integer", "minimum": -50, "maximum": 50}
SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
YES: dict[str, Any] = {"type": "boolean"}
DATE: dict[str, Any] = {"type": "string", "format": "date"}


def thing(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others; all of them are required unless it is said which."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def listed(item: dict[str, Any] | bool, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


PLACE = thing(city=WORD, country=one_of("FR", "CN", "为"))
TREE = {"$defs": {"leaf": thing(value=COUNT)}, **thing(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"})}
SCHEMAS: tuple[dict[str, Any], ...] = (
    WORD,
    COUNT,
    SIGNED,
    SHARE,
    YES,
    DATE,
    {"type": "null"},
    one_of("red", "green", "blue"),
    one_of(1, 2.5, None, True, "two"),
    {"const": {"a": [1, 2]}},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(yes|no)(, sir)?$"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"anyOf": [WORD, COUNT]},
    {"anyOf": [thing(kind={"const": "a"}, x=COUNT), thing(kind={"const": "b"}, y=WORD)]},
    {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "boolean"}]},
    {"allOf": [thing(a=COUNT, b=WORD), {"type": "object", "required": ["a"]}]},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    listed(COUNT),
    listed(WORD, most=4, least=2),
    listed(YES, most=8, least=8),
    listed(listed(SIGNED)),
    listed(one_of("a", "b")),
    listed({"type": "null"}, most=0),
    {"type": "array", "prefixItems": [WORD, COUNT], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [YES], "items": COUNT, "minItems": 1, "maxItems": 3},
    thing(),
    thing(name=WORD),
    thing(name=WORD, age=COUNT),
    thing(required=["name"], name=WORD, age=COUNT, mail=WORD),
    thing(required=[], a=YES, b=YES, c=YES),
    thing(name=WORD, place=PLACE),
    thing(people=listed(thing(name=WORD, age=COUNT))),
    thing(when=DATE, what=WORD, where=PLACE, whole_day=YES),
    thing(label=one_of("positive", "neutral", "negative"), confidence=SHARE),
    thing(steps=listed(WORD, least=1), answer={"type": ["number", "null"], "minimum": -9, "maximum": 9}),
    thing(姓名=WORD, 年龄=COUNT),
    thing(**{"a key with spaces": COUNT, 'quoted "so"': WORD, "back\\slash": YES}),
    thing(a=thing(b=thing(c=thing(d=COUNT)))),
    TREE,
    {"$defs": {"node": thing(required=[], next={"$ref": "#/$defs/end"}), "end": YES}, "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"id": COUNT}, "required": ["id", "tag"], "additionalProperties": WORD}
    | {"maxProperties": 3},
    {"type": "object", "patternProperties": {"^x[0-9]$": COUNT}, "additionalProperties": False, "maxProperties": 2},
    thing(title=WORD, tags=listed(WORD), rating={"type": "integer", "minimum": 1, "maximum": 5}, price=SHARE),
    thing(tool=one_of("search", "stop"), arguments=thing(required=["query"], query=WORD, limit=COUNT)),
)

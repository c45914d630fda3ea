"""Random request bodies, by seed: malformed ones, and ones that the OpenAPI document allows."""

import copy
import json
import math
import random
from collections.abc import Collection, Iterator

STRANGE = (
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e308, -1e308, 10**30, -(10**30), math.nan, math.inf, -math.inf),
    *("", "x", "\x00", "\ud800", "🙂", "x" * 3000, "</s>", "<image>", "null", "1"),
    *([], [[]], {}, [None], [{}], {"role": "user"}, ["a", 1], [1, 2, 3], [[1], ["a"]], {"type": "text"}),
)


def places(value, path=()) -> Iterator[tuple]:
    """The path to every value inside a JSON value, including itself."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def mutated(body: dict, order: random.Random) -> dict | list:
    """A copy with one to three values replaced, removed, duplicated or wrapped."""
    holder = [copy.deepcopy(body)]
    for _ in range(order.randint(1, 3)):
        path = order.choice([path for path in places(holder) if path])
        inside = holder
        for key in path[:-1]:
            inside = inside[key]
        key, how = path[-1], order.random()
        if how < 0.6:
            inside[key] = copy.deepcopy(order.choice(STRANGE))
        elif how < 0.75 and inside is not holder:
            del inside[key]
        elif how < 0.9:
            inside[key] = [inside[key]] * order.randint(0, 3)
        else:
            inside[key] = {"value": inside[key]}
    return holder[0]


def malformed_bodies(body: dict, count: int, seed: int) -> Iterator[bytes]:
    """Mutations of a valid body; some are also damaged as bytes."""
    order = random.Random(seed)
    for _ in range(count):
        data = json.dumps(mutated(body, order), ensure_ascii=order.random() < 0.5).encode("utf-8", "surrogatepass")
        if order.random() < 0.25:
            place = order.randrange(len(data) + 1)
            damage = order.choice([b"", b"\xff", b"\x00", b"{", b"}", b'"', b",", b"[" * 5000, order.randbytes(3)])
            data = data[:place] + damage + data[place + order.randint(0, 3) :]
        yield data


def bodies_by_schema(document: dict, operation: dict, count: int, seed: int, rarely: Collection[str] = ()) -> Iterator:
    """Bodies that the document's schema allows; one in five also has something that it does not allow.

    Args:
        rarely: fields that only one in twenty has, because they exclude each other.
    """
    order = random.Random(seed)
    whole = operation["requestBody"]["content"]["application/json"]["schema"]
    for _ in range(count):
        body = _draw(whole, document, order, 0)
        for part in (body, *body.get("messages", ())):
            for name in [name for name in part if name in rarely and order.random() > 0.05]:
                del part[name]
        yield mutated(body, order) if order.random() < 0.2 else body


def _draw(schema: dict, document: dict, order: random.Random, depth: int):
    if "$ref" in schema:
        return _draw(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document, order, depth)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return _draw(order.choice(schema[union]), document, order, depth)
    if "const" in schema or "enum" in schema:
        return order.choice(schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "object":
        required = schema.get("required", ())
        chosen = [name for name in schema.get("properties", ()) if name in required or order.random() < 0.4]
        return {name: _draw(schema["properties"][name], document, order, depth + 1) for name in chosen}
    if kind == "array":
        least = schema.get("minItems", 0)
        length = order.randint(least, min(schema.get("maxItems", 4), least + 3))
        return [_draw(schema["items"], document, order, depth + 1) for _ in range(length)]
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -9)), schema.get("maximum", 40)
        if kind == "integer":
            return order.randint(math.ceil(low), math.floor(high))
        return order.choice([high, (low + high) / 2, low + 0.1])
    if kind == "string":
        length = order.randint(schema.get("minLength", 0), 12)
        return "".join(order.choices('aé中🙂 \n"<s>\\', k=length))
    return {"boolean": order.random() < 0.5, "null": None}[kind]

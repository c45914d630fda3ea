"""The built-in tools: a calculator, a calendar, unit conversion, and a small table to look things up in."""

import datetime
import random
from fractions import Fraction

from scripts.tool_use.calculating import evaluate, written
from scripts.tool_use.registry import Registry, Tool, tool_of

UNITS = {  # of each quantity: how many of its first unit one of a unit is
    "length": {"m": "1", "km": "1000", "cm": "0.01", "mm": "0.001", "mi": "1609.344", "ft": "0.3048", "in": "0.0254"},
    "mass": {"kg": "1", "g": "0.001", "t": "1000", "lb": "0.45359237", "oz": "0.028349523125"},
    "time": {"s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "volume": {"l": "1", "ml": "0.001", "m3": "1000"},
    "speed": {"m/s": "1", "km/h": "5/18"},
}
DEGREES = ("C", "F", "K")
SYLLABLES = ("ba", "do", "fi", "ka", "lu", "me", "no", "ri", "sa", "tu", "vo", "zi")


def table(entries: int = 200) -> dict[str, int]:
    """The small table: invented things and the number in stock, the same in every process."""
    rng = random.Random(22)
    names: dict[str, int] = {}
    while len(names) < entries:
        names.setdefault("".join(rng.choice(SYLLABLES) for _ in range(3)), rng.randint(2, 999))
    return names


def calculator(expression: str) -> str:
    """Calculate an arithmetic expression exactly.

    Args:
        expression: such as 12 * (30 + 4)
    """
    return written(evaluate(expression))


def calendar(date: str, days: int = 0) -> str:
    """The date and the day of the week, so many days after a date.

    Args:
        date: YYYY-MM-DD, or today
        days: negative for before
    """
    day = datetime.date.today() if date.strip().lower() == "today" else datetime.date.fromisoformat(date.strip())
    try:
        day += datetime.timedelta(days=days)
    except OverflowError:
        raise ValueError("the calendar covers the years 1 to 9999") from None
    weekday = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[day.weekday()]
    return f"{day.isoformat()} {weekday}"


def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value from one unit to another: length, mass, time, volume, speed, temperature.

    Args:
        from_unit: such as km, kg, h, l, km/h, C
        to_unit: such as mi, lb, min, ml, m/s, F
    """
    number = Fraction(repr(value))
    if from_unit in DEGREES and to_unit in DEGREES:
        celsius = {"C": number, "F": (number - 32) * 5 / 9, "K": number - Fraction("273.15")}[from_unit]
        return written({"C": celsius, "F": celsius * 9 / 5 + 32, "K": celsius + Fraction("273.15")}[to_unit])
    for units in UNITS.values():
        if from_unit in units and to_unit in units:
            return written(number * Fraction(units[from_unit]) / Fraction(units[to_unit]))
    known = ", ".join([unit for units in UNITS.values() for unit in units] + list(DEGREES))
    raise ValueError(f"{from_unit} cannot be converted to {to_unit}; the units are {known}")


def look_up(name: str) -> str:
    """Look up how many of a thing are in stock.

    Args:
        name: the thing
    """
    found = table().get(name.strip().lower())
    if found is None:
        raise ValueError(f"there is no {name!r:.40} in the table")
    return str(found)


BUILT_IN = {function.__name__: function for function in (calculator, calendar, convert_units, look_up)}


def built_in_tools(names: list[str]) -> list[Tool]:
    """The built-in tools of these names, "all" for all of them.

    Raises:
        ValueError: an unknown name.
    """
    if other := next((name for name in names if name not in BUILT_IN and name != "all"), None):
        raise ValueError(f"there is no tool {other!r}; choose from all, {', '.join(BUILT_IN)}")
    chosen = BUILT_IN if "all" in names else dict.fromkeys(names)
    return [tool_of(BUILT_IN[name]) for name in chosen]


def registry_of(names: list[str]) -> Registry:
    """`built_in_tools` in a registry."""
    return Registry(built_in_tools(names))

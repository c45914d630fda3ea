"""Exact arithmetic by walking a syntax tree, with bounded work."""

import ast
import operator
from fractions import Fraction

MOST_CHARS = 200  # of an expression
MOST_BITS = 2048  # of a number above or below the fraction bar: about 600 digits
DIGITS = 12  # that a number which is not whole is rounded to
AS_PYTHON = str.maketrans("×÷−–·（），^", "*/--*(),^")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS = {"abs": abs, "min": min, "max": max, "round": lambda number: Fraction(round(number))}


def evaluate(expression: str) -> Fraction:
    """The value of an expression of + - * / // % ** (or ^), parentheses, abs, min, max, round and sqrt.

    Raises:
        ValueError: it is too long, not such an expression, divides by zero, or its numbers become too large.
    """
    if len(expression) > MOST_CHARS:
        raise ValueError(f"the expression is longer than {MOST_CHARS} characters")
    text = expression.translate(AS_PYTHON).replace("^", "**").strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None
    try:
        return _value(tree.body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def written(number: Fraction) -> str:
    """A number in usual notation: an integer, or rounded to 12 significant digits."""
    if number.denominator == 1:
        return str(number.numerator)
    try:
        return f"{float(number):.{DIGITS}g}"
    except OverflowError:
        return str(round(number))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        try:
            return _bounded(Fraction(repr(node.value)))  # of a decimal as it is written, not of its binary neighbour
        except ValueError:
            raise ValueError("the numbers become too large") from None
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in OPERATORS:
            return _bounded(Fraction(OPERATORS[type(node.op)](left, right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
        arguments = [_value(argument) for argument in node.args]
        name = node.func.id
        if name == "sqrt" and len(arguments) == 1:
            return _power(arguments[0], Fraction(1, 2))
        if name in FUNCTIONS and (len(arguments) == 1) == (name in ("abs", "round")):
            return FUNCTIONS[name](*arguments)
    raise ValueError("only numbers, + - * / // % **, parentheses, abs, min, max, round and sqrt can be calculated")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        if _bits(base) * abs(exponent.numerator) > 2 * MOST_BITS:  # before the work is done
            raise ValueError("the numbers become too large")
        return _bounded(Fraction(base**exponent.numerator))
    if base < 0:
        raise ValueError("a root of a negative number is not a real number")
    try:
        found = Fraction(repr(float(base) ** float(exponent)))
    except OverflowError:
        raise ValueError("the numbers become too large") from None
    whole = Fraction(round(found))
    return whole if exponent == Fraction(1, 2) and whole * whole == base else found


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length()) if abs(number) != 1 and number else 0


def _bounded(number: Fraction) -> Fraction:
    if _bits(number) > MOST_BITS:
        raise ValueError("the numbers become too large")
    return number

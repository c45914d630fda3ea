"""The base of every part of a request to the API: a model in which null counts as absent."""

from typing import Any

from pydantic import BaseModel, model_validator


def without_nulls(given: Any) -> Any:
    """An object without its null fields; any other value unchanged."""
    return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class Form(BaseModel):
    """A part of a request, in which null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return without_nulls(given)

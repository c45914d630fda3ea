"""What every part of a request to the API is: a form in which null is as good as nothing."""

from typing import Any

from pydantic import BaseModel, model_validator


def without_nulls(given: Any) -> Any:
    """An object without its fields that are null; anything else as it is."""
    return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class Form(BaseModel):
    """A part of a request, in which null is as good as nothing."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return without_nulls(given)

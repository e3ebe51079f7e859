"""What a generation request may hold, in the shape of OpenAI's images API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fewstep.errors import UserError

LARGEST_SEED = 2**63 - 1
MOST_IMAGES = 64
LARGEST_SIDE = 1024


class GenerationRequest(BaseModel):
    """Body of POST /v1/images/generations. One of prompt and class; one of seed (seed, seed + 1, ...) and seeds."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str | None = Field(default=None, max_length=1000)
    label: int | None = Field(default=None, alias="class")
    n: int = Field(default=1, ge=1, le=MOST_IMAGES)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED - MOST_IMAGES)
    seeds: list[int] | None = Field(default=None, min_length=1, max_length=MOST_IMAGES)
    steps: int | None = None
    guidance: float | None = Field(default=None, ge=-100, le=100, allow_inf_nan=False)
    size: str | None = Field(default=None, max_length=20)
    response_format: Literal["b64_json"] = "b64_json"
    model: str | None = Field(default=None, max_length=200)
    user: str | None = Field(default=None, max_length=200)


def parse(body: bytes) -> GenerationRequest:
    """Validate a body; UserError with the first fault's key, value and what was expected."""
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise UserError(sentence(error)) from error


def sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return 'the body is not valid JSON; send an object such as {"prompt": "7"}.'
    if not key:
        return 'the body must be a JSON object such as {"prompt": "7"}.'
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(field.alias or name for name, field in GenerationRequest.model_fields.items()))
        return f"the field {key[:60]!r} is not known; choose from: {known}."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"the field {key[:60]!r} is {str(first['input'])[:60]!r}: {message}."


def size(text: str | None, native: tuple[int, int]) -> tuple[int, int] | None:
    """Width and height of "128x128"; None for the model's own (left out or "auto"). Images never shrink."""
    if text is None or text == "auto":
        return None
    width, cross, height = text.partition("x")
    if cross and width.isascii() and height.isascii() and width.isdigit() and height.isdigit():
        wanted = (int(width), int(height))
        if all(least <= side <= LARGEST_SIDE for least, side in zip(native, wanted)):
            return wanted
    raise UserError(
        f"size is {text!r}, it must be WIDTHxHEIGHT from {native[0]}x{native[1]} to {LARGEST_SIDE}x{LARGEST_SIDE}, "
        'such as "128x128".'
    )

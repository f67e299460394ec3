"""What every section of params.yaml is made of: the kinds of values, and the base of sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


def parse_size(text: str) -> tuple[int, int]:
    """``"224x400"`` -> (224, 400): height and width of a video in pixels, both multiples of 8.

    Raises:
        ValueError: not of that form.
    """
    parts = str(text).split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError("write a size as HEIGHTxWIDTH, for example 224x400")
    height, width = (int(part) for part in parts)
    if height <= 0 or width <= 0 or height % 8 or width % 8:
        raise ValueError("height and width must be positive multiples of 8 (the VAE's stride)")
    return height, width


def _check_size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, BeforeValidator(_check_size)]


def bucket_name(size: str, frames: int) -> str:
    """``224x400-17``."""
    return f"{size}-{frames}"


def check_frames(frames: int) -> int:
    """The number of frames of a clip, as it is.

    Raises:
        ValueError: the VAE takes no clip of so many.
    """
    if frames < 1 or (frames - 1) % 8:
        raise ValueError("a clip has 8n+1 frames: 1, 9, 17, 33, ...")
    return frames


Frames = Annotated[int, BeforeValidator(check_frames)]


class Section(BaseModel):
    """A part of params.yaml: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

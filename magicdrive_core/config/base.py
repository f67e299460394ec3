"""The parts that every section of params.yaml is built from: kinds of values, `about` and the class `Section`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


@dataclass(frozen=True)
class InWords:
    """Names a kind of value for readers, where its Python type does not."""

    words: str


Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]

# Sources of defaults and of limits that more than one setting names.
PUBLISHED = "MagicDrive-V2's published configuration"
WCODA = "W-CODA 2024, track 2"


def about(meaning: str, *, unit: str = "", source: str = "", used_in: str = "") -> Any:
    """Describes one setting; ``magicdrive config`` and the settings' reference page print it.

    Args:
        meaning: what the setting decides, in whole sentences; what each special value (null, 0) does.
        unit: unit of the number; empty for a setting without one.
        source: where the default or the limits come from; empty for a choice of this project.
        used_in: modules that read it, relative to ``magicdrive_core``, separated by commas.

    Returns:
        Metadata for ``Annotated[type, ...]``.
    """
    more = {"unit": unit, "source": source, "used_in": used_in}
    return Field(description=meaning, json_schema_extra={key: text for key, text in more.items() if text})


def parse_size(text: str) -> tuple[int, int]:
    """Splits the size of a video, such as ``"224x400"``, into its two sides.

    Args:
        text: HEIGHTxWIDTH in pixels, both positive multiples of 8.

    Returns:
        Height and width in pixels.

    Raises:
        ValueError: the text has another form.
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


Size = Annotated[
    str,
    BeforeValidator(_check_size),
    WithJsonSchema({"type": "string", "pattern": r"^\d+x\d+$"}),
    InWords("HEIGHTxWIDTH"),
]


def bucket_name(size: str, frames: int) -> str:
    """Returns the name of all clips of one size and length, for example ``224x400-17``.

    Args:
        size: HEIGHTxWIDTH in pixels.
        frames: frames of a clip.
    """
    return f"{size}-{frames}"


def check_frames(frames: int) -> int:
    """Returns the number of frames of a clip if the VAE can encode it.

    Args:
        frames: must be 8n+1: 1, 9, 17, 33, ...

    Returns:
        The same number.

    Raises:
        ValueError: the VAE takes no clip of this length.
    """
    if frames < 1 or (frames - 1) % 8:
        raise ValueError("a clip has 8n+1 frames: 1, 9, 17, 33, ...")
    return frames


Frames = Annotated[
    int,
    BeforeValidator(check_frames),
    WithJsonSchema({"type": "integer", "minimum": 1}),
    InWords("whole number 8n+1"),
]


class Section(BaseModel):
    """A part of params.yaml: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

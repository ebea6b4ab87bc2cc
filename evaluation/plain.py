"""Results as plain values for JSON: numbers that were not measured become null."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["as_text", "plain"]

# A list of numbers over several lines, which no string of a JSON text can hold.
NUMBERS = re.compile(r"\[\n[-+.,\s\dEenul]+\]")


def plain(value: Any) -> Any:
    """Dataclasses as mappings of those of their fields that are part of their repr; pictures and answers are not."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr)
        return {name: plain(content) for name, content in fields}
    if isinstance(value, dict):
        return {str(key): plain(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [plain(content) for content in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_text(values: dict[str, Any]) -> str:
    """Plain values as a JSON text with each list of numbers on one line.

    >>> print(as_text({"interval": [0.5, None], "classes": ["a"]}), end="")
    {
     "interval": [0.5, null],
     "classes": [
      "a"
     ]
    }
    """
    text = json.dumps(values, indent=1, allow_nan=False)
    return NUMBERS.sub(lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"

"""Which rows of a gallery have a value in their metadata."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Values", "as_text"]


def as_text(value: Any) -> str:
    """A JSON value as text that is the same for equal values: 1 and 1.0 are, 1 and true and "1" are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


class Values:
    """Looks rows up by value. A key's values are listed when it is first asked for.

    Args:
        metadata: one mapping for each row.
    """

    def __init__(self, metadata: Iterable[Mapping[str, Any]]) -> None:
        self._metadata = metadata
        self._listed: dict[str, dict[str, list[int] | NDArray[np.int64]]] = {}

    def rows(self, key: str, value: Any) -> NDArray[np.int64]:
        """The rows that have `value` under `key`, in order."""
        if key not in self._keys:  # anybody may ask for anything, and nothing is kept of it
            return np.empty(0, dtype=np.int64)
        text = as_text(value)
        listed = self._listed.get(key)
        if listed is None:
            listed = self._listed[key] = self._list(key)
        rows = np.asarray(listed.get(text, ()), dtype=np.int64)
        if text in listed:
            listed[text] = rows  # the next time at no cost
        return rows

    def _list(self, key: str) -> dict[str, list[int] | NDArray[np.int64]]:
        listed: dict[str, list[int]] = defaultdict(list)
        for row, entry in enumerate(self._metadata):
            if key in entry:
                listed[as_text(entry[key])].append(row)
        return dict(listed)

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset().union(*self._metadata)

"""Which engine answers: one at a time, and another when it takes its place between two requests.

A request holds the engine it began with until it has answered; an engine that was replaced is closed when the last one
has let go of it. Threads and the event loop may replace and hold alike.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from serving.engine import Engine

__all__ = ["Served"]


class Served:
    """The engine in charge; lies in the application's `state.served`.

    Args:
        engine: the first one; it belongs to this object from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._holders: Counter[Engine] = Counter()
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine in charge at the moment; who works with it holds it."""
        return self._engine

    def take(self) -> Engine:
        """Hold the engine in charge; it works until `give_back`, whatever replaces it."""
        with self._lock:
            self._holders[self._engine] += 1
            return self._engine

    def give_back(self, engine: Engine) -> None:
        """Let go of an engine that was taken."""
        with self._lock:
            self._holders[engine] -= 1
            over = engine is not self._engine and not self._holders[engine]
            if over:
                del self._holders[engine]
        if over:
            _close_aside(engine)

    @contextmanager
    def held(self) -> Iterator[Engine]:
        """The engine in charge, held while the block runs."""
        engine = self.take()
        try:
            yield engine
        finally:
            self.give_back(engine)

    def replace(self, engine: Engine) -> None:
        """Put another engine in charge; the one before is closed when its last request is answered."""
        with self._lock:
            before, self._engine = self._engine, engine
            over = not self._holders[before]
            if over:
                del self._holders[before]
        if over:
            _close_aside(before)

    def close(self) -> None:
        """Close the engine in charge."""
        self._engine.close()


def _close_aside(engine: Engine) -> None:
    # It waits for the gallery's threads, which the event loop must not.
    threading.Thread(target=engine.close, name="retire-engine").start()

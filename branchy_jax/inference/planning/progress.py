"""What a planner tells while it works, and how long it may."""

from __future__ import annotations

import time
from collections.abc import Callable

OnProgress = Callable[[str, float], None]
"""``(what is being measured, share done in [0, 1])``."""


_USUAL_STEPS = 12  # until it is known what will race
_MOST_BEFORE_THE_END = 0.99


class Progress:
    """Tells steps of work and keeps the time.

    Args:
        on_progress: told each step as it begins; ``None`` works in silence.
        budget_seconds: from now; ``None`` never ends.
    """

    def __init__(self, on_progress: OnProgress | None, budget_seconds: float | None) -> None:
        self._tell, self._steps, self._begun, self._share = on_progress, _USUAL_STEPS, 0, 0.0
        self._end = float('inf') if budget_seconds is None else time.monotonic() + budget_seconds

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    def expect(self, steps: int) -> None:
        """Sets how many more steps are to come."""
        self._steps = self._begun + steps

    def tell(self, text: str) -> None:
        """Tells that a step begins."""
        self._share = max(self._share, min(_MOST_BEFORE_THE_END, self._begun / self._steps))
        self._begun += 1
        if self._tell is not None:
            self._tell(text, self._share)

    def done(self, text: str) -> None:
        """Tells the end."""
        if self._tell is not None:
            self._tell(text, 1.0)

"""Score one rollout while the next one is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Self

from jaxtyping import Float
from torch import Tensor

from vipo.threads import started
from vipo.types import Prompt, Scorer, Scores


class Background:
    """A scorer beside the caller: scores are those of the plain call, in the order of submission.

    One call after the other, so that a reward is never called twice at once. Rewards in other processes overlap with
    everything; one in this process shares the accelerator's default stream with the sampling, which keeps it correct.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._last: Future[Scores] | None = None
        self._closed = False

    def submit(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Future[Scores]:
        """The scores to come; ``result()`` waits, and raises what the scorer raised. Leave ``media`` as it is."""
        before = self._last

        def work() -> Scores:
            wait([before] if before else [])
            if self._closed:
                raise CancelledError
            return self.scorer(media, prompts)

        self._last = started(work, "vipo-reward")
        return self._last

    def close(self) -> None:
        """Finish what is being scored and drop what waits."""
        self._closed = True
        wait([self._last] if self._last else [])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an exception, a second Ctrl-C for one, what is being scored is left behind: it may hang."""
        self._closed = True
        if kind is None:
            self.close()

"""Score one rollout while the next one is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from jaxtyping import Float
from torch import Tensor

from vipo.types import Prompt, Scorer, Scores


class Background:
    """A scorer on one worker thread: scores are those of the plain call, in the order of submission.

    One thread, so that a reward is never called twice at once. Rewards in other processes overlap with everything; one
    in this process shares the accelerator's default stream with the sampling, which keeps it correct.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vipo-reward")

    def submit(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Future[Scores]:
        """The scores to come; ``result()`` waits, and raises what the scorer raised. Leave ``media`` as it is."""
        return self._worker.submit(self.scorer, media, prompts)

    def close(self) -> None:
        """Finish what is being scored and drop what waits."""
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

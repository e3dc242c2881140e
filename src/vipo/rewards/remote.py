"""A reward that runs in another process, perhaps on another machine with packages of its own: ``vipo serve-reward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.rewards import evidence_wire, wire
from vipo.rewards.answer import Answer, RewardUnavailable
from vipo.rewards.http import MAX_ANSWER_BYTES, JsonClient
from vipo.types import Prompt

REQUEST_MEGABYTES = 200  # of media in one request; a server takes 256 unless told otherwise


class Remote:
    """The scores of the reward that ``url`` serves. Samples that the server does not score are NaN with its reason.

    Args:
        url: of the server, as it prints it.
        batch_size: samples per request, at most; a request holds fewer of long clips, so that the server takes it. A
            request that fails for good costs only its own samples.
        encoding: "exact" sends float32, so the scores are those of the same reward in this process; "8bit" rounds to
            256 levels, as a picture file would, which is other pixels and other scores for a fraction of the bytes.
        connection: time-outs, retries, token and cool-down, see :class:`vipo.rewards.http.JsonClient`.
    """

    def __init__(self, *, url: str, batch_size: int = 8, encoding: str = "exact", **connection: Any) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        if encoding not in wire.ENCODINGS:
            raise ValueError(f"encoding={encoding!r} must be one of {', '.join(wire.ENCODINGS)}")
        self.batch_size, self.encoding = batch_size, encoding
        most_bytes = MAX_ANSWER_BYTES + batch_size * evidence_wire.MOST_BYTES
        self.client = JsonClient(url, most_bytes, **connection)

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return self.explain(media, prompts).complete().to(media.device)

    def explain(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Answer:
        """Scores, and for each sample without one the reason.

        Raises:
            UserError: the server refused the request, or its answer breaks the protocol.
        """
        return self._all(media, prompts, evidence=False)

    def with_evidence(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Answer:
        """:meth:`explain` with the served reward's evidence, or what another judge says in maps or boxes.

        Raises:
            UserError: as there, or the server gives no evidence.
        """
        return self._all(media, prompts, evidence=True)

    def _all(self, media: Tensor, prompts: Sequence[Prompt], *, evidence: bool) -> Answer:
        size = wire.fitting(media, self.batch_size, REQUEST_MEGABYTES)
        batches = (slice(start, start + size) for start in range(0, len(prompts), size))
        return Answer.cat([self._ask(media[batch], prompts[batch], evidence=evidence) for batch in batches])

    def _ask(self, media: Tensor, prompts: Sequence[Prompt], *, evidence: bool) -> Answer:
        body = wire.encode_request(media, prompts, encoding=self.encoding, evidence=evidence)
        picture = (media.shape[3], media.shape[4]) if evidence else None
        try:
            return wire.decode_answer(self.client.post("/score", body), len(prompts), picture)
        except RewardUnavailable as error:
            return Answer.unreachable(len(prompts), str(error))
        except wire.WireError as error:
            raise UserError(
                f"{self.client.url} answered against the protocol: {error}. Is it served by `vipo serve-reward`?"
            ) from error

"""Run several rewards over one rollout's media and keep the books: what scored, what did not, and why.

One policy for every failure. A score is never invented: what a reward could not score is NaN, counted and explained in
``Scores.failures``. A reward that cannot be reached (``RewardUnavailable``) is asked again after a pause, only about
the samples it has not seen; those it never sees are NaN too. A reward with a fault (any other exception, a wrong shape)
stops the run at once, and so does, in training, one that scored nothing. How many samples may go without is the
caller's to say, and so is whether a call may take any time, and what becomes of one that takes longer.

A reward that is not vipo's own gets a copy of the media and the prompts: what it writes there nobody else sees.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.options import OnTimeout
from vipo.rewards.answer import Answer, Explaining, Locating, RewardUnavailable
from vipo.rewards.evidence import EvidenceGrid, by_sample
from vipo.secrets import redacted
from vipo.threads import started
from vipo.types import Prompt, Reward, Scores

MOST_STUCK = 3  # calls of one reward that were not waited for and have not ended
NAMED_SAMPLES = 8  # how many sample numbers, and
NAMED_CAUSES = 3  # how many causes a failure spells out


class TookTooLong(Exception):  # noqa: N818 - what it says of a call
    """A call of a reward has not ended in its time."""


@dataclass(frozen=True)
class Patience:
    """How long a call of a reward may take.

    Args:
        seconds: None is any time, and the call is made on the caller's own thread.
        on_timeout: of a call that takes longer, ``stop`` raises, and with ``mask`` its samples have no score. The call
            cannot be ended and is left behind; after ``MOST_STUCK`` of them ``mask`` raises too.
    """

    seconds: float | None = None
    on_timeout: OnTimeout = "stop"


ENDLESS = Patience()


def score(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    media: Float[Tensor, "N 3 F Y X"],
    prompts: Sequence[Prompt],
    *,
    retries: int = 2,
    pause_seconds: float = 15.0,
    trains: bool = True,
    must_reach: bool = False,
    max_failed_share: float = 1.0,
    patience: Patience = ENDLESS,
    evidence: EvidenceGrid | None = None,
) -> Scores:
    """Every reward on every sample, float32, without gradients.

    Args:
        retries: how often a reward that cannot be reached is asked again.
        pause_seconds: before each of them. Longer than the cool-down of a remote reward, or it would not be asked.
        trains: the samples are groups to learn from. If not, they are a part of an evaluation, which may be without
            any score, and a failure is its cause alone: whoever knows the whole says where.
        must_reach: a reward that stays out of reach stops the work instead of leaving holes.
        max_failed_share: of the samples; a reward that leaves more without a score stops the work.
        patience: how long each call may take. What is masked because it took longer may be every sample.
        evidence: which rewards are asked where they found their scores, in the same call; None asks none.

    Raises:
        UserError: rewards and weights do not have the same names, a reward raised, it returned the wrong shape, it
            cannot be reached though it must, it scored no sample to train on or too few, or a call took too long; or
            the same of its evidence.
    """
    _check(rewards, weights, media, prompts)
    by_name, failures = {}, {}
    laid: dict[str, Tensor] = {}
    asked = {} if evidence is None else evidence.weights
    for name, reward in rewards.items():
        persistently = partial(_ask_patiently, name, reward, media, prompts, retries, pause_seconds, patience.seconds)
        try:
            answer = persistently(locate=name in asked)
        except TookTooLong as error:
            failures[name] = _late(name, reward, str(error), patience)
            by_name[name] = media.new_full((len(prompts),), torch.nan, dtype=torch.float32)
            if evidence is not None and name in asked:
                laid[name] = evidence.lay(name, {}, media)
            continue
        if must_reach and answer.unreached:
            cause = answer.causes.get(answer.unreached[0], "it does not say why")
            raise UserError(f"reward {name!r} cannot be reached ({cause}); bring it back and evaluate again")
        missing = ~answer.scores.isfinite()
        by_name[name] = answer.scores.masked_fill(missing, torch.nan)
        if missing.any():
            failures[name] = _failure(name, missing, answer.causes) if trains else _causes(answer.causes)
        _check_share(name, missing, max_failed_share, failures.get(name, ""))
        if evidence is not None and name in asked:
            laid[name] = evidence.lay(name, answer.evidence, media)
            unlocated = laid[name].isnan().flatten(1).any(1) & ~missing
            _check_share(name, unlocated, max_failed_share, "the reward has nothing to say of where", "evidence")
            failures |= _unlocated(name, unlocated, failures)
    return Scores(by_name, dict(weights), failures, laid, dict(asked))


def _unlocated(name: str, unlocated: Tensor, failures: Mapping[str, str]) -> dict[str, str]:
    """What to report of samples with a score and without evidence, after what is reported already."""
    count = int(unlocated.sum())
    if not count:
        return {}
    told = f"{count} of {len(unlocated)} samples have a score and no evidence; they keep the credit of whole pictures"
    return {name: f"{failures[name]}; {told}" if name in failures else told}


def _late(name: str, reward: Reward, cause: str, patience: Patience) -> str:
    """What to report of a call that is not waited for, or the end."""
    if patience.on_timeout == "stop":
        raise UserError(
            f"reward {name!r} {cause}; raise training.reward_timeout, or let its samples go without a score with"
            " training.on_reward_timeout=mask"
        )
    if len(_stuck.get(id(reward), ())) >= MOST_STUCK:
        raise UserError(f"reward {name!r} {cause}, and {MOST_STUCK} calls of it have not ended: it hangs; mend it")
    return f"{cause} (training.reward_timeout); the samples are left out of their groups"


def _check_share(name: str, missing: Tensor, most: float, why: str, what: str = "a score") -> None:
    failed = float(missing.float().mean())
    if failed > most:
        left = "unscored" if what == "a score" else f"without {what}"
        raise UserError(
            f"reward {name!r} left {failed:.0%} of the samples {left}, more than"
            f" training.max_failed_share={most:g}: {why}"
        )


def ask(
    name: str,
    reward: Reward,
    media: Float[Tensor, "N 3 F Y X"],
    prompts: Sequence[Prompt],
    *,
    seconds: float | None = None,
    locate: bool = False,
) -> Answer:
    """One reward, once, without gradients; if it cannot be reached, that is the answer.

    Args:
        seconds: that the call may take; None is any time.
        locate: ask for evidence too.

    Raises:
        UserError: the reward raised anything but ``RewardUnavailable``, or did not return N real numbers, or evidence
            that is none.
        TookTooLong: it has not ended in its time.
    """
    asked = _method(name, reward, locate)
    given = (media, prompts) if _is_own(reward) else (media.clone(), copy.deepcopy(tuple(prompts)))

    def call() -> Any:
        with torch.no_grad():
            return asked(*given)

    try:
        said = call() if seconds is None else _in_time(reward, call, seconds)
    except RewardUnavailable as error:
        said = Answer.unreachable(len(prompts), _text(error))
    except TookTooLong:
        raise
    except UserError as error:
        raise UserError(redacted(f"reward {name!r}: {error}")) from error
    except (Exception, SystemExit) as error:  # sys.exit(0) in a reward would end the run as if all were well
        raise UserError(f"reward {name!r} raised {type(error).__name__}: {_text(error)}") from error
    if not isinstance(said, Answer):
        said, evidence = _pair(name, said) if locate else (said, {})
        values = _checked(name, said, len(prompts), media.device)
        return Answer(values, evidence=by_sample(name, evidence, len(prompts)))
    values = _checked(name, said.scores, len(prompts), media.device)
    causes = {row: redacted(str(cause)) for row, cause in said.causes.items()}
    return replace(said, scores=values, causes=causes, evidence=by_sample(name, said.evidence, len(prompts)))


def _method(name: str, reward: Reward, locate: bool) -> Callable[..., Any]:
    """What of the reward to call."""
    if not locate:
        return reward.explain if isinstance(reward, Explaining) else reward
    if not isinstance(reward, Locating):
        raise UserError(f"reward {name!r} gives no evidence: it has no method with_evidence(media, prompts)")
    return reward.with_evidence


def _pair(name: str, said: Any) -> tuple[Any, Any]:
    if not isinstance(said, tuple) or len(said) != 2:
        raise UserError(
            f"reward {name!r} returned {type(said).__name__} from with_evidence; it must return two things, the scores"
            " (N,) and the evidence (N, T, H, W)"
        )
    return said[0], said[1]


def _is_own(reward: Reward) -> bool:
    """Whether it is part of vipo, of which tests say that it leaves alone what it is given."""
    return type(reward).__module__.split(".")[0] == "vipo"


def _text(error: BaseException) -> str:
    """What an exception says; even that may fail."""
    try:
        return redacted(str(error))
    except Exception:  # noqa: BLE001 - whatever a user's exception does when it is asked what it is
        return "it does not say what"


_stuck: dict[int, list[Future[Any]]] = {}  # calls that were left behind, by reward: each of them keeps its reward alive


def _in_time(reward: Reward, call: Callable[[], Any], seconds: float) -> Any:
    future = started(call, "vipo-reward-call")
    wait([future], seconds)
    stuck = [other for other in _stuck.pop(id(reward), ()) if not other.done()]
    if not future.done():
        stuck.append(future)
    if stuck:
        _stuck[id(reward)] = stuck
    if not future.done():
        raise TookTooLong(f"has not answered in {seconds:g} seconds")
    return future.result()


def _ask_patiently(
    name: str,
    reward: Reward,
    media: Tensor,
    prompts: Sequence[Prompt],
    retries: int,
    pause_seconds: float,
    seconds: float | None,
    *,
    locate: bool,
) -> Answer:
    """Ask, and while some samples were not reached, wait and ask about those again."""
    answer = ask(name, reward, media, prompts, seconds=seconds, locate=locate)
    for _ in range(retries):
        rows = list(answer.unreached)
        if not rows:
            break
        time.sleep(pause_seconds)
        again = ask(name, reward, media[rows], [prompts[row] for row in rows], seconds=seconds, locate=locate)
        answer = answer.updated(rows, again)
    return answer


def _check(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], media: Tensor, prompts: Sequence[Prompt]
) -> None:
    if not rewards:
        raise UserError("no reward was given; name at least one, see `vipo list rewards`")
    if set(rewards) != set(weights):
        raise UserError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names")
    if media.ndim != 5 or media.shape[1] != 3 or media.shape[0] != len(prompts):
        raise ValueError(f"media {tuple(media.shape)} must be (N, 3, F, Y, X) with N = {len(prompts)} prompts")


def _checked(name: str, values: Any, count: int, device: torch.device) -> Float[Tensor, " N"]:
    """What a reward returned as float32; a list, tuple or array of numbers will do, and None in it is no score."""
    try:
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if isinstance(values, list | tuple):
            values = torch.tensor(
                [_number(name, place, value) for place, value in enumerate(values)], dtype=torch.float64
            )
        if not isinstance(values, Tensor):
            raise UserError(
                f"reward {name!r} returned {type(values).__name__}; it must return one number per sample,"
                f" as a tensor, an array or a list of {count}"
            )
        if values.shape != (count,) or values.is_complex():
            raise UserError(
                f"reward {name!r} returned {tuple(values.shape)} of {values.dtype};"
                f" it must return one real number per sample, shape ({count},)"
            )
        return values.detach().float().to(device)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # of a tensor without storage, sparse, quantised
        raise UserError(
            f"reward {name!r} returned {type(values).__name__} that cannot be read as numbers: {_text(error)}; return"
            f" a plain tensor, an array or a list of {count}"
        ) from error


def _number(name: str, place: int, value: Any) -> float:
    if value is None:
        return torch.nan
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    with suppress(OverflowError):  # a whole number for which there is no float
        if isinstance(value, Real):
            return float(value)
    raise UserError(
        f"reward {name!r} returned values of which number {place} is {value!r:.40}, a {type(value).__name__};"
        " each must be a real number, or None where there is no score"
    )


def _failure(name: str, missing: Tensor, causes: Mapping[int, str]) -> str:
    samples = missing.nonzero().flatten().tolist()
    count, total = len(samples), missing.numel()
    where = ", ".join(map(str, samples[:NAMED_SAMPLES])) + (", ..." if count > NAMED_SAMPLES else "")
    why = _counted(Counter(causes[sample] for sample in samples if sample in causes))
    sentence = f"reward {name!r} gave no finite score for {count} of {total} samples (indices {where}){why}"
    if count == total:
        raise UserError(f"{sentence}: there is nothing to learn from. Check the reward on a picture you know")
    return f"{sentence}; they are left out of their groups"


def _causes(causes: Mapping[int, str]) -> str:
    """Each cause once."""
    return "; ".join(dict.fromkeys(causes.values())) or "the score was not finite"


def _counted(causes: Counter[str]) -> str:
    """``, because CAUSE (3 times), CAUSE (once)``, the most frequent first; empty if no cause is known."""
    spelled = [f"{cause} ({times} times)" if times > 1 else f"{cause} (once)" for cause, times in causes.most_common()]
    more = ["..."] if len(spelled) > NAMED_CAUSES else []
    return ", because " + ", ".join(spelled[:NAMED_CAUSES] + more) if spelled else ""

"""Every draw is a function of what it is for, never of when or with what else it is made."""

from __future__ import annotations

import torch

from vipo import randomness


def test_a_row_depends_on_its_key_alone() -> None:
    together = randomness.normal((4, 3), [(0, 1), (0, 2), (0, 3)], seed=7, purpose="noise")
    alone = randomness.normal((4, 3), [(0, 3)], seed=7, purpose="noise")
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[0], together[1])


def test_equal_keys_give_equal_rows() -> None:
    rows = randomness.normal((4,), [(1,), (2,), (1,)], seed=0, purpose="noise")
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_seed_and_purpose_both_matter() -> None:
    draws = [
        randomness.normal((8,), [(3,)], seed=seed, purpose=purpose) for seed in (0, 1) for purpose in ("noise", "step")
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4


def test_a_key_of_two_numbers_is_not_another_key_run_together() -> None:
    assert not torch.equal(*randomness.normal((8,), [(1, 12), (11, 2)], seed=0, purpose="noise"))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first, state = randomness.normal((5,), [(0,)], seed=0, purpose="noise"), torch.get_rng_state()
    torch.manual_seed(2)
    second = randomness.normal((5,), [(0,)], seed=0, purpose="noise")
    assert torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_normal() -> None:
    drawn = randomness.normal((1000,), [(k,) for k in range(50)], seed=0, purpose="noise")
    assert abs(float(drawn.mean())) < 0.02 and abs(float(drawn.std()) - 1) < 0.02
    assert abs(float((drawn[:25] * drawn[25:]).mean())) < 0.02  # rows are independent


def test_permutations_and_integers_keep_to_their_range() -> None:
    assert sorted(randomness.permutation(9, seed=0, purpose="order", indices=(4,))) == list(range(9))
    drawn = {randomness.integer(2, 5, seed=0, purpose="window", indices=(k,)) for k in range(60)}
    assert drawn == {2, 3, 4}

"""Every source of allocation maps, on rollouts whose right answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from vipo.assemble import build_map_source
from vipo.errors import UserError
from vipo.options import ConsensusOptions, DeviationOptions, SourcesOptions
from vipo.rollout import sample_groups
from vipo.schema import StructuringSection
from vipo.structuring import consensus_map, deviation_map, signed_consensus_map, smooth
from vipo.structuring.sources import (
    Consensus,
    DenseEvidence,
    Deviation,
    Disagreement,
    Evidence,
    Flawless,
    Perceptual,
    Product,
    RewardGradient,
    TextRelevance,
)
from vipo.types import MapSource, Prompt, Rollout, Scores


def even(rollout: Rollout) -> Tensor:
    """Advantages for sources that do not read them."""
    return torch.ones(len(rollout.prompts))


@pytest.fixture(scope="module")
def rollout(model_folder: Path) -> Rollout:
    trainer = tiny.trainer(model_folder)
    prompts = [Prompt(text) for text in tiny.PROMPTS[:2]]
    return sample_groups(trainer.generator, prompts, trainer.solver, group_size=4, seed=0)


def corner(media: Tensor, prompts: list[Prompt]) -> Tensor:  # noqa: ARG001
    """Looks at the upper left quarter alone."""
    return media[..., : media.shape[-2] // 2, : media.shape[-1] // 2].square().mean((1, 2, 3, 4))


def settled(maps: Tensor, rollout: Rollout) -> None:
    assert maps.shape == (len(rollout.media), *rollout.latent_grid)
    assert (maps >= 0).all() and maps.isfinite().all()
    assert torch.allclose(maps.mean((1, 2, 3)), torch.ones(len(maps)), atol=1e-4)


def test_the_gradient_of_a_reward_lies_where_the_reward_looks(rollout: Rollout) -> None:
    source = RewardGradient({"corner": corner}, {"corner": 1.0}, smoothing_sigma=0)
    maps = source(rollout, even(rollout))
    settled(maps, rollout)
    height, width = (side // 2 for side in rollout.latent_grid[1:])
    assert (
        (maps[:, :, height:] == 0).all() and (maps[..., width:] == 0).all() and (maps[:, :, :height, :width] > 0).all()
    )
    assert torch.allclose(
        source(rollout, even(rollout)), replace(source, batch_size=3)(rollout, even(rollout)), atol=1e-5
    )


def test_the_gradient_of_a_sum_takes_the_weights(rollout: Rollout) -> None:
    def elsewhere(media: Tensor, prompts: list[Prompt]) -> Tensor:
        return corner(media.flip(-1), prompts)

    both = {"corner": corner, "elsewhere": elsewhere}
    only = RewardGradient(both, {"corner": 1.0, "elsewhere": 0.0})(rollout, even(rollout))
    assert torch.allclose(only, RewardGradient({"corner": corner}, {"corner": 1.0})(rollout, even(rollout)), atol=1e-5)


def test_a_reward_without_gradient_is_refused_by_name(rollout: Rollout) -> None:
    def counted(media: Tensor, prompts: list[Prompt]) -> Tensor:  # noqa: ARG001
        return (media > 0.5).float().mean((1, 2, 3, 4))

    def listed(media: Tensor, prompts: list[Prompt]) -> list[float]:
        return counted(media, prompts).tolist()

    for reward in (counted, listed):
        with pytest.raises(UserError, match="'mine' has no gradient"):
            RewardGradient({"mine": reward}, {"mine": 1.0})(rollout, even(rollout))


def test_samples_without_a_score_do_not_spoil_the_gradient_of_the_others(rollout: Rollout) -> None:
    def sometimes(media: Tensor, prompts: list[Prompt]) -> Tensor:
        values = corner(media, prompts)
        return values * torch.tensor([torch.nan if i == 1 else 1.0 for i in range(len(values))])

    maps = RewardGradient({"sometimes": sometimes}, {"sometimes": 1.0})(rollout, even(rollout))
    assert torch.allclose(maps[0], RewardGradient({"c": corner}, {"c": 1.0})(rollout, even(rollout))[0], atol=1e-5)
    assert torch.equal(maps[1], torch.ones_like(maps[1]))


def test_disagreement_is_where_the_group_differs_and_the_same_for_all_of_it(rollout: Rollout) -> None:
    latents = torch.zeros_like(rollout.latents)
    latents[:4, :, 0, 1, 2] = torch.randn(4, latents.shape[1])
    latents[4:, :, 0, 3, 0] = torch.randn(4, latents.shape[1])
    maps = Disagreement(smoothing_sigma=0)(replace(rollout, latents=latents), even(rollout))
    assert (maps[:4].flatten(1).argmax(1) == 1 * latents.shape[-1] + 2).all()
    assert (maps[4:].flatten(1).argmax(1) == 3 * latents.shape[-1]).all()
    assert torch.equal(maps[0], maps[3]) and (maps > 0).sum() == 8
    settled(Disagreement()(rollout, even(rollout)), rollout)


def test_deviation_is_where_a_sample_differs_from_its_own_group(rollout: Rollout) -> None:
    latents = torch.ones_like(rollout.latents)
    latents[1, :, 0, 1, 2] += 4.0
    latents[6, :, 0, 3, 0] -= 4.0
    maps = Deviation(smoothing_sigma=0)(replace(rollout, latents=latents), even(rollout)).flatten(1)
    width = latents.shape[-1]
    assert maps.argmax(1).tolist() == [width + 2] * 4 + [3 * width] * 4
    assert ((maps > 0).sum(1) == 1).all()  # the others of the group differ from its mean there too, and only there
    settled(Deviation()(rollout, even(rollout)), rollout)
    each = Deviation()(rollout, even(rollout))
    assert not torch.allclose(each[0], each[1], atol=1e-2)


def test_a_group_of_equal_samples_has_a_uniform_disagreement(rollout: Rollout) -> None:
    equal = replace(rollout, latents=torch.zeros_like(rollout.latents))
    assert torch.equal(Disagreement()(equal, even(rollout)), torch.ones(8, *rollout.latent_grid))


def test_text_relevance_is_the_change_of_the_velocity_without_the_text(model_folder: Path, rollout: Rollout) -> None:
    generator = tiny.trainer(model_folder).generator
    source = TextRelevance(generator, smoothing_sigma=0)
    maps = source(rollout, even(rollout))
    settled(maps, rollout)
    assert torch.allclose(maps, replace(source, batch_size=3)(rollout, even(rollout)), atol=1e-4)
    untold = generator.encode([""]).take(torch.zeros(8, dtype=torch.long))
    assert torch.equal(source(replace(rollout, conditioning=untold), even(rollout)), torch.ones_like(maps))


def test_a_product_keeps_only_what_all_sources_find(rollout: Rollout) -> None:
    maps = Product([tiny.MAPS, RewardGradient({"c": corner}, {"c": 1.0}, smoothing_sigma=0)])(rollout, even(rollout))
    settled(maps, rollout)
    assert (maps[:, :, rollout.latent_grid[1] // 2 :] == 0).all() and maps.any()


@pytest.mark.parametrize(
    ("sources", "kind"),
    [
        (("perceptual",), Perceptual),
        (("reward_gradient",), RewardGradient),
        (("text_relevance",), TextRelevance),
        (("disagreement",), Disagreement),
        (("deviation",), Deviation),
        (("deviation", "perceptual"), Product),
    ],
)
def test_a_recipe_names_them(model_folder: Path, sources: tuple[str, ...], kind: type[MapSource]) -> None:
    trainer = tiny.trainer(model_folder)
    section = StructuringSection(sources=sources, smoothing_sigma=0.5)
    source = build_map_source(section, trainer.generator, trainer.scorer, "cpu")
    assert isinstance(source, kind)
    first = source.sources[0] if isinstance(source, Product) else source
    assert (first.structuring if isinstance(first, Perceptual) else first).smoothing_sigma == 0.5


@pytest.mark.parametrize("source", ["reward_gradient", "text_relevance", "disagreement", "deviation", "consensus"])
def test_each_trains(model_folder: Path, source: str) -> None:
    plain = tiny.trainer(model_folder)
    section = StructuringSection(sources=(source,))
    maps = build_map_source(section, plain.generator, plain.scorer, "cpu")
    step = tiny.trainer(model_folder, credit="advantage_map", map_source=maps).step()
    assert step.metrics["grad_norm"] > 0 and step.metrics["map/mean"] == pytest.approx(1, abs=1e-4)


def found(rollout: Rollout) -> Scores:
    """Two rewards with evidence, of which the second says nothing of sample 1, and one without."""
    rng = torch.Generator().manual_seed(4)
    one, two = (torch.rand(8, *rollout.latent_grid, generator=rng) * 2 - 1 for _ in range(2))
    two[1] = torch.nan
    zeros = torch.zeros(8)
    by_name = {"one": zeros, "two": zeros, "blind": zeros}
    return Scores(by_name, dict.fromkeys(by_name, 1.0), {}, {"one": one, "two": two}, {"one": 0.5, "two": 0.25})


def test_evidence_weighs_by_its_size_and_is_normalised_like_others(rollout: Rollout) -> None:
    scores, advantage = found(rollout), even(rollout)
    one, two = scores.evidence.values()
    maps = Evidence(smoothing_sigma=0)(rollout, advantage, scores)
    size = 0.5 * one.abs() + 0.25 * two.abs()
    expected = size / size.mean((1, 2, 3), keepdim=True)
    expected[1] = 1  # nothing to say: the whole picture's credit
    assert torch.allclose(maps, expected, atol=1e-5)
    settled(Evidence()(rollout, advantage, scores), rollout)
    both = Product([Evidence(), Deviation()])(rollout, advantage, scores)
    settled(both, rollout)
    assert torch.allclose(both[1], Deviation()(rollout, advantage)[1], atol=1e-5)
    with pytest.raises(UserError, match="no reward gave evidence"):
        Evidence()(rollout, advantage)


def test_flaws_are_the_mean_of_what_is_below_zero_and_dense_evidence_the_sum(rollout: Rollout) -> None:
    scores, advantage = found(rollout), even(rollout)
    one, two = scores.evidence.values()
    flaws = ((-one).clamp_min(0) * 0.5 + (-two).clamp_min(0) * 0.25) / 0.75
    flaws[1] = 0
    assert torch.allclose(Flawless()(rollout, advantage, scores), 1 - flaws, atol=1e-6)
    dense = DenseEvidence()(rollout, advantage, scores)
    assert dense[1].isnan().all() and torch.allclose(dense[2:], (0.5 * one + 0.25 * two)[2:], atol=1e-6)
    smoothed = DenseEvidence(1.0)(rollout, advantage, scores)
    assert torch.allclose(smoothed[2:], smooth(dense, 1.0)[2:], atol=1e-6)


def test_a_source_may_have_options_of_its_own(model_folder: Path, rollout: Rollout) -> None:
    own = SourcesOptions(
        deviation=DeviationOptions(power=0.5, smoothing_sigma=0.0), consensus=ConsensusOptions(floor=0.2)
    )
    trainer = tiny.trainer(model_folder)
    section = StructuringSection(sources=("deviation", "consensus"), smoothing_sigma=2.0, source_options=own)
    source = build_map_source(section, trainer.generator, trainer.scorer, "cpu")
    assert isinstance(source, Product)
    assert source.sources == [Deviation(0.0, power=0.5), Consensus(2.0, floor=0.2)]
    squared = deviation_map(rollout.latents, 4, smoothing_sigma=0)
    root = squared.sqrt() / squared.sqrt().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(source.sources[0](rollout, even(rollout)), root, atol=1e-5)
    advantage = torch.linspace(-1, 1, 8)
    plain = consensus_map(rollout.latents, advantage, 4)
    floored = consensus_map(rollout.latents, advantage, 4, floor=0.2)
    assert torch.allclose(floored, 0.2 + 0.8 * plain) and floored.min() >= 0.2
    for wrong in ({"power": 0.0}, {"power": float("nan")}):
        with pytest.raises(ValueError, match="power="):
            deviation_map(rollout.latents, 4, **wrong)
    with pytest.raises(ValueError, match=r"floor=1\.5"):
        consensus_map(rollout.latents, advantage, 4, floor=1.5)


def test_a_signed_consensus_is_consensus_before_the_cut() -> None:
    rng = torch.Generator().manual_seed(3)
    latents, advantage = torch.randn(8, 4, 3, 5, 6, generator=rng), torch.randn(8, generator=rng)
    advantage[5], advantage[2] = 0, torch.nan
    signed, cut = signed_consensus_map(latents, advantage, 4), consensus_map(latents, advantage, 4)
    assert torch.allclose(signed.abs().mean((1, 2, 3)), torch.ones(8), atol=1e-5) and (signed < 0).any()
    for row in (0, 1, 3, 4, 6, 7):
        above = signed[row].clamp_min(0)
        assert torch.allclose(above / above.mean(), cut[row], atol=1e-4)
    assert (signed[[2, 5]] == 1).all()


def test_a_deviation_map_refuses_half_a_group() -> None:
    with pytest.raises(ValueError, match="5 samples do not divide into groups of group_size=2"):
        deviation_map(torch.zeros(5, 2, 1, 2, 2), 2)


def agreement_by_hand(latents: Tensor, advantage: Tensor) -> Tensor:
    """One group, sample by sample, from the formula; a NaN advantage is a sample that is not there."""
    there = [i for i in range(len(latents)) if advantage[i].isfinite()]
    mean = torch.stack([latents[i] for i in there]).mean(0)
    maps = torch.zeros(len(latents), *latents.shape[2:])
    for i in there:
        others = sum(advantage[j] * (latents[j] - mean) for j in there if j != i)
        maps[i] = (advantage[i].sign() * ((latents[i] - mean) * others).sum(0)).clamp_min(0)
    flat = maps.flatten(1).mean(1)[:, None, None, None]
    return torch.where(flat > 0, maps / flat.where(flat > 0, 1.0), torch.ones(()))


@pytest.mark.parametrize("missing", [None, 2])
def test_consensus_is_its_formula_frame_by_frame_and_without_the_missing(missing: int | None) -> None:
    rng = torch.Generator().manual_seed(3)
    latents, advantage = torch.randn(8, 4, 3, 5, 6, generator=rng), torch.randn(8, generator=rng)
    advantage[5] = 0
    if missing is not None:
        advantage[missing] = torch.nan
    maps = consensus_map(latents, advantage, 4, smoothing_sigma=0)
    expected = torch.cat([agreement_by_hand(latents[k : k + 4], advantage[k : k + 4]) for k in (0, 4)])
    assert torch.allclose(maps, expected, atol=1e-4) and (maps >= 0).all()
    assert (maps[5] == 1).all() and (missing is None or (maps[missing] == 1).all())
    assert torch.allclose(maps.mean((1, 2, 3)), torch.ones(8), atol=1e-5)


def test_consensus_of_two_is_their_deviation() -> None:
    latents = torch.randn(4, 4, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    maps = consensus_map(latents, torch.tensor([1.0, -1.0, -0.5, 0.5]), 2)
    assert torch.allclose(maps, deviation_map(latents, 2), atol=1e-5)


def test_consensus_falls_where_what_a_good_sample_did_only_bad_ones_did_too() -> None:
    """Samples 0 and 1 are good and share the left half; on the right sample 0 did what the bad 2 and 3 did."""
    latents = torch.zeros(4, 1, 1, 2, 4)
    latents[:2, ..., :2] = 1.0
    latents[[0, 2, 3], ..., 2:] = 1.0
    maps = consensus_map(latents, torch.tensor([1.0, 1.0, -1.0, -1.0]), 4, smoothing_sigma=0)
    assert (maps[0, ..., :2] == 2).all() and (maps[0, ..., 2:] == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_consensus_wants_one_advantage_for_each_sample() -> None:
    with pytest.raises(ValueError, match=r"advantage \(3,\) must be \(4,\)"):
        consensus_map(torch.zeros(4, 1, 1, 2, 2), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="4 samples do not divide into groups of group_size=3"):
        consensus_map(torch.zeros(4, 1, 1, 2, 2), torch.zeros(4), 3)

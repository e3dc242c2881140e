"""What a map must be whatever the eigensolver, the order of the tokens and the batch; and where its mass must sit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.options import Orientation
from vipo.structuring import (
    Components,
    PerceptualStructuring,
    align_frames,
    allocation_map,
    flicker,
    orientation,
    oriented,
    principal_components,
    smooth,
)
from vipo.structuring import components as axes
from vipo.structuring import maps as mapping
from vipo.types import FeatureMap

RULES = [rule for rule in get_args(Orientation) if rule != "release"]
SHAPES = [(20, 7, 9), (80, 6, 6)]  # D < n takes the covariance, D > n the Gram matrix
GRID = (11, 10)


def blob(width: int, h: int, w: int, batch: int = 3) -> Tensor:
    """Features of a soft ground with a subject off the centre and a little texture, another one per row."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    subject = torch.exp(-((y - h / 2 - 0.4).square() + (x - w / 3).square()) / 3.0)
    ramp = torch.stack([subject, y / h, x / w, torch.ones(h, w)])
    mixing = torch.randn(batch, width, 4, generator=generator) * torch.tensor([4.0, 0.7, 0.4, 2.0])
    return torch.einsum("bdk,khw->bdhw", mixing, ramp) + 0.2 * torch.randn(batch, width, h, w, generator=generator)


def backbone(images: Tensor) -> FeatureMap:
    """Eight by eight pixels to a cell: colour, and its products."""
    cells = F.avg_pool2d(images, 8)
    return FeatureMap(torch.cat([cells, cells.square(), cells * cells.roll(1, dims=1)], dim=1), 8)


def moving_square(frames: int) -> Tensor:
    """A red square on grey walks to the right, one cell of 8 px per frame."""
    clip = torch.full((1, 3, frames, 48, 8 * (frames + 2)), 0.5)
    for frame in range(frames):
        clip[0, :, frame, 16:32, 8 * frame + 8 : 8 * frame + 16] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return clip


@pytest.mark.parametrize("shape", SHAPES)
def test_components_agree_with_numpy_svd(shape: tuple[int, int, int]) -> None:
    found = principal_components(blob(*shape), 4)
    for row, features in enumerate(blob(*shape).double().numpy()):
        tokens = features.reshape(shape[0], -1).T
        left, singular, _ = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        share = singular**2 / (singular**2).sum()
        np.testing.assert_allclose(found.explained[row], share[:4], rtol=1e-9)
        ours = found.projections[row].flatten(1).numpy()
        np.testing.assert_allclose(np.abs(ours), np.abs((left * singular).T[:4]), atol=1e-7)


@pytest.mark.parametrize("shape", [(260, 17, 16), (300, 17, 16)])
def test_large_matrices_are_solved_as_well_by_iteration(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    features = blob(*shape, batch=2)
    by_iteration, mirrored = principal_components(features), allocation_map(features.flip(-1), GRID).flip(-1)
    torch.testing.assert_close(mirrored, allocation_map(features, GRID), atol=1e-5, rtol=0)
    monkeypatch.setattr(axes, "LARGE", 10_000)
    in_full = principal_components(features)
    torch.testing.assert_close(by_iteration.explained, in_full.explained, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_iteration.projections.abs(), in_full.projections.abs(), atol=1e-4, rtol=0)


def white(width: int, h: int, w: int, batch: int = 2, steepness: float = 0.0) -> Tensor:
    """Noise whose eigenvalues fall as rank ** -steepness: 0 leaves them as they are, which is nearly flat."""
    noise = torch.randn(batch, width, h * w, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if steepness:
        left, singular, right = torch.linalg.svd(noise - noise.mean(2, keepdim=True), full_matrices=False)
        rank = torch.arange(1, singular.shape[1] + 1, dtype=torch.float64)
        noise = (left * rank ** (-steepness / 2)) @ right
    return noise.unflatten(2, (h, w))


def reference(features: Tensor, components: int = 3) -> Components:
    """The principal components by numpy's singular values, picture by picture."""
    projections, explained, energy = [], [], []
    for picture in features.double().flatten(2).numpy():
        tokens = picture.T - picture.T.mean(0)
        left, singular, _ = np.linalg.svd(tokens, full_matrices=False)
        projections.append((left * singular).T[:components].reshape(components, *features.shape[2:]))
        explained.append(singular[:components] ** 2 / (singular**2).sum())
        energy.append(np.linalg.norm(tokens, axis=1).reshape(features.shape[2:]))
    return Components(*(torch.from_numpy(np.stack(part)) for part in (projections, explained, energy)))


FLAT = [(260, 17, 16), (300, 17, 16), (520, 20, 20)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steepness", [0.0, 0.2, 0.35, 0.5, 1.0])
def test_maps_of_any_spectrum_are_those_of_the_singular_values(
    monkeypatch: pytest.MonkeyPatch, rule: Orientation, steepness: float
) -> None:
    for shape in FLAT:
        features = white(*shape, steepness=steepness)
        found = allocation_map(features, GRID, orientation=rule)
        with monkeypatch.context() as patched:
            patched.setattr(mapping, "principal_components", reference)
            torch.testing.assert_close(found, allocation_map(features, GRID, orientation=rule), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", FLAT)
def test_a_flat_spectrum_has_the_same_map_in_any_order_of_the_tokens(shape: tuple[int, int, int]) -> None:
    noise = white(*shape)
    mirrored = allocation_map(noise.flip(-1), GRID).flip(-1)
    torch.testing.assert_close(mirrored, allocation_map(noise, GRID), atol=1e-5, rtol=0)
    order = torch.randperm(shape[1] * shape[2], generator=torch.Generator().manual_seed(1))
    shuffled = noise.flatten(2)[..., order].unflatten(2, shape[1:])
    options: dict[str, Any] = {"smoothing_sigma": 0, "orientation": "skewness"}
    expected = allocation_map(noise, shape[1:], **options).flatten(1)[:, order]
    torch.testing.assert_close(allocation_map(shuffled, shape[1:], **options).flatten(1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", FLAT)
def test_only_pictures_whose_iteration_has_not_settled_are_solved_in_full(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    steep, flat = white(*shape, steepness=1.0), white(*shape)
    blank = 0.1 + 1e-9 * flat[:1]  # white too, if it were not rounding
    rank_one = steep[:1] * 0 + torch.linspace(0, 1, shape[2]).double()  # the other two components are negligible
    unchecked, solved = principal_components(steep), []
    solve = axes._all_vectors

    def counted(matrix: Tensor, components: int) -> Tensor:
        solved.append(len(matrix))
        return solve(matrix, components)

    monkeypatch.setattr(axes, "_all_vectors", counted)
    found = principal_components(torch.cat([steep, blank, rank_one]))
    assert not solved
    for ours, expected in zip(found, unchecked, strict=True):
        torch.testing.assert_close(ours[:2], expected, atol=1e-6, rtol=1e-6)
    found = principal_components(torch.cat([flat[:1], steep, flat[1:], blank]))
    assert solved == [2]
    torch.testing.assert_close(found.projections[1:3], unchecked.projections)
    torch.testing.assert_close(found.projections[[0, 3]].abs(), reference(flat).projections.abs(), atol=1e-7, rtol=0)
    assert not found.projections[4].any() and not found.energy[4].any()


@pytest.mark.parametrize("spread", [1e-2, 1e-9])
def test_large_matrices_are_solved_in_full_to_the_last_digits(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    basis = torch.linalg.qr(white(150, 1, 150)[:, :, 0]).Q
    values = torch.linspace(0, 0.9, 150, dtype=torch.float64).repeat(2, 1)
    values[:, -3:] = 1 + spread * torch.arange(3, dtype=torch.float64)
    again: list[int] = []
    solve = axes._in_own_precision
    monkeypatch.setattr(axes, "_in_own_precision", lambda m, k: again.append(len(m)) or solve(m, k))
    matrix = (basis * values[:, None]) @ basis.mT
    found = axes._all_vectors(matrix, 3)
    assert again == ([] if spread > 1e-5 else [2])  # nearly equal ones are not for single precision
    expected = basis[..., -3:].flip(-1)
    assert (found.mT @ expected).diagonal(dim1=1, dim2=2).abs().sub(1).abs().max() < 1e-12
    torch.testing.assert_close(matrix @ found, found * values[:, None, -3:].flip(-1), atol=1e-11, rtol=0)


def test_pictures_that_need_more_rounds_get_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steep, slow, rounds = white(300, 17, 16, steepness=2.0), white(300, 17, 16, steepness=0.2), []
    search = axes.leading_vectors
    monkeypatch.setattr(axes, "leading_vectors", lambda m, *rest: rounds.append(len(m)) or search(m, *rest))
    found = principal_components(torch.cat([steep[:1], slow, steep[1:]]))
    assert rounds[:2] == [4, 2] and 2 < len(rounds) < 7
    expected = reference(torch.cat([steep[:1], slow, steep[1:]]))
    scale = expected.projections.abs().amax((1, 2, 3), keepdim=True)
    ours = found.projections.abs() / scale
    torch.testing.assert_close(ours.double(), expected.projections.abs() / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", FLAT)
def test_a_large_picture_does_not_depend_on_its_batch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    features = torch.cat([white(*shape, batch=3, steepness=1.0), white(*shape, batch=1)]).float()
    together = allocation_map(features, GRID)
    alone = torch.cat([allocation_map(row[None], GRID) for row in features])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    monkeypatch.setitem(axes.AT_ONCE, "cpu", 2 * features[0].numel())
    torch.testing.assert_close(together, allocation_map(features, GRID), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 9, 60])
@pytest.mark.parametrize("shape", FLAT)
def test_the_iteration_ends_where_the_features_have_no_more_directions(rank: int, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(rank)
    weights = 0.7 ** torch.arange(rank)
    left, right = (
        torch.randn(2, shape[0], rank, generator=generator),
        torch.randn(rank, *shape[1:], generator=generator),
    )
    features = torch.einsum("bdr,rhw->bdhw", left * weights, right) + 1
    found, expected = principal_components(features), reference(features)
    assert bool(axes._iterated(features.flatten(2), 3).settled.all())
    torch.testing.assert_close(found.projections.abs(), expected.projections.abs(), atol=1e-3, rtol=1e-4)
    assert not found.explained[:, rank:].any() and not found.projections[:, rank:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_large_features_that_are_not_finite_are_refused(bad: float) -> None:
    features = white(300, 17, 16, batch=3, steepness=1.0).float()
    features[1, 3, 2, 2] = bad
    with pytest.raises(ValueError, match=r"\[1\].*not finite"):
        allocation_map(features, GRID)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_sign_of_the_axes_has_no_consequence(
    monkeypatch: pytest.MonkeyPatch, rule: Orientation, shape: tuple[int, int, int], seed: int
) -> None:
    features, solve = blob(*shape), torch.linalg.eigh
    before = allocation_map(features, GRID, orientation=rule)

    def other_solver(matrix: Tensor) -> Any:
        values, vectors = solve(matrix)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, vectors[..., :1, :].shape, generator=generator) * 2 - 1
        return SimpleNamespace(eigenvalues=values, eigenvectors=vectors * signs)

    monkeypatch.setattr(torch.linalg, "eigh", other_solver)
    torch.testing.assert_close(allocation_map(features, GRID, orientation=rule), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_mirrored_picture_has_the_mirrored_map(rule: Orientation, shape: tuple[int, int, int], axis: int) -> None:
    features = blob(*shape)
    mirrored = allocation_map(features.flip(axis), GRID, orientation=rule)
    expected = allocation_map(features, GRID, orientation=rule).flip(axis)
    torch.testing.assert_close(mirrored, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["skewness", "energy"])
def test_order_of_tokens_is_not_seen(rule: Orientation) -> None:
    features = blob(20, 7, 9)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1))
    shuffled = features.flatten(2)[..., order].unflatten(2, (7, 9))
    shuffled_map = allocation_map(shuffled, (7, 9), smoothing_sigma=0, orientation=rule).flatten(1)
    expected = allocation_map(features, (7, 9), smoothing_sigma=0, orientation=rule).flatten(1)[:, order]
    torch.testing.assert_close(shuffled_map, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_interior_and_border_may_each_be_visited_in_any_order(rule: Orientation) -> None:
    features = blob(20, 8, 8)
    transposed = allocation_map(features.mT.contiguous(), (8, 8), orientation=rule).mT
    torch.testing.assert_close(transposed, allocation_map(features, (8, 8), orientation=rule), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_map_does_not_depend_on_its_batch(shape: tuple[int, int, int]) -> None:
    features = blob(*shape, batch=5)
    alone = torch.cat([allocation_map(row[None], GRID) for row in features])
    torch.testing.assert_close(allocation_map(features, GRID), alone, atol=1e-6, rtol=0)


def test_scale_and_shift_and_rotation_of_features_are_not_seen() -> None:
    features = blob(20, 7, 9)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(2))).Q
    changed = torch.einsum("ed,bdhw->behw", rotation, features) * 7 + 3
    torch.testing.assert_close(allocation_map(changed, GRID), allocation_map(features, GRID), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", get_args(Orientation))
@pytest.mark.parametrize("normalization", ["unit_mean", "minmax"])
def test_range_of_a_map(rule: Orientation, normalization: Any) -> None:
    maps = allocation_map(blob(20, 7, 9), GRID, orientation=rule, normalization=normalization)
    assert maps.shape == (3, *GRID) and maps.dtype == torch.float32
    assert bool(maps.isfinite().all() and (maps >= 0).all())
    if normalization == "minmax":
        assert maps.amax((1, 2)).tolist() == [1, 1, 1] and maps.amin((1, 2)).tolist() == [0, 0, 0]
    else:
        torch.testing.assert_close(maps.mean((1, 2)), torch.ones(3))


@pytest.mark.parametrize("rule", [r for r in RULES if r != "border"])  # a ramp across the ground misleads ``border``
def test_the_subject_is_lit_and_not_the_ground(rule: Orientation) -> None:
    maps = allocation_map(blob(20, 9, 9), (9, 9), orientation=rule)
    assert bool((maps[:, 4, 3] > 2 * maps[:, :, -1].mean(1)).all())


def test_a_subject_cut_by_the_border_is_still_the_subject() -> None:
    features = torch.zeros(1, 6, 12, 12)
    features[:, 0, 2:, 2:10] = 1.0  # a portrait: most of the lower border, 55 % of the picture
    features += 0.02 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    maps = allocation_map(features, (12, 12))
    assert maps[0, 4:, 4:8].mean() > 3 * maps[0, :, 0].mean()
    found = principal_components(features)
    edge = orientation._edge_cells(found)
    weight, subject = orientation._ground_likeness(found, edge)[0], features[0, 0].flatten()[edge] > 0.5
    assert weight[subject].max() < 0.05 * weight[~subject].mean()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4])
@pytest.mark.parametrize("normalization", ["unit_mean", "minmax"])
def test_features_without_structure_give_ones(value: float, normalization: Any) -> None:
    for rule in get_args(Orientation):
        maps = allocation_map(torch.full((2, 5, 4, 4), value), GRID, normalization=normalization, orientation=rule)
        assert torch.equal(maps, torch.ones(2, *GRID))


def test_a_blank_picture_does_not_touch_its_neighbours() -> None:
    features = blob(20, 7, 9)
    with_blank = torch.cat([features[:1], torch.ones(1, 20, 7, 9), features[1:]])
    torch.testing.assert_close(allocation_map(with_blank, GRID)[[0, 2, 3]], allocation_map(features, GRID))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    features = blob(20, 7, 9)
    features[1, 3, 2, 2] = bad
    with pytest.raises(ValueError, match=r"\[1\].*not finite"):
        allocation_map(features, GRID)


@pytest.mark.parametrize("shape", [(3, 7, 9), (20, 1, 2), (1, 1, 1), (4, 2, 2), (5, 1, 6)])
def test_more_components_than_rank(shape: tuple[int, int, int]) -> None:
    features = blob(*shape)
    found = principal_components(features, 9)
    rank = min(shape[0], shape[1] * shape[2] - 1)
    assert found.projections.shape == (3, 9, *shape[1:])
    assert not found.explained[:, rank:].any() and not found.projections[:, rank:].any()
    for rule in get_args(Orientation):
        for aggregation in ("variance", "average", "first"):
            maps = allocation_map(features, GRID, components=9, aggregation=aggregation, orientation=rule)
            assert bool(maps.isfinite().all() and (maps >= 0).all())
    average = [allocation_map(features, GRID, components=k, aggregation="average") for k in (max(rank, 1), 9)]
    torch.testing.assert_close(*average, atol=1e-5, rtol=0)


def test_equal_eigenvalues_do_not_explode() -> None:
    features = torch.zeros(1, 4, 5, 5)
    for channel, (y, x) in enumerate([(1, 1), (1, 3), (3, 1), (3, 3)]):
        features[0, channel, y, x] = 1.0
    assert bool(allocation_map(features, GRID).isfinite().all())


def test_each_ablation_changes_the_map() -> None:
    features = blob(20, 7, 9)
    variants = [allocation_map(features, GRID, components=k) for k in (1, 2, 3, 5)]
    variants += [allocation_map(features, GRID, smoothing_sigma=s) for s in (0, 0.5)]
    variants += [allocation_map(features, GRID, aggregation=a) for a in ("average", "first")]
    assert min((a - b).abs().max() for i, a in enumerate(variants) for b in variants[:i]) > 1e-2


@pytest.mark.parametrize("rule", ["skewness", "border_distance"])  # each component for itself
def test_the_first_of_three_components_is_the_only_one(rule: Orientation) -> None:
    first = allocation_map(blob(20, 7, 9), GRID, aggregation="first", orientation=rule)
    torch.testing.assert_close(first, allocation_map(blob(20, 7, 9), GRID, components=1, orientation=rule))


def test_smoothing_is_a_gaussian_that_keeps_the_edge_bright() -> None:
    flat = torch.ones(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(smooth(flat, 1.0), flat)
    point = torch.zeros(1, 15, 15, dtype=torch.float64)
    point[0, 7, 7] = 1.0
    smoothed = smooth(point, 1.0)[0]
    assert smoothed[7, 8] / smoothed[7, 7] == pytest.approx(np.exp(-0.5))
    assert smoothed.sum() == pytest.approx(1, abs=1e-4)


def test_half_precision_features_and_autocast_are_computed_in_full() -> None:
    features = blob(20, 7, 9).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = allocation_map(features, GRID)
    torch.testing.assert_close(inside, allocation_map(features.float(), GRID), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "option", [{"orientation": "up"}, {"aggregation": "sum"}, {"normalization": "max"}, {"components": 0}]
)
def test_unknown_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        allocation_map(blob(20, 7, 9), GRID, **option)


@pytest.mark.usefixtures("unchecked")
def test_negative_smoothing_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="smoothing_sigma=-1"):
        allocation_map(blob(20, 7, 9), GRID, smoothing_sigma=-1)
    with pytest.raises(ValueError, match=r"\(B, D, h, w\)"):
        allocation_map(torch.ones(2, 3, 4), GRID)


def test_components_as_a_picture() -> None:
    found = principal_components(blob(20, 7, 9), 3)
    colours = oriented(found, "background")
    assert colours.shape == (3, 3, 7, 9)
    assert colours.amin().item() == 0 and colours.amax().item() == 1


def test_causal_alignment() -> None:
    maps = torch.arange(9.0).reshape(1, 9, 1, 1)
    aligned = align_frames(maps, 3, temporal_stride=4)
    assert aligned.flatten().tolist() == [0, 2.5, 6.5]
    assert align_frames(maps[:, :8], 2, temporal_stride=4, causal=False).flatten().tolist() == [1.5, 5.5]
    assert align_frames(maps[:, :1], 1, temporal_stride=4).flatten().tolist() == [0]
    assert torch.equal(align_frames(maps, 9, temporal_stride=1), maps)


def test_a_moving_hot_cell_stays_in_its_latent_frame() -> None:
    for frame in range(13):
        maps = torch.zeros(1, 13, 2, 2)
        maps[0, frame] = 1.0
        mass = align_frames(maps, 4, temporal_stride=4).sum((0, 2, 3))
        assert mass.nonzero().flatten().tolist() == [(frame + 3) // 4]


@pytest.mark.parametrize(("frames", "latent", "causal"), [(8, 3, True), (9, 2, True), (9, 2, False), (4, 4, False)])
def test_frames_that_do_not_match_are_refused(frames: int, latent: int, causal: bool) -> None:
    with pytest.raises(ValueError, match=f"{frames} pixel frames do not match {latent} latent frames"):
        align_frames(torch.ones(1, frames, 2, 2), latent, temporal_stride=4, causal=causal)


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_videos(scope: Any) -> None:
    clips = moving_square(9).repeat(2, 1, 1, 1, 1)
    maps = PerceptualStructuring(backbone, scope=scope, temporal_stride=4, batch_size=4)(clips, (3, 6, 11))
    assert maps.shape == (2, 3, 6, 11)
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.ones(2))
    centre = (maps.sum(2) * torch.arange(11)).sum(-1) / maps.sum((2, 3))
    assert bool((centre.diff(dim=1) > 0.8).all())  # the mass walks with the square
    columns = maps[0].amax(1).argmax(-1).tolist()
    assert columns[0] in (1, 2) and columns[2] >= 6


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_the_mass_lies_where_the_object_is_in_the_frames_of_a_latent_frame(scope: Any) -> None:
    clip = moving_square(13)  # in column f + 1 of pixel frame f
    source = PerceptualStructuring(backbone, scope=scope, temporal_stride=4, smoothing_sigma=0)
    columns = source(clip, (4, 6, 15))[0].amax(1)
    for k, frames in enumerate([range(1), range(1, 5), range(5, 9), range(9, 13)]):
        assert set(columns[k].topk(len(frames)).indices.tolist()) == {frame + 1 for frame in frames}


def test_flicker_is_the_mean_change_over_the_mean() -> None:
    maps = torch.tensor([[1.0, 3.0], [2.0, 1.0], [2.0, 3.0]]).reshape(1, 3, 1, 2)
    assert flicker(maps).item() == pytest.approx(((1 + 2 + 0 + 2) / 4) / 2)
    both = torch.cat([maps, 7 * maps, torch.zeros_like(maps), torch.ones_like(maps)])
    torch.testing.assert_close(flicker(both), torch.tensor([0.625, 0.625, 0, 0]))
    assert flicker(torch.rand(3, 1, 4, 4)).tolist() == [0, 0, 0]


def test_one_basis_per_clip_does_not_flicker_where_the_axes_of_frames_change_places() -> None:
    noise = torch.randn(1, 3, 9, 48, 64, generator=torch.Generator().manual_seed(0))
    clip = 0.4 + 0.02 * noise
    for frame in range(9):  # two patches of nearly equal variance: each frame, the other one is the first component
        clip[0, 0, frame, 8:24, 8:24] += 0.4 + 0.02 * (-1) ** frame
        clip[0, 1, frame, 24:40, 40:56] += 0.4 - 0.02 * (-1) ** frame
    by_frame, by_clip = (
        flicker(
            PerceptualStructuring(lambda images: FeatureMap(F.avg_pool2d(images, 8), 8), scope=s, components=1)(
                clip, (9, 6, 8)
            )
        ).item()
        for s in ("frame", "clip")
    )
    assert 0 < by_clip < 0.5 * by_frame


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_batch_size_is_not_seen(scope: Any) -> None:
    clips = torch.rand(2, 3, 5, 48, 48, generator=torch.Generator().manual_seed(3))
    small, large = (
        PerceptualStructuring(backbone, scope=scope, temporal_stride=2, batch_size=b)(clips, (3, 6, 6)) for b in (1, 64)
    )
    torch.testing.assert_close(small, large, atol=1e-6, rtol=0)


def test_a_clip_has_one_basis_for_all_its_frames() -> None:
    clip = moving_square(5)
    clip[:, :, 2] = 0.5 + 0.1 * (clip[:, :, 2] - 0.5)  # the square nearly fades in one frame
    by_frame, by_clip = (PerceptualStructuring(backbone, scope=s)(clip, (5, 6, 7))[0] for s in ("frame", "clip"))
    assert by_frame[2].amax() > 0.9 * by_frame[0].amax()  # alone, the faint square is all there is
    assert by_clip[2].amax() < 0.5 * by_clip[0].amax()
    assert by_clip.mean() == pytest.approx(1, abs=1e-5)


def test_one_colour_gives_ones_whatever_padding_does() -> None:
    def padded(images: Tensor) -> FeatureMap:
        return FeatureMap(F.conv2d(images, torch.ones(4, 3, 3, 3), stride=8, padding=1), 8)

    pictures = torch.full((2, 3, 1, 32, 32), 0.3)
    pictures[1] = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = PerceptualStructuring(padded)(pictures, (1, 4, 4))
    assert torch.equal(maps[0], torch.ones(1, 4, 4)) and maps[1].std() > 0.1


def test_real_backbone_sees_the_cat() -> None:
    data = pytest.importorskip("skimage.data")
    lite = pytest.importorskip("vipo.backbones.efficientnet_lite")
    cat = torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)[None].float() / 255
    picture = F.interpolate(cat, size=(224, 224), mode="bilinear", antialias=True).clamp(0, 1)[:, :, None]
    found = PerceptualStructuring(lite.EfficientNetLite(stride=16, resolution=224))(picture, (1, 16, 16))[0, 0]
    face, right_border = found[4:14, 4:12].mean(), found[:, -2:].mean()
    assert face > 1.2 * right_border, "the face should outweigh the wall behind it"


@pytest.mark.parametrize("new", [False, True])
def test_products_are_exact_whichever_way_a_program_allowed_others(monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
    """torch raises for ``get_float32_matmul_precision`` once a program has set ``fp32_precision``."""
    matmul, seen, solve = torch.backends.cuda.matmul, list[str](), axes._in_full
    monkeypatch.setattr(axes, "_in_full", lambda m, k: seen.append(matmul.fp32_precision) or solve(m, k))
    try:
        if new:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        principal_components(torch.rand(1, 4, 3, 3), 2)
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")

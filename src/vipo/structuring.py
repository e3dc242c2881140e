"""From features to an allocation map: which positions of a sample its reward should be credited to.

The perceptual structuring module of ViPO (arXiv 2511.18719). A backbone gives one feature vector per cell of a picture;
centred, X (n cells, D) has the principal components X = sum_j z_j v_j^T with z_j the projection on axis j and
lambda_j = |z_j|^2 / |X|^2 its share of the *total* variance. With K components the map is

    S = sum_j lambda_j z'_j,     M = normalise(upsample(gaussian * S)),     z'_j in [0, 1] an *oriented* z_j.

An axis has no sign: v_j and -v_j are equally right, and which one a solver returns is an accident. An orientation rule
turns z_j into z'_j such that the accident has no consequence. Three rules choose a sign and stretch z_j to [0, 1]:

==================== ==================================================================================
``border``           the interior's mean lies above the border's
``skewness``         the longer tail (the smaller cluster) is the subject
``energy``           z_j correlates with |X|, the distance of a cell from the mean
==================== ==================================================================================

The others need no sign:

==================== ==================================================================================
``background``       the mean of |z_j - z_j(e)| over the border cells e, each weighted by how much it looks like ground,
                     stretched to [0, 1]. A border cell looks like ground if its likes lie along the border rather than
                     inside, so a subject that is cut by the border does not count as ground. The default.
``border_distance``  |z_j - median of z_j over the border|, stretched to [0, 1]
``release``          (max - z_j) / (max - min), whatever the solver returned; for comparison only: it depends on the
                     library, the device and the order of the tokens, so its maps are not reproducible elsewhere
==================== ==================================================================================

Everything is batched on the features' device, in float64 where the device has it (float32 where not), under no_grad
and outside autocast, so that a map does not depend on its batch, on the dtype of the model or on the eigensolver.
Letters as in ``vipo.types``: B pictures, D feature width, h w feature grid, H W latent grid, F frames; K components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vipo.types import Backbone, Grid, LatentGrid

Aggregation = Literal["variance", "average", "first"]
Normalization = Literal["unit_mean", "minmax"]
Orientation = Literal["background", "border_distance", "border", "skewness", "energy", "release"]
Scope = Literal["frame", "clip"]

NEGLIGIBLE = 1e-6  # a share of the variance below this is rounding noise, not a component
BLANK = 1e-10  # variance of the cells over their mean square, below which a picture has no structure

LARGE, BLOCK, POWERS = 256, 24, 16  # side of a matrix too large to solve in full; width and length of the iteration
SETTLED = 1e-6  # angle (radians) by which an iterated axis may be off: about ten times the error of the map
LIKENESS, SHARPNESS = 0.35, 4  # of ``background``; measured in experiments/orientation, flat around these values


class Components(NamedTuple):
    """The principal components of each picture's features, with the signs the solver returned, largest first.

    ``energy`` is |X|: each cell's distance from the mean feature, over all D dimensions.
    """

    projections: Float[Tensor, "B K *grid"]
    explained: Float[Tensor, "B K"]
    energy: Float[Tensor, "B *grid"]


def principal_components(features: Float[Tensor, "B D *grid"], components: int = 3) -> Components:
    """PCA of the cells of each picture, or of each clip when the grid is (F, h, w).

    Components beyond the rank of the features, and all components of a blank picture, are exactly zero.

    Raises:
        ValueError: features that are not (B, D, ..., h, w) or not finite, or components < 1.
    """
    _check_features(features, components)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        tokens = features.to(_precise(features.device)).flatten(2).transpose(1, 2)
        scale = tokens.square().mean((1, 2))
        centred = tokens - tokens.mean(1, keepdim=True)
        total = centred.square().sum((1, 2))
        blank = total <= BLANK * scale * centred[0].numel()
        centred.masked_fill_(blank[:, None, None], 0)  # what is left there is rounding, and has no axes to look for
        projections = _project(centred, components)
        explained = projections.square().sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
        kept = (explained > NEGLIGIBLE) & ~blank[:, None]
        explained = explained.where(kept, explained.new_zeros(()))
        projections = projections.where(kept[:, None], projections.new_zeros(()))
        grid = features.shape[2:]
        energy = centred.norm(dim=2).unflatten(1, grid)
        return Components(projections.transpose(1, 2).unflatten(2, grid), explained, energy)


def _check_features(features: Tensor, components: int) -> None:
    if features.ndim < 4 or 0 in features.shape[1:]:
        raise ValueError(f"features {tuple(features.shape)} must be (B, D, h, w), or (B, D, F, h, w) for clips")
    if components < 1:
        raise ValueError(f"components={components}: a map needs at least 1 principal component")
    if not bool(features.isfinite().all()):
        bad = (~features.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features of picture {bad} in the batch are not finite; mask those samples out instead")


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _project(centred: Float[Tensor, "B n D"], components: int) -> Float[Tensor, "B n K"]:
    """Projections on the leading axes, from the smaller of the Gram (n, n) and the covariance (D, D) matrix."""
    n, width = centred.shape[1:]
    if width <= n:
        vectors = _leading_vectors(centred.mT @ centred, _start(centred), components)
        projections = centred @ vectors
    else:
        gram = centred @ centred.mT
        vectors = _leading_vectors(gram, centred @ _start(centred), components)
        projections = vectors * (vectors * (gram @ vectors)).sum(1, keepdim=True).clamp_min(0).sqrt()
    return F.pad(projections, (0, components - projections.shape[-1]))


def _start(centred: Float[Tensor, "B n D"]) -> Float[Tensor, "D block"]:
    """Where a subspace iteration starts: fixed directions among the features, so that token order does not matter."""
    directions = torch.randn(centred.shape[2], BLOCK, generator=torch.Generator().manual_seed(0))
    return directions.to(centred)


def _leading_vectors(
    matrix: Float[Tensor, "B m m"], start: Float[Tensor, "*B m block"], components: int
) -> Float[Tensor, "B m K"]:
    """Eigenvectors of the largest eigenvalues, largest first; of a large matrix by subspace iteration.

    The iteration multiplies what is not among the leading K by (lambda_{BLOCK+1} / lambda_K)^POWERS: nothing is left
    for the steep spectra of backbones. Pictures whose spectrum is too flat for that are solved in full.
    """
    if matrix.shape[1] <= LARGE or components > BLOCK // 2:
        return _all_vectors(matrix, components)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS // 2):
        basis = torch.linalg.qr(matrix @ (matrix @ basis)).Q
    image = matrix @ basis
    small = torch.linalg.eigh(basis.mT @ image)
    values, rotation = small.eigenvalues.flip(-1), small.eigenvectors.flip(-1)[..., :components]
    vectors = basis @ rotation
    moving = ~_settled(matrix, vectors, image @ rotation, values)
    if bool(moving.any()):
        vectors[moving] = _all_vectors(matrix[moving], components)
    return vectors


def _all_vectors(matrix: Float[Tensor, "B m m"], components: int) -> Float[Tensor, "B m K"]:
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)[..., :components]


def _settled(
    matrix: Float[Tensor, "B m m"],
    vectors: Float[Tensor, "B m K"],
    image: Float[Tensor, "B m K"],
    values: Float[Tensor, "B block"],
) -> Bool[Tensor, " B"]:
    """Whether each axis that counts is within ``SETTLED`` of the eigenvector: |A v - theta v| / gap bounds its angle.

    The gap is the distance of theta from the nearest other one (Davis and Kahan, sin theta theorem). ``image`` is A v,
    ``values`` all theta of the iteration's block, largest first. A share below ``NEGLIGIBLE`` does not count.
    """
    count = vectors.shape[2]
    residual = (image - vectors * values[:, None, :count]).norm(dim=1)
    distance = (values[:, :count, None] - values[:, None]).abs()
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    allowed = max(SETTLED, torch.finfo(values.dtype).eps ** 0.5)  # float32 has no 1e-6 to give
    near = residual <= allowed * distance.amin(2)
    return (near | (values[:, :count] <= NEGLIGIBLE * trace)).all(1)


def oriented(found: Components, orientation: Orientation = "background") -> Float[Tensor, "B K *grid"]:
    """z'_j in [0, 1] for each component: high where the rule sees the subject. A component without spread gives 0."""
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation={orientation!r} is not known; choose from {', '.join(get_args(Orientation))}")
    with torch.no_grad():
        return _stretch(ORIENTATIONS[orientation](found), keep=2)


def _stretch(values: Tensor, keep: int) -> Tensor:
    """Min-max to [0, 1] over all but the first ``keep`` dimensions; 0 where there is no spread."""
    flat = values.flatten(keep)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    spread = high - low
    unit = (flat - low) / spread.where(spread > 0, torch.ones_like(spread))
    return unit.reshape(values.shape)


def _edge_cells(found: Components) -> Bool[Tensor, " n"]:
    """Which of a frame's n = h w cells lie on the edge of the picture."""
    edge = torch.ones(found.projections.shape[-2:], dtype=torch.bool, device=found.projections.device)
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def _border(found: Components) -> Bool[Tensor, "*grid"]:
    grid = found.projections.shape[2:]
    return _edge_cells(found).reshape(grid[-2:]).expand(grid)


def _signed(found: Components, statistic: Tensor) -> Tensor:
    """Projections times the sign of a (B, K) statistic that is odd in them; a tie tells nothing and gives 0."""
    sign = statistic.sign() * (statistic.abs() > NEGLIGIBLE)
    return found.projections * sign.reshape(*sign.shape, *[1] * (found.projections.ndim - 2))


def _standard(found: Components) -> Float[Tensor, "B K n"]:
    flat = found.projections.flatten(2)
    deviation = flat.square().mean(-1, keepdim=True).sqrt()
    return flat / deviation.where(deviation > 0, torch.ones_like(deviation))


def _by_border(found: Components) -> Tensor:
    edge, z = _border(found).flatten(), _standard(found)
    if bool(edge.all()):
        return _signed(found, torch.zeros_like(found.explained))
    return _signed(found, z[..., ~edge].mean(-1) - z[..., edge].mean(-1))


def _by_skewness(found: Components) -> Tensor:
    return _signed(found, _standard(found).pow(3).mean(-1))


def _by_energy(found: Components) -> Tensor:
    energy = found.energy.flatten(1)
    energy = energy / energy.mean(1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    return _signed(found, (_standard(found) * (energy - 1)[:, None]).mean(-1))


def _border_distance(found: Components) -> Tensor:
    edge = _border(found)
    return (found.projections - _median(found.projections[..., edge])[(..., *[None] * edge.ndim)]).abs()


def _median(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """The middle value, or the mean of the two middle ones: symmetric under a change of sign."""
    ordered, n = values.sort(dim=-1).values, values.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def _release(found: Components) -> Tensor:
    return -found.projections


def _background(found: Components) -> Tensor:
    z = found.projections.flatten(-2)
    edge = _edge_cells(found)
    weight = _ground_likeness(found, edge).unsqueeze(1).unsqueeze(-1)
    distance = (z[..., :, None] - z[..., None, edge]).abs()
    return (distance @ weight).reshape(found.projections.shape)


def _ground_likeness(found: Components, edge: Tensor) -> Float[Tensor, "B *F edge"]:
    """Weights of the border cells of each frame, summing to 1: boundary connectivity to the power ``SHARPNESS``.

    Likeness is a(e, q) = exp(-|z(e) - z(q)|^2 / 2 (LIKENESS s)^2), with s^2 the mean squared distance of two cells. A
    border cell's connectivity is sum_{q on the border} a(e, q) / sqrt(sum_q a(e, q)): the length of its region along
    the border over the root of its area (after Zhu et al., CVPR 2014). All K components count together.
    """
    cells = found.projections.flatten(-2).movedim(1, -1)
    spread = 2 * found.projections.flatten(2).square().sum(1).mean(1) * LIKENESS**2
    squared = torch.cdist(cells[..., edge, :], cells, compute_mode="donot_use_mm_for_euclid_dist").square()
    spread = spread.where(spread > 0, torch.ones_like(spread)).reshape(-1, *[1] * (squared.ndim - 1))
    like = torch.exp(-squared / (2 * spread))
    connectivity = like[..., edge].sum(-1) / like.sum(-1).sqrt()
    weight = connectivity.pow(SHARPNESS)
    return weight / weight.sum(-1, keepdim=True)


ORIENTATIONS: dict[str, Callable[[Components], Tensor]] = {
    "background": _background,
    "border_distance": _border_distance,
    "border": _by_border,
    "skewness": _by_skewness,
    "energy": _by_energy,
    "release": _release,
}


def _aggregate(maps: Float[Tensor, "B K *grid"], explained: Float[Tensor, "B K"], how: Aggregation) -> Tensor:
    """S = sum_j weight_j z'_j, with weights that ignore components that are not there."""
    if how == "variance":
        weight = explained
    elif how == "average":
        there = (explained > 0).to(explained)
        weight = there / there.sum(1, keepdim=True).clamp_min(1)
    elif how == "first":
        weight = F.one_hot(torch.zeros_like(explained[:, 0], dtype=torch.long), explained.shape[1]).to(explained)
    else:
        raise ValueError(f"aggregation={how!r} is not known; choose from {', '.join(get_args(Aggregation))}")
    return torch.einsum("bk,bk...->b...", weight, maps)


def smooth(maps: Float[Tensor, "... h w"], sigma: float) -> Float[Tensor, "... h w"]:
    """A Gaussian of ``sigma`` cells whose weights are normalised over the cells that exist, so no edge is darkened."""
    if not sigma >= 0:
        raise ValueError(f"smoothing_sigma={sigma}: give a width in cells of the feature grid, or 0 for none")
    if sigma == 0:
        return maps
    rows, columns = (_gaussian(size, sigma, maps) for size in maps.shape[-2:])
    return rows @ maps @ columns.mT


def _gaussian(size: int, sigma: float, like: Tensor) -> Float[Tensor, "size size"]:
    at = torch.arange(size, device=like.device, dtype=like.dtype)
    weights = torch.exp(-(at[:, None] - at).square() / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def resample(maps: Float[Tensor, "B *F h w"], grid: Grid) -> Float[Tensor, "B *F H W"]:
    """Bilinear to the latent grid; where cells are merged they are averaged (antialias), not skipped."""
    pictures = maps.flatten(0, -3)[:, None]
    smaller = grid[0] < maps.shape[-2] or grid[1] < maps.shape[-1]
    resized = F.interpolate(pictures, size=tuple(grid), mode="bilinear", align_corners=False, antialias=smaller)
    return resized.reshape(*maps.shape[:-2], *grid)


def normalise(maps: Float[Tensor, "B *grid"], how: Normalization) -> Float[Tensor, "B *grid"]:
    """Over all of a row: [0, 1] (``minmax``) or mean 1 (``unit_mean``). A uniform map becomes ones in both."""
    if how not in get_args(Normalization):
        raise ValueError(f"normalization={how!r} is not known; choose from {', '.join(get_args(Normalization))}")
    flat = maps.clamp_min(0).flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    uniform = high - low <= NEGLIGIBLE * high
    unit = (flat - low) / (high - low) if how == "minmax" else flat / flat.mean(1, keepdim=True)
    return unit.where(~uniform, torch.ones_like(unit)).reshape(maps.shape).float()


def _structure(
    features: Tensor, components: int, aggregation: Aggregation, smoothing_sigma: float, orientation: Orientation
) -> Float[Tensor, "B *F h w"]:
    """The smoothed S of each row of features, on the feature grid."""
    found = principal_components(features, components)
    return smooth(_aggregate(oriented(found, orientation), found.explained, aggregation), smoothing_sigma)


@torch.no_grad()
def allocation_map(
    features: Float[Tensor, "B D h w"],
    grid: Grid,
    *,
    components: int = 3,
    aggregation: Aggregation = "variance",
    smoothing_sigma: float = 1.0,
    normalization: Normalization = "unit_mean",
    orientation: Orientation = "background",
) -> Float[Tensor, "B H W"]:
    """One non-negative weight per latent position, from one picture's features.

    Args:
        grid: (H, W) of the latents.
        components: K, the number of principal components.
        aggregation: weights of the components: ``variance`` (lambda_j), ``average`` (equal) or ``first`` (only j = 1).
        smoothing_sigma: width of the Gaussian in cells of the feature grid; 0 is none.
        normalization: ``unit_mean`` (the mean over the positions is 1, so scalar GRPO is M = 1) or ``minmax`` ([0, 1]).
            A picture without structure gives ones in both.
        orientation: what makes the map independent of the sign of the axes; see the top of this file.

    Raises:
        ValueError: features that are not (B, D, h, w) or not finite, or an option that is not known.
    """
    if features.ndim != 4:
        raise ValueError(f"features {tuple(features.shape)} must be (B, D, h, w)")
    structure = _structure(features, components, aggregation, smoothing_sigma, orientation)
    return normalise(resample(structure, grid), normalization)


@torch.no_grad()
def deviation_map(
    latents: Float[Tensor, "N C T H W"],
    group_size: int,
    *,
    smoothing_sigma: float = 1.0,
    normalization: Normalization = "unit_mean",
) -> Float[Tensor, "N T H W"]:
    """Where each sample differs from its group: |latents - the group's mean|^2, summed over channels.

    Not in the paper. Of samples that started from one noise, nothing else can explain why one scored more than another;
    docs/results.md measures what that is worth. Samples from different noises differ everywhere.

    Args:
        latents: clean ones, groups consecutive.
        smoothing_sigma: width of the Gaussian in latent cells; 0 is none.
        normalization: as in ``allocation_map``. A sample that equals its group's mean gets ones.

    Raises:
        ValueError: the samples do not divide into groups.
    """
    if group_size < 1 or len(latents) % group_size:
        raise ValueError(f"{len(latents)} samples do not divide into groups of group_size={group_size}")
    grouped = latents.float().unflatten(0, (-1, group_size))
    squared = (grouped - grouped.mean(1, keepdim=True)).square().sum(2).flatten(0, 1)
    return normalise(smooth(squared, smoothing_sigma), normalization)


def align_frames(
    maps: Float[Tensor, "B F H W"], latent_frames: int, *, temporal_stride: int, causal: bool = True
) -> Float[Tensor, "B T H W"]:
    """Maps per pixel frame to maps per latent frame, with stride s = ``temporal_stride``.

    A causal video VAE encodes pixel frame 0 alone: latent frame 0 is pixel frame 0, latent frame k the mean of pixel
    frames s(k-1)+1 .. sk, so F = s(T-1) + 1. Otherwise each latent frame is the mean of s consecutive ones, F = sT.

    Raises:
        ValueError: maps that are not (B, F, H, W), or an F that does not belong to T.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps {tuple(maps.shape)} must be (B, F, H, W)")
    if temporal_stride < 1 or latent_frames < 1:
        raise ValueError(f"temporal_stride={temporal_stride} and latent_frames={latent_frames} must be at least 1")
    frames = maps.shape[1]
    expected = temporal_stride * (latent_frames - 1) + 1 if causal else temporal_stride * latent_frames
    if frames != expected:
        kind = "causal" if causal else "non-causal"
        raise ValueError(
            f"{frames} pixel frames do not match {latent_frames} latent frames: a {kind} VAE with"
            f" temporal_stride={temporal_stride} has {expected}"
        )
    head = 1 if causal else 0
    rest = maps[:, head:].unflatten(1, (-1, temporal_stride)) if frames > head else maps[:, :0, None]
    return torch.cat([maps[:, :head], rest.mean(2)], dim=1)


def flicker(maps: Float[Tensor, "N T H W"]) -> Float[Tensor, " N"]:
    """How much the map of a clip changes from one latent frame to the next, in units of its mean:

        mean over t, p of |M(t+1, p) - M(t, p)|  /  mean over t, p of M(t, p)

    0 for maps that stand still, for T = 1 and for a map of zeros. A subject that moves counts too, so compare the
    numbers of one kind of clip.
    """
    if maps.shape[1] == 1:
        return maps.new_zeros(len(maps))
    change, mean = maps.diff(dim=1).abs().mean((1, 2, 3)), maps.mean((1, 2, 3))
    return change / mean.where(mean > 0, torch.ones_like(mean))


@dataclass(frozen=True)
class PerceptualStructuring:
    """Media to one non-negative weight per latent position: backbone, principal components, latent frames.

    Args:
        backbone: frozen vision network, pictures in [0, 1] to a ``FeatureMap``.
        components, aggregation, smoothing_sigma, normalization, orientation: as in ``allocation_map``.
        scope: ``frame`` (the paper: each frame has its own components and is normalised alone) or ``clip`` (one basis
            for all frames of a clip, normalised over the clip: no flicker, and a frame may weigh more than another).
        temporal_stride, causal: how the VAE maps pixel frames to latent frames, as in ``align_frames``.
        batch_size: frames per call of the backbone.
    """

    backbone: Backbone
    components: int = 3
    aggregation: Aggregation = "variance"
    smoothing_sigma: float = 1.0
    normalization: Normalization = "unit_mean"
    orientation: Orientation = "background"
    scope: Scope = "frame"
    temporal_stride: int = 1
    causal: bool = True
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r} is not known; choose from {', '.join(get_args(Scope))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")

    @torch.no_grad()
    def __call__(self, media: Float[Tensor, "N 3 F Y X"], latent_grid: LatentGrid) -> Float[Tensor, "N T H W"]:
        """Maps for media in [0, 1]. A frame of one colour has no structure and gives ones (or the clip's floor)."""
        if media.ndim != 5 or media.shape[1] != 3 or 0 in media.shape:
            raise ValueError(f"media {tuple(media.shape)} must be (N, 3, F, Y, X); an image has F = 1")
        latent_frames, *grid = latent_grid
        by_row = self._by_frame if self.scope == "frame" else self._by_clip
        maps = by_row(media, (grid[0], grid[1]))
        aligned = align_frames(maps, latent_frames, temporal_stride=self.temporal_stride, causal=self.causal)
        return aligned if self.scope == "frame" else normalise(aligned, self.normalization)

    def _by_frame(self, media: Tensor, grid: Grid) -> Float[Tensor, "N F H W"]:
        frames = media.transpose(1, 2).flatten(0, 1)
        maps = [
            normalise(self._map(self._see(part), grid), self.normalization) for part in frames.split(self.batch_size)
        ]
        return torch.cat(maps).unflatten(0, (media.shape[0], media.shape[2]))

    def _by_clip(self, media: Tensor, grid: Grid) -> Float[Tensor, "N F H W"]:
        clips = []
        for clip in media.transpose(1, 2):
            features = torch.cat([self._see(part) for part in clip.split(self.batch_size)])
            clips.append(self._map(features.transpose(0, 1)[None], grid))
        return torch.cat(clips)

    def _map(self, features: Tensor, grid: Grid) -> Tensor:
        structure = _structure(features, self.components, self.aggregation, self.smoothing_sigma, self.orientation)
        return resample(structure, grid)

    def _see(self, frames: Float[Tensor, "b 3 Y X"]) -> Float[Tensor, "b D h w"]:
        """Features of frames; one colour everywhere gives constant features, whatever the padding made."""
        features = self.backbone(frames).features
        blank = frames.flatten(2).amax(2) - frames.flatten(2).amin(2) <= 1e-3
        return features.where(~blank.all(1)[:, None, None, None], features.new_ones(()))

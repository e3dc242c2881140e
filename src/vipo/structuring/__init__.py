"""From features to an allocation map: which positions of a sample its reward should be credited to.

The perceptual structuring module of ViPO (arXiv 2511.18719). A backbone gives one feature vector per cell of a picture;
centred, X (n cells, D) has the principal components X = sum_j z_j v_j^T with z_j the projection on axis j and
lambda_j = |z_j|^2 / |X|^2 its share of the *total* variance. With K components the map is

    S = sum_j lambda_j z'_j,     M = normalise(upsample(gaussian * S)),     z'_j in [0, 1] an *oriented* z_j.

=============== ===========================================================================
``components``  X to z_j and lambda_j
``orientation`` z_j to z'_j, whatever sign the solver returned
``maps``        S and M, and the maps that need no backbone
``frames``      maps per pixel frame to maps per latent frame, and their flicker
``perceptual``  all of it: media to maps
``sources``     everything a recipe may take maps from, as objects with one interface
=============== ===========================================================================

Everything is batched on the features' device, in float64 where the device has it (float32 where not), under no_grad
and outside autocast, so that a map does not depend on its batch, on the dtype of the model or on the eigensolver.
Letters as in ``vipo.types``: B pictures, D feature width, h w feature grid, H W latent grid, F frames; K components.
"""

from vipo.options import Aggregation, Normalization, Orientation, Scope
from vipo.structuring.components import Components, principal_components
from vipo.structuring.frames import align_frames, flicker
from vipo.structuring.maps import (
    allocation_map,
    consensus_map,
    deviation_map,
    normalise,
    resample,
    signed_consensus_map,
    smooth,
)
from vipo.structuring.orientation import ORIENTATIONS, oriented
from vipo.structuring.perceptual import PerceptualStructuring, Seen, oriented_components

__all__ = [
    "ORIENTATIONS",
    "Aggregation",
    "Components",
    "Normalization",
    "Orientation",
    "PerceptualStructuring",
    "Scope",
    "Seen",
    "align_frames",
    "allocation_map",
    "consensus_map",
    "deviation_map",
    "flicker",
    "normalise",
    "oriented",
    "oriented_components",
    "principal_components",
    "resample",
    "signed_consensus_map",
    "smooth",
]

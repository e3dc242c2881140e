"""A map source of your own: positions count by how bright the picture is there."""

import torch.nn.functional as F
from torch import Tensor


def brightness(rollout, _advantage, _scores) -> Tensor:  # -> (N, T, H, W), not negative, mean 1
    """The mean of the channels, averaged over the pixels of each latent position."""
    bright = rollout.media.mean(1, keepdim=True)  # (N, 1, F, Y, X)
    maps = F.adaptive_avg_pool3d(bright, rollout.latent_grid)[:, 0] + 1e-3
    return maps / maps.mean((1, 2, 3), keepdim=True)

"""A credit of your own: praise goes where the map is heavy, and blame is spread over the whole picture."""

import torch
from torch import Tensor


def praise_only(advantage, maps) -> Tensor:  # of advantage, maps, scores, rollout -> (N,) or (N, T, H, W)
    """The map where the advantage is positive, ones where it is not."""
    whole = advantage[:, None, None, None]
    return whole * torch.where(whole > 0, maps, torch.ones_like(maps))

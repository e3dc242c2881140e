"""A reward of your own: the share of a picture's pixels that are warm."""

from torch import Tensor


def warmth(media, _prompts) -> Tensor:  # media (N, 3, F, Y, X) in [0, 1] and N prompts -> (N,), higher is better
    """The share of pixels, over all frames, that have clearly more red than blue."""
    red, blue = media[:, 0], media[:, 2]
    return (red > blue + 0.1).float().mean((1, 2, 3))

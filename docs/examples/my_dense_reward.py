"""A reward of your own that says where: how warm each pixel is, and the mean of that as the score."""


class Warmth:
    def __call__(self, media, prompts):
        return self.with_evidence(media, prompts)[0]

    def with_evidence(self, media, _prompts):  # -> scores (N,), evidence (N, T, H, W) from -1 (at fault) to 1 (earned)
        """One pass for both: red less blue at each pixel of each frame."""
        warm = media[:, 0] - media[:, 2]
        return warm.mean((1, 2, 3)), warm

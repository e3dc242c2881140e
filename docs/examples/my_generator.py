"""A generator of your own: FLUX.1 whose every prompt ends with the words that a fine-tune was taught to listen to."""

from vipo.generators.flux import FluxGenerator, FluxText


class Reader(FluxText):
    """What an adapter does with prompts is here, so that they are still encoded once only and kept."""

    def read(self, prompts):  # N prompts -> a vipo.types.Batched of N rows
        """As FLUX.1's own reader, with the words."""
        return super().read([f"{prompt} on a white background" for prompt in prompts])


class OnWhite(FluxGenerator):
    """Everything else (size, guidance, decoding, LoRA targets, export) is FLUX.1's."""

    text_reader = Reader

"""What every adapter of a diffusers pipeline must do, as functions that its tests call on a tiny model.

``draw`` is the one thing a test of an adapter brings itself: a plain diffusers pipeline to pictures. What injects or
trains weights wants a generator of its own, not one that other tests share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor
from torch.utils._pytree import tree_map_only

import tiny
from vipo import objective, sde
from vipo.engine import Engine
from vipo.generators.common import DiffusersGenerator
from vipo.options import Objective, OptimizerOptions, Solver
from vipo.plan import Ledger
from vipo.plan.meter import Meter
from vipo.policy import Policy
from vipo.prompts.sampler import PromptSampler
from vipo.recipe import parse_recipe
from vipo.rollout import replay, sample_groups
from vipo.structuring import PerceptualStructuring
from vipo.structuring.sources import Perceptual
from vipo.training.trainer import Trainer
from vipo.types import Prompt

Draw = Callable[[Any], Tensor]


def noise(generator: DiffusersGenerator, n: int, seed: int = 0) -> Tensor:
    """(n, C, T, H, W) normal noise; the first rows of more samples are those of fewer."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(generator.latent_shape(), generator=rng) for _ in range(n)])


@torch.no_grad()
def ode(
    generator: DiffusersGenerator, prompts: Sequence[str], start: Tensor, steps: int, shift: float | None = None
) -> Tensor:
    """The media that our own ODE reaches from ``start``, (N, 3, F, Y, X); the model's own shift unless told."""
    conditioning = generator.encode(prompts)
    sigmas, z = sde.shifted_sigmas(steps, shift or generator.shift), start
    for now, after in pairwise(sigmas):
        velocity = generator.velocity(z, now.expand(len(z)), conditioning)
        z = sde.transition(velocity, z, now, after, kind="ode", eta=0.0).mean
    return generator.decode(z)


@torch.no_grad()
def velocity(generator: DiffusersGenerator, prompts: Sequence[str], sigma: float = 0.7) -> Tensor:
    """The velocity of one seeded noise per prompt."""
    return generator.velocity(
        noise(generator, len(prompts), seed=3), torch.full((len(prompts),), sigma), generator.encode(prompts)
    )


def same_pictures(mine: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    """Equal, of one shape, and not grey: two grey pictures would agree too."""
    assert mine.shape == theirs.shape, f"{tuple(mine.shape)} and {tuple(theirs.shape)}"
    assert mine.std() > 0.02, f"grey pictures prove nothing: std {mine.std():.4f}"
    distance = (mine - theirs).abs().max()
    assert distance <= atol, f"the pictures differ by up to {distance:.2e}"


def one_equals_many(
    generator: DiffusersGenerator, prompts: Sequence[str], *, steps: int = 2, atol: float = 1e-4
) -> None:
    """A sample does not depend on what it is batched with; give prompts of different lengths."""
    start = noise(generator, len(prompts))
    together = ode(generator, prompts, start, steps)
    assert (together[0] - together[1]).abs().max() > 10 * atol, "two samples that are one prove nothing"
    for i, prompt in enumerate(prompts):
        same_pictures(ode(generator, [prompt], start[i : i + 1], steps), together[i : i + 1], atol)


def replay_equals_rollout(generator: DiffusersGenerator, prompts: Sequence[str], *, steps: int = 3) -> None:
    """The replayed log-probability is the recorded one, bit for bit, in the batches that sampled it."""
    solver = Solver(steps=steps, shift=generator.shift, kind="dance", eta=0.5)
    rollout = sample_groups(generator, [Prompt(text) for text in prompts], solver, group_size=2, seed=7)
    assert rollout.latents.shape == (2 * len(prompts), *generator.latent_shape())
    assert rollout.media.shape[2] == generator.temporal_stride * (rollout.latents.shape[2] - 1) + 1
    for step in range(steps - 1):
        rows = rollout.transitions.take((rollout.transitions.step == step).nonzero().squeeze(1))
        again, _ = replay(generator, rollout.conditioning, rows, solver, reduce="mean")
        assert len(rows.step) == 2 * len(prompts) and bool(again.isfinite().all())
        assert torch.equal(again, rows.log_prob), f"step {step} replays differently"


def _opened(network: torch.nn.Module, raw: list[Tensor]) -> Any:
    """Makes each output of the network a leaf of the graph and notes it in ``raw``."""

    def leaf(output: Tensor) -> Tensor:
        raw.append(output.detach().requires_grad_())
        return raw[-1]

    return network.register_forward_hook(lambda *call: tree_map_only(Tensor, leaf, call[-1]))


def hot_cell(
    generator: DiffusersGenerator, prompts: Sequence[str], cell: tuple[int, int, int], *, token: int | None = None
) -> None:
    """A map with one hot latent ``cell`` (t, h, w) asks for another velocity there, and nowhere else.

    Through the loss as the trainer builds it, down to the network's raw output: (N, L, K) tokens of which only
    ``token`` may be asked, or, with ``token=None``, anything that ends in the latents' own (T, H, W) or, for T = 1,
    (H, W).
    """
    z, raw = noise(generator, len(prompts)), list[Tensor]()
    hook = _opened(generator.network, raw)
    velocity = generator.velocity(z, torch.full((len(z),), 0.8), generator.encode(prompts))
    hook.remove()
    velocity.retain_grad()
    step = sde.transition(velocity, z, 0.8, 0.6, kind="dance", eta=0.5)
    nexts = sde.sample(step, noise(generator, len(z), seed=1)).detach()
    maps = torch.zeros(len(z), *z.shape[2:])
    maps[(slice(None), *cell)] = 1.0
    advantage = torch.tensor([1.0, -1.0]).repeat(len(z))[: len(z)]
    log_prob = sde.log_prob(nexts, step)
    weight = objective.spatial_advantage(advantage, maps)
    objective.clipped_surrogate(log_prob, log_prob.detach(), weight, clip_range=0.2).loss.backward()
    assert velocity.grad is not None
    _asks_only(velocity.grad, cell)
    asked = [output for output in raw if output.grad is not None]
    assert asked, "the loss does not reach the network"
    for output in asked:
        if token is None:
            _asks_only(output.grad, cell if output.shape[-3:] == z.shape[2:] else cell[1:])
        else:
            _asks_only(output.grad.sum(-1), (token,))


def _asks_only(gradient: Tensor | None, place: tuple[int, ...]) -> None:
    """Non-zero at ``place`` of its last dimensions and nowhere else."""
    assert gradient is not None
    asked = gradient.abs().reshape(-1, *gradient.shape[-len(place) :]).sum(0).nonzero().tolist()
    assert asked == [list(place)], f"asked at {asked[:8]} ({len(asked)} places) instead of {place}"


def lora(generator: DiffusersGenerator, targets: str = "blocks", *, scale: float = 0.3, **options: Any) -> Policy:
    """A LoRA on the adapter's own choice ``targets``, with noise on its weights as if it had been trained."""
    settings = {"rank": 4, "alpha": 4.0, "seed": 0, **options}
    policy = Policy.lora(generator.network, targets=generator.lora_targets[targets], **settings)
    return tiny.nudged(policy, scale=scale)


def trains_two_steps(generator: DiffusersGenerator, prompts: Sequence[str]) -> None:
    """The whole loop with ViPO's credit: two iterations, ratio 1 in each, and the weights move. It injects weights."""
    policy = lora(generator)
    before = {name: tensor.clone() for name, tensor in policy.state().items()}
    trainer = Trainer(
        engine=Engine(accelerator=Accelerator(mixed_precision="no", cpu=True)),
        generator=generator,
        policy=policy,
        prompts=PromptSampler([Prompt(text) for text in prompts], per_iteration=1, seed=0),
        scorer=tiny.scorer(tiny.redness),
        map_source=Perceptual(PerceptualStructuring(tiny.Patches(), temporal_stride=generator.temporal_stride)),
        solver=Solver(steps=3, shift=generator.shift, eta=0.7),
        credit="advantage_map",
        objective=Objective(clip_range=0.2),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        group_size=3,
        seed=0,
    )
    for step in (trainer.step(), trainer.step()):
        assert step.metrics["ratio_deviation"] == 0 and step.metrics["grad_norm"] > 0 and not step.events
    assert all(not torch.equal(before[name], tensor) for name, tensor in policy.state().items())


def lora_sits_on(generator: DiffusersGenerator, targets: str, layers: set[str]) -> None:
    """The choice ``targets`` is exactly these layers, block numbers left out: ``transformer_blocks.attn.to_q``."""
    policy = lora(generator, targets)
    found = {name.split(".lora_")[0] for name in policy.parameters}
    nameless = {".".join(part for part in name.split(".") if not part.isdigit()) for name in found}
    assert nameless == layers, f"too many: {sorted(nameless - layers)}; missing: {sorted(layers - nameless)}"


def _gradients(generator: DiffusersGenerator, policy: Policy, prompts: Sequence[str]) -> tuple[list[Tensor], int]:
    """The LoRA's gradients of some loss, and how often any part of the network was run for them."""
    calls = Counter[str]()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in generator.network.named_modules()
    ]
    start = noise(generator, len(prompts))
    generator.velocity(start, torch.full((len(start),), 0.6), generator.encode(prompts)).square().mean().backward()
    for hook in hooks:
        hook.remove()
    gradients = [parameter.grad for parameter in policy.parameters.values()]
    policy.network.zero_grad()
    return [gradient for gradient in gradients if gradient is not None], calls.total()


def checkpointing_same_gradient(generator: DiffusersGenerator, prompts: Sequence[str]) -> None:
    """Gradient checkpointing runs blocks twice and changes no gradient."""
    policy = lora(generator)
    plain, calls = _gradients(generator, policy, prompts)
    network: Any = generator.network
    network.enable_gradient_checkpointing()
    again, more_calls = _gradients(generator, policy, prompts)
    assert more_calls > calls, "nothing was run a second time, so nothing was checkpointed"
    assert len(plain) == len(again) == len(policy.parameters)
    assert any(gradient.abs().max() > 0 for gradient in plain)
    for name, one, other in zip(policy.parameters, plain, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7), name


def lora_round_trip(
    generator: DiffusersGenerator, source: Path, folder: Path, draw: Draw, *, targets: str = "blocks", **options: Any
) -> None:
    """A LoRA exported to ``folder`` and loaded into a plain pipeline from ``source`` draws the policy's pictures."""
    base = draw(generator.pipeline)
    policy = lora(generator, targets, **options)
    trained = draw(generator.pipeline)
    policy.export(generator, folder)
    fresh = type(generator.pipeline).from_pretrained(source)
    fresh.load_lora_weights(str(folder))
    _came_back(draw(fresh), trained, base)


def full_round_trip(generator: DiffusersGenerator, folder: Path, draw: Draw, *, scale: float = 0.1) -> None:
    """Full weights exported to ``folder`` are a pipeline that draws the policy's pictures."""
    base = draw(generator.pipeline)
    policy = tiny.nudged(Policy.full(generator.network), scale=scale)
    trained = draw(generator.pipeline)
    policy.export(generator, folder)
    _came_back(draw(type(generator.pipeline).from_pretrained(folder)), trained, base)


def _came_back(theirs: Tensor, trained: Tensor, base: Tensor) -> None:
    same_pictures(theirs, trained, atol=3e-5)  # diffusers decodes in the other memory format
    changed = (trained - base).abs().max()
    assert changed > 1e-2, f"training changed no more than {changed:.1e}, so the export proves nothing"


def counts_what_is_cut(
    generator: DiffusersGenerator, read: Callable[[str], int], *, reader: str, word: str = "cat "
) -> None:
    """Around its limit, ``reader``'s count of a prompt's tokens is what ``read`` says it was given, up to the limit."""
    (limit,) = (limit for limit in generator.reader.limits() if limit.reader == reader)
    prompts = [(word * count).strip() for count in range(1, limit.most + 3)]
    tokens = limit.tokens(prompts)
    near = [place for place, count in enumerate(tokens) if abs(count - limit.most) <= 3]
    assert {tokens[place] > limit.most for place in near} == {True, False}
    assert limit.most in tokens, "one token per word is needed to meet the limit exactly"
    for place in near:
        assert read(prompts[place]) == min(tokens[place], limit.most), tokens[place]
    long = [prompt for prompt, count in zip(prompts, tokens, strict=True) if count > limit.most]
    (told,) = (told for told in generator.cut_prompts(some=[*prompts, long[0]]) if f"that {reader} reads" in told)
    assert told.startswith(f"{len(long)} of {len(prompts)} some prompts longer than the {limit.most} tokens")
    assert told.endswith(f"with {limit.most + 1} tokens") and long[0][:40] in told
    assert generator.cut_prompts(some=[prompt for prompt in prompts if prompt not in long]) == []


def tokens_given(generator: DiffusersGenerator, encoder: str, tokenizer: str) -> Callable[[str], int]:
    """How many tokens of a prompt an encoder is given, padding aside."""
    words, part = getattr(generator.pipeline, tokenizer), getattr(generator.pipeline, encoder)
    given: list[Tensor] = []

    def note(_module: torch.nn.Module, places: tuple[Tensor, ...], names: dict[str, Tensor]) -> None:
        given.append(places[0] if places else names["input_ids"])

    def read(prompt: str) -> int:
        hook = part.register_forward_pre_hook(note, with_kwargs=True)
        generator.reader([prompt])
        hook.remove()
        row = given.pop()[0].tolist()
        return row.index(words.eos_token_id) + 1 if words.eos_token_id in row else len(row)

    return read


def planned_as_it_runs(generator: DiffusersGenerator, prompt: str, recipe: dict[str, Any]) -> None:
    """A plan counts the operations of a real velocity, LoRA included, for prompts as long as they can be.

    ``prompt`` is one, and the generator's negative prompt too; ``recipe`` trains this model.
    """
    rows = 2
    real, blank = generator.encode([prompt] * rows), generator.reader.blank(rows)
    for name, value in vars(real).items():
        assert getattr(blank, name).shape == value.shape and getattr(blank, name).dtype == value.dtype, name
    lora(generator, rank=recipe["policy"]["rank"])
    velocity(generator, [prompt])  # the negative prompt is encoded
    with torch.no_grad(), Meter([]) as counted:
        generator.velocity(noise(generator, rows), torch.full((rows,), 0.7), real)
    planned = Ledger().cost(parse_recipe(recipe), "sampling", rows).flops
    assert planned == counted.flops > 0


def masks_as_it_says(generator: DiffusersGenerator, prompts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is given masks for ``prompts`` of different lengths if, and only if, the adapter says so."""
    masked: list[bool] = []
    native = AttentionBackendName.NATIVE
    original = _AttentionBackendRegistry._backends[native]

    def noting(*, attn_mask: Tensor | None, **given: Any) -> Any:
        masked.append(attn_mask is not None)
        return original(attn_mask=attn_mask, **given)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, native, noting)
    velocity(generator, prompts)
    assert masked and any(masked) == generator.masks_text


def text_is_frozen(generator: DiffusersGenerator) -> None:
    """Nothing is trained unless a policy says so, and nothing is in training mode."""
    parts = (generator.pipeline.vae, *generator.text_encoders, generator.network)
    assert generator.text_encoders
    assert not any(module.training for part in parts for module in part.modules())
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def bfloat16_is_close(
    exact: DiffusersGenerator, rounded: DiffusersGenerator, prompts: Sequence[str], *, tolerance: float = 0.05
) -> None:
    """A bfloat16 network's velocity is float32, finite and, relative to its size, near the exact one."""
    ours, reference = velocity(rounded, prompts), velocity(exact, prompts)
    assert ours.dtype == torch.float32 and bool(ours.isfinite().all())
    distance = (ours - reference).norm() / reference.norm()
    assert distance < tolerance, f"bfloat16 is off by {distance:.3f} of the velocity's size"
    assert distance > 0, "nothing was rounded"

"""The blocks of docs/plug-in.md, run as they stand: in a trainer of its own, or with stand-ins for its names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.distributions import Normal

import tiny
from vipo import objective
from vipo.generators.common import unpack_patches

GUIDE = (Path(__file__).parents[1] / "docs" / "plug-in.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- run: (\S+) -->\n```python\n(.*?)```", GUIDE, re.DOTALL))
GRID = tiny.GRID[1:]
GROUP, STEPS, ETA = 4, 4, 0.7
CLIP_RANGE = 5e-4


def run(block: str, **names: Any) -> dict[str, Any]:
    """Execute one block of the guide among ``names``; what it leaves behind."""
    exec(compile(BLOCKS[block], f"docs/plug-in.md:{block}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def credit() -> SimpleNamespace:
    return SimpleNamespace(**run("credit"))


def their_reward(pictures: Tensor) -> Tensor:
    return pictures[:, 0].mean((1, 2)) - pictures[:, 1:].mean((1, 2, 3))


@dataclass(frozen=True)
class Taken:
    """One solver step, on packed tokens."""

    sigma: Tensor
    sigma_next: Tensor
    tokens: Tensor
    next_tokens: Tensor
    log_prob: Tensor


class TheirTrainer:
    """Somebody's GRPO on diffusers' FLUX: its own sampling, density, advantage and optimiser; nothing of vipo.

    ``reduce`` is the one line of it that the guide changes: log-densities of tokens to log-probabilities.
    """

    def __init__(self, folder: Path, reduce: Callable[[Tensor], Tensor]) -> None:
        self.pipeline, self.reduce = FluxPipeline.from_pretrained(folder), reduce
        self.network = self.pipeline.transformer
        with torch.no_grad():
            texts = self.pipeline.encode_prompt(["a cat"] * GROUP, None, max_sequence_length=16)
        self.embeds, self.pooled, self.text_ids = texts
        height, width = (side // 2 for side in GRID)
        self.image_ids = FluxPipeline._prepare_latent_image_ids(GROUP, height, width, "cpu", torch.float32)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        line = torch.linspace(1, 0, STEPS + 1)
        self.sigmas = 3 * line / (1 + 2 * line)
        self.rng = torch.Generator().manual_seed(0)

    def velocity(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        return self.network(
            hidden_states=tokens,
            timestep=sigma.expand(len(tokens)),
            guidance=torch.full((len(tokens),), 3.5),
            pooled_projections=self.pooled,
            encoder_hidden_states=self.embeds,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    def gaussian(self, tokens: Tensor, sigma: Tensor, sigma_next: Tensor, velocity: Tensor) -> Normal:
        """Dance-SDE, written out."""
        score = -(tokens + (1 - sigma) * velocity) / sigma
        mean = tokens + (velocity - ETA**2 / 2 * score) * (sigma_next - sigma)
        return Normal(mean, ETA * (sigma - sigma_next).sqrt())

    @torch.no_grad()
    def rollout(self) -> tuple[Tensor, list[Taken]]:
        """Pictures of one group in [0, 1], (N, 3, Y, X), and its stochastic steps; the last step follows the ODE."""
        tokens, taken = torch.randn(GROUP, 15, 16, generator=self.rng), []
        for now, after in zip(self.sigmas[:-2], self.sigmas[1:-1], strict=True):
            gaussian = self.gaussian(tokens, now, after, self.velocity(tokens, now))
            drawn = gaussian.mean + gaussian.stddev * torch.randn(tokens.shape, generator=self.rng)
            taken.append(Taken(now, after, tokens, drawn, self.reduce(gaussian.log_prob(drawn))))
            tokens = drawn
        clean = tokens - self.sigmas[-2] * self.velocity(tokens, self.sigmas[-2])
        with torch.inference_mode():  # as DanceGRPO decodes
            latents = FluxPipeline._unpack_latents(clean, tiny.HEIGHT, tiny.WIDTH, self.pipeline.vae_scale_factor)
            config = self.pipeline.vae.config
            media = self.pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        return (media / 2 + 0.5).clamp(0, 1), taken

    def replay(self, step: Taken, velocity: Tensor | None = None) -> Tensor:
        predicted = self.velocity(step.tokens, step.sigma) if velocity is None else velocity
        gaussian = self.gaussian(step.tokens, step.sigma, step.sigma_next, predicted)
        return self.reduce(gaussian.log_prob(step.next_tokens))

    def advantage(self, pictures: Tensor) -> Tensor:
        rewards = their_reward(pictures)
        return (rewards - rewards.mean()) / (rewards.std() + 1e-8)

    def update(self, loss: Tensor) -> Tensor:
        """One optimiser step; the gradient it took, flat."""
        self.optimizer.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None])
        self.optimizer.step()
        return gradient


def spatial(credit: SimpleNamespace) -> Callable[[Tensor], Tensor]:
    return lambda elementwise: credit.local_log_prob(elementwise, GRID)


def scalar(elementwise: Tensor) -> Tensor:
    return elementwise.mean((1, 2))


def scalar_loss(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """GRPO's clipped loss with one ratio per sample, written out."""
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


def vipo_gradient(folder: Path, credit: SimpleNamespace, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The first gradient of their trainer with local credit, its maps changed by ``change``."""
    theirs = TheirTrainer(folder, spatial(credit))
    pictures, (first, *_) = theirs.rollout()
    maps = change(credit.allocation_maps(pictures, GRID))
    loss = credit.local_loss(theirs.replay(first), first.log_prob, theirs.advantage(pictures), maps, CLIP_RANGE)
    return theirs.update(loss)


def test_their_loop_trains_for_two_steps_and_its_first_ratio_is_one(
    model_folder: Path, credit: SimpleNamespace
) -> None:
    theirs = TheirTrainer(model_folder, spatial(credit))
    before = torch.cat([p.detach().flatten() for p in theirs.network.parameters()])
    for _ in range(2):
        pictures, taken = theirs.rollout()
        maps = credit.allocation_maps(pictures, GRID)
        assert maps.shape == (GROUP, 1, *GRID) and torch.allclose(maps.mean((1, 2, 3)), torch.ones(GROUP))
        assert maps.std() > 0.05
        replayed = [theirs.replay(step) for step in taken]
        for new, step in zip(replayed, taken, strict=True):
            assert new.shape == (GROUP, 1, *GRID) and new.equal(step.log_prob)
        losses = [
            credit.local_loss(new, step.log_prob, theirs.advantage(pictures), maps, CLIP_RANGE)
            for new, step in zip(replayed, taken, strict=True)
        ]
        assert theirs.update(torch.stack(losses).mean()).norm() > 0
    after = torch.cat([p.detach().flatten() for p in theirs.network.parameters()])
    assert not after.equal(before) and bool(after.isfinite().all())
    assert not theirs.replay(taken[0]).equal(taken[0].log_prob)  # off-policy now: the comparison above could fail


def test_a_map_of_ones_has_the_gradient_of_scalar_grpo(model_folder: Path, credit: SimpleNamespace) -> None:
    theirs = TheirTrainer(model_folder, scalar)
    pictures, (first, *_) = theirs.rollout()
    expected = theirs.update(scalar_loss(theirs.replay(first), first.log_prob, theirs.advantage(pictures)))
    ours = vipo_gradient(model_folder, credit, torch.ones_like)
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
    # and with the real map, or with its positions in another order, it has not
    real = vipo_gradient(model_folder, credit, lambda maps: maps)
    shuffled = vipo_gradient(model_folder, credit, lambda maps: maps.flip(2))
    for other in (real, shuffled):
        assert (other - expected).norm() > 0.01 * expected.norm()
    assert (real - shuffled).norm() > 0.01 * real.norm()


def test_a_hot_map_cell_moves_only_its_token(model_folder: Path, credit: SimpleNamespace) -> None:
    theirs = TheirTrainer(model_folder, spatial(credit))
    pictures, (first, *_) = theirs.rollout()
    with torch.no_grad():
        velocity = theirs.velocity(first.tokens, first.sigma)
    velocity.requires_grad_()
    maps = torch.zeros(GROUP, 1, *GRID)
    maps[:, 0, 3, 7] = 1.0
    log_prob = theirs.replay(first, velocity)
    credit.local_loss(log_prob, first.log_prob, theirs.advantage(pictures), maps, CLIP_RANGE).backward()
    assert velocity.grad is not None
    moved = velocity.grad.abs().sum((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [1 * (GRID[1] // 2) + 3]  # row 3 // 2, column 7 // 2
    channels = (velocity.grad.abs().sum((0, 1)) > 0).nonzero().flatten().tolist()
    assert channels == [3, 7, 11, 15]  # (c, dy, dx) with dy = dx = 1


@pytest.mark.usefixtures("unchecked")
def test_a_log_probability_that_was_averaged_first_is_refused(credit: SimpleNamespace) -> None:
    maps, log_prob = torch.ones(2, 1, *GRID), torch.zeros(2)
    with pytest.raises(ValueError, match="must have one shape"):
        credit.local_loss(log_prob, log_prob, torch.tensor([1.0, -1.0]), maps, CLIP_RANGE)


def test_the_density_of_the_guide_is_their_density(model_folder: Path, credit: SimpleNamespace) -> None:
    theirs = TheirTrainer(model_folder, spatial(credit))
    _, (first, *_) = theirs.rollout()
    with torch.no_grad():
        velocity = theirs.velocity(first.tokens, first.sigma)
        expected = theirs.gaussian(first.tokens, first.sigma, first.sigma_next, velocity)
    noise = torch.randn(first.tokens.shape, generator=torch.Generator().manual_seed(1))
    unpacked = [unpack_patches(tokens, *GRID) for tokens in (velocity, first.tokens, noise)]
    block = BLOCKS["sde"].replace("eta=0.3", f"eta={ETA}")
    names: dict[str, Any] = dict(zip(("velocity", "latents", "noise"), unpacked, strict=True))
    exec(compile(block, "docs/plug-in.md:sde", "exec"), names | {"steps": STEPS, "shift": 3.0, "i": 0}, made := {})
    drawn = expected.mean + expected.stddev * noise
    assert torch.allclose(made["next_latents"], unpack_patches(drawn, *GRID), atol=1e-5)
    local = credit.local_log_prob(expected.log_prob(drawn), GRID)
    assert torch.allclose(made["log_prob"], local, atol=1e-4)
    assert made["sigmas"].allclose(theirs.sigmas)


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 16, 64, generator=torch.Generator().manual_seed(seed))  # of a 64 px picture, 16 channels


def pictures(n: int) -> Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def by_hand(elementwise: Tensor) -> Tensor:
    """Token (r, c) of channels (16, 2, 2) to positions, one at a time."""
    out = torch.zeros(len(elementwise), 1, 8, 8)
    for token in range(16):
        square = elementwise[:, token].reshape(-1, 16, 2, 2).mean(1)
        row, column = 2 * (token // 4), 2 * (token % 4)
        out[:, 0, row : row + 2, column : column + 2] = square
    return out


def test_the_lines_for_flow_grpo(credit: SimpleNamespace) -> None:
    config = SimpleNamespace(resolution=64, train=SimpleNamespace(adv_clip_max=5.0))
    density = run("flow-grpo-density", **vars(credit), log_prob=tokens(2), height=64, width=64)["log_prob"]
    assert torch.allclose(density, by_hand(tokens(2)), atol=1e-6)
    maps = run("flow-grpo-maps", **vars(credit), images=pictures(2).bfloat16(), config=config)["maps"]
    advantages = torch.tensor([[1.0, 1.0], [-9.0, -9.0]])  # per sample and step, as there
    sample = {"advantages": advantages, "maps": maps}
    weight = run("flow-grpo-loss", **vars(credit), sample=sample, j=1, config=config)["advantages"]
    assert weight.shape == density.shape == (2, 1, 8, 8)
    assert weight[0].equal(maps[0]) and weight[1].equal((-9 * maps[1]).clamp_min(-5))


def test_the_lines_for_dancegrpo(credit: SimpleNamespace) -> None:
    args = SimpleNamespace(h=64, w=64, clip_range=CLIP_RANGE, gradient_accumulation_steps=2)
    density = run("dance-density", **vars(credit), log_prob=tokens(1), args=args)["log_prob"]
    all_maps = run("dance-maps", **vars(credit), image=pictures(1) * 2 - 1, all_maps=[], args=args)["all_maps"]
    old = torch.stack([density - 1, density + 1e-4], 1)  # (1, steps, 1, H, W), as there
    advantage = torch.tensor([2.0])
    sample = {"log_probs": old, "advantages": advantage, "maps": torch.cat(all_maps)}
    names = {"new_log_probs": density, "sample": sample, "_": 1, "train_timesteps": 3, "args": args}
    loss = run("dance-loss", **vars(credit), **names)["loss"]
    assert float(loss) == pytest.approx(-2.0 * 0.9999 / 6, rel=1e-5)  # mean of a map is 1


class Schedulers:
    """A stand-in for Flow-Factory's scheduler: like its ``step``, it returns what was asked for and nothing else."""

    def step(self, **given: Any) -> SimpleNamespace:
        mean, dt = given["latents"] + given["noise_pred"] * -0.1, torch.tensor(-0.1)
        drawn = given["next_latents"] if given["next_latents"] is not None else mean + 0.2 * tokens(len(mean), 5)
        made = {"next_latents": drawn, "next_latents_mean": mean, "std_dev_t": torch.tensor(0.7), "dt": dt}
        asked: Sequence[str] = given["return_kwargs"]
        return SimpleNamespace(**{name: made[name] for name in asked}, log_prob=None)


@pytest.fixture
def flow_factory(monkeypatch: pytest.MonkeyPatch, credit: SimpleNamespace) -> dict[str, Any]:
    """Its modules as far as the guide's subclass sees them; what was registered, by name."""
    registered: dict[str, Any] = {}

    class GRPOTrainer:
        def __init__(self, **kwargs: Any) -> None:
            vars(self).update(kwargs)

        def prepare_feedback(self, samples: Sequence[Any]) -> None:
            for sample, value in zip(samples, (1.0, -1.0), strict=True):
                sample.extra_kwargs["advantage"] = torch.tensor(value)

    def register_trainer(name: str) -> Callable[[type], type]:
        return lambda cls: registered.setdefault(name, cls)

    contents = {"grpo": {"GRPOTrainer": GRPOTrainer}, "registry": {"register_trainer": register_trainer}}
    modules = {f"flow_factory.trainers.{name}": names for name, names in contents.items()}
    for name, names in {
        "flow_factory": {},
        "flow_factory.trainers": {},
        **modules,
        "vipo_credit": vars(credit),
    }.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def test_the_subclass_for_flow_factory(flow_factory: dict[str, Any], credit: SimpleNamespace) -> None:
    run("flow-factory", __name__="vipo_trainer")
    trainer = flow_factory["grpo"](
        adapter=SimpleNamespace(scheduler=Schedulers()),
        accelerator=SimpleNamespace(device="cpu"),
        training_args=SimpleNamespace(height=64, width=64),
    )
    given = {"latents": tokens(2, 3), "noise_pred": tokens(2, 4), "return_kwargs": ["log_prob", "dt"]}
    sampled = trainer.adapter.scheduler.step(**given, next_latents=None)
    expected = Normal(given["latents"] - 0.1 * given["noise_pred"], 0.7 * 0.1**0.5).log_prob(sampled.next_latents)
    assert torch.allclose(sampled.log_prob, by_hand(expected), atol=1e-5)
    replayed = trainer.adapter.scheduler.step(**given, next_latents=sampled.next_latents)
    assert replayed.log_prob.equal(sampled.log_prob)
    assert trainer.adapter.scheduler.step(**given, next_latents=None, compute_log_prob=False).log_prob is None

    samples = [SimpleNamespace(image=picture, extra_kwargs={}) for picture in pictures(2)]
    trainer.prepare_feedback(samples)
    advantage = torch.stack([sample.extra_kwargs["advantage"] for sample in samples])
    maps = credit.allocation_maps(pictures(2), (8, 8))
    assert torch.allclose(advantage, objective.spatial_advantage(torch.tensor([1.0, -1.0]), maps), atol=1e-5)


def test_every_block_of_the_guide_is_run_here() -> None:
    assert GUIDE.count("```python") == len(BLOCKS)
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in source for name in BLOCKS)

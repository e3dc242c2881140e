"""Which attention a network runs with: never cuDNN's by default, one backend for sampling and replay, settings kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import tiny
import tiny_sd3
from vipo.assemble import Session, build
from vipo.errors import UserError
from vipo.generators.attention import install, processors, scope
from vipo.generators.flux import FluxGenerator
from vipo.recipe import parse_recipe
from vipo.runs.run import Evaluated, Run, train
from vipo.runs.target import open_target
from vipo.types import Prompt

MATH = AttentionBackendName._NATIVE_MATH
SPY = """
import torch
from pathlib import Path
def reward(media, prompts):
    with Path({log!r}).open("a") as file:
        print(torch.backends.cuda.cudnn_sdp_enabled(), file=file)
    if {fault}:
        raise RuntimeError("no such luck")
    return media.mean((1, 2, 3, 4))
"""


def allowed() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    assert allowed()  # PyTorch's default, and what every other test has left
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    """A recipe whose reward writes down, at each call, whether cuDNN's attention is allowed."""
    return spied(tmp_path, model_folder, fault=False)


def spied(folder: Path, model: Path, *, fault: bool) -> dict[str, Any]:
    (folder / "spy.py").write_text(SPY.format(log=str(folder / "log"), fault=fault))
    return tiny.recipe(model, folder / "prompts.txt", rewards={f"{folder / 'spy.py'}:reward": 1.0})


def seen(folder: Path) -> set[str]:
    return set((folder / "log").read_text().split())


def test_auto_is_off_inside_and_the_callers_setting_comes_back() -> None:
    with scope("auto"):
        assert not allowed()
    assert allowed()
    with pytest.raises(KeyError), scope("auto"):
        raise KeyError
    assert allowed()


def test_a_caller_who_had_it_off_keeps_it_off() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name in ("auto", "native"):
        with scope(name):
            assert not allowed()
        assert not allowed()


def test_a_named_backend_leaves_pytorchs_settings_alone() -> None:
    with scope("native"):
        assert allowed()


@pytest.mark.parametrize(("attention", "inside"), [("auto", "False"), ("_native_math", "True")])
def test_it_holds_in_iterations_and_evaluations_and_not_between_them(
    tmp_path: Path, raw: dict[str, Any], attention: str, inside: str
) -> None:
    raw["generator"]["attention"] = attention
    for event in Run(parse_recipe(raw), tmp_path / "run"):
        assert allowed(), event
        assert seen(tmp_path) == {inside}
    assert isinstance(event, Evaluated) and allowed()


def test_it_holds_in_a_training_without_a_folder_that_is_left_early(tmp_path: Path, raw: dict[str, Any]) -> None:
    steps = train(parse_recipe(raw))
    next(steps)
    assert allowed() and seen(tmp_path) == {"False"}
    steps.close()
    assert allowed()


def test_it_holds_for_whoever_steps_the_trainer(tmp_path: Path, raw: dict[str, Any]) -> None:
    build(parse_recipe(raw)).trainer.step()
    assert allowed() and seen(tmp_path) == {"False"}


def test_it_comes_back_after_an_error(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match="no such luck"):
        list(train(parse_recipe(spied(tmp_path, model_folder, fault=True))))
    assert allowed() and seen(tmp_path) == {"False"}


def test_it_holds_for_samples_and_scores_of_a_plain_model(tmp_path: Path, raw: dict[str, Any]) -> None:
    model = open_target(raw["generator"]["path"], height=tiny.HEIGHT, width=tiny.WIDTH)
    during: list[bool] = []
    model.generator.network.register_forward_hook(lambda *_: during.append(allowed()))
    (reward,), prompts = raw["rewards"], [Prompt("a cat"), Prompt("a red car")]
    for _ in model.sample(prompts, samples_per_prompt=1, steps=2, seed=0, batch_size=1):
        assert allowed()
    model.evaluate(prompts, [reward], samples_per_prompt=1, steps=2)
    assert allowed() and not any(during) and len(during) > 4 and seen(tmp_path) == {"False"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[AttentionBackendName, int]:
    """How often each backend was asked."""
    counted: dict[AttentionBackendName, int] = {}

    def counting(name: AttentionBackendName, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return original(*arguments, **options)

        return call

    for name, original in list(_AttentionBackendRegistry._backends.items()):
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counting(name, original))
    return counted


def with_attention(raw: dict[str, Any], name: str) -> Session:
    raw["generator"]["attention"] = name
    return build(parse_recipe(raw))


def test_a_named_backend_reaches_every_attention_for_sampling_and_replay(
    raw: dict[str, Any], calls: dict[AttentionBackendName, int]
) -> None:
    session = with_attention(raw, "_native_math")
    found = processors(session.generator.network)
    assert len(found) == 2 and all(processor._attention_backend == MATH for processor in found)
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE  # of everything else
    calls.clear()
    step = session.trainer.step()
    assert step.metrics["ratio_deviation"] == 0 and step.metrics["grad_norm"] > 0
    assert set(calls) == {MATH} and calls[MATH] == 2 * (3 + 2)  # two layers; three steps sampled, two replayed


def test_auto_leaves_the_network_as_it_comes(raw: dict[str, Any]) -> None:
    found = processors(with_attention(raw, "auto").generator.network)
    assert all(processor._attention_backend is None for processor in found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fast", r"attention='fast' is not known to diffusers; choose from auto, flash,.* _native_math"),
        ("sage_hub", "attention='sage_hub' has no backward"),
        ("_native_npu", r"attention='_native_npu' cannot be trained with here in torch.float32: .*Take auto"),
        ("_native_cudnn", r"cannot be trained with here in torch.float32: .*Take auto or _native_math"),
        ("flash_hub", "cannot be trained with here .*`kernels` package"),
    ],
)
def test_a_backend_that_cannot_train_here_is_refused_and_changes_nothing_else(
    raw: dict[str, Any], name: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        with_attention(raw, name)
    assert "\n" not in str(refused.value) and "sage" not in str(refused.value).replace("sage_hub", "")
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_a_wrong_name_is_told_before_the_model_is_loaded(raw: dict[str, Any]) -> None:
    raw["generator"]["path"] = "nowhere"
    with pytest.raises(UserError, match="'fast' is not known"):
        with_attention(raw, "fast")


@pytest.fixture
def without_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for inference only: its output has no history."""
    original = _AttentionBackendRegistry._backends[MATH]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends,
        MATH,
        lambda query, key, value: original(query, key, value).detach(),
    )
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, MATH, {"query", "key", "value"})


@pytest.mark.usefixtures("without_backward")
def test_a_backend_without_a_backward_is_found_by_trying_it(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="attention='_native_math' has no backward"):
        with_attention(raw, "_native_math")


@pytest.mark.usefixtures("without_backward")
def test_diffusers_own_default_must_have_a_backward_too(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", MATH)
    with pytest.raises(UserError, match=r"'_native_math' \(DIFFUSERS_ATTN_BACKEND\) has no backward.*\. Unset that"):
        with_attention(raw, "auto")


def test_a_network_whose_attention_takes_no_backend_says_so(model_folder: Path) -> None:
    model = tiny_sd3.generator(tiny_sd3.save_pipeline(model_folder.parent / "sd3-attention", model_folder))
    install(model.network, "auto", dtype=torch.float32)
    with pytest.raises(UserError, match="of SD3Transformer2DModel takes no backend; leave it auto"):
        install(model.network, "_native_math", dtype=torch.float32)


def networks_that_mask() -> Iterator[torch.nn.Module]:
    yield QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    yield ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip


def test_a_backend_that_takes_no_mask_is_refused_where_masks_are_given() -> None:
    for network in networks_that_mask():
        half = network.to(torch.bfloat16)
        install(half, "_native_flash", dtype=torch.bfloat16)  # as for a network that masks nothing
        for name in ("auto", "native", "_native_math"):
            install(half, name, dtype=torch.bfloat16, masked=True)
        kind = type(network).__name__
        with pytest.raises(UserError, match=rf"_flash' takes no mask here \(.*\), but {kind} hides .*\. Take auto"):
            install(half, "_native_flash", dtype=torch.bfloat16, masked=True)


def test_a_backend_that_reads_what_a_mask_hides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _AttentionBackendRegistry._backends[MATH]

    def deaf(*, attn_mask: object, **given: Any) -> Any:  # noqa: ARG001
        return original(**given)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, MATH, deaf)
    network = next(networks_that_mask())
    install(network, "_native_math", dtype=torch.float32)
    with pytest.raises(UserError, match="'_native_math' does not keep to a mask here, but QwenImage"):
        install(network, "_native_math", dtype=torch.float32, masked=True)


def test_a_model_is_tried_with_masks_if_its_adapter_says_so(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["generator"] |= {"dtype": "bfloat16"}
    raw["training"] |= {"precision": "bf16"}
    with_attention(raw, "_native_flash")
    monkeypatch.setattr(FluxGenerator, "masks_text", True)
    with pytest.raises(UserError, match="'_native_flash' takes no mask here"):
        with_attention(raw, "_native_flash")

"""Rewards by name: media and prompts to one number per sample, higher is better.

A new reward is one class or function, one entry here and one test. Its file is imported when it is built. A reward of
the user's own needs no entry: ``path/to/file.py:function`` is a name too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vipo import registry
from vipo.errors import UserError
from vipo.secrets import in_the_open
from vipo.user_file import REWARD, is_user_file, load_part, named_in_file

if TYPE_CHECKING:
    from vipo.types import Reward

OTHERWISE = ", or give file.py:function"  # what a name may be beside those of REWARDS


@dataclass(frozen=True)
class RewardEntry(registry.Entry):
    """What is known about a reward before it is built. ``value_range`` is written for people, higher is better.

    Args:
        size: of what is downloaded, for people.
        weights: hub id and a file of each model that is needed.
        files: options that must name a file of the user's.
        package, extra: what must be importable, and the extra of vipo that installs it.
        needs: what the user must give, if anything.
    """

    value_range: str
    licence: str = "part of vipo"
    size: str = "none"
    weights: tuple[tuple[str, str], ...] = ()
    files: tuple[str, ...] = ()
    package: str | None = None
    extra: str | None = None
    needs: str | None = None


CLIP_L = ("openai/clip-vit-large-patch14", "model.safetensors")
VOCABULARY = "captions of the embedded vocabulary"
CONNECTION = "vipo.rewards.http:JsonClient"
CLIPS = "captions of the embedded clips"
REWARDS: dict[str, RewardEntry] = {
    "redness": RewardEntry("vipo.rewards.rules:Redness", "mean of red minus the mean of green and blue", "-1 to 1"),
    "brightness": RewardEntry("vipo.rewards.rules:Brightness", "mean luma", "0 to 1"),
    "jpeg_compressibility": RewardEntry(
        "vipo.rewards.rules:JpegCompressibility", "minus the kilobytes of a JPEG of quality 95", "below 0"
    ),
    "emoji_match": RewardEntry(
        "vipo.rewards.embedded:EmojiMatch",
        "log-probability that the named objects are there; for training the embedded model",
        "below 0",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_judge": RewardEntry(
        "vipo.rewards.embedded:EmojiJudge",
        "probability that the named objects are there; a held-out judge from other drawings",
        "0 to 1",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_layout": RewardEntry(
        "vipo.rewards.embedded:EmojiLayout",
        "share of a caption's claims that hold: objects, relation, ground colour; held out",
        "0 to 1",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_clean": RewardEntry(
        "vipo.rewards.embedded_scenes:EmojiClean",
        "one whole, clean copy of each named object and nothing else; for training, beside emoji_match",
        "0 to 1",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_count": RewardEntry(
        "vipo.rewards.embedded_scenes:EmojiCount",
        "are there as many of each object as the caption says, and nothing else; held out",
        "0 to 1",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_quality": RewardEntry(
        "vipo.rewards.embedded_scenes:EmojiQuality",
        "is the picture free of grain, blur, wrong colours, cut and torn objects; held out",
        "0 to 1",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_flaws": RewardEntry(
        "vipo.rewards.embedded_scenes:EmojiFlaws",
        "share of the picture with nothing wrong under its caption; held out, and says where",
        "0 to 1",
        "Apache-2.0",
        needs=VOCABULARY,
    ),
    "emoji_motion": RewardEntry(
        "vipo.rewards.embedded_motion:EmojiMotion",
        "how far the thing in a clip goes the way its caption says; for training the embedded video model",
        "below 1",
        "Apache-2.0",
        needs=CLIPS,
    ),
    "emoji_motion_judge": RewardEntry(
        "vipo.rewards.embedded_motion:MotionJudge",
        "probability of the motion that the caption claims; a held-out judge from other drawings",
        "0 to 1",
        "Apache-2.0",
        needs=CLIPS,
    ),
    "hpsv2.1": RewardEntry(
        "vipo.rewards.clip_family:HpsV21",
        "human preference: cosine of picture and prompt",
        "0.1 to 0.4",
        "Apache-2.0 (code)",
        "3.9 GB",
        (("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("openai/clip-vit-large-patch14", "tokenizer.json")),
    ),
    "pickscore": RewardEntry(
        "vipo.rewards.clip_family:PickScore",
        "human preference: scaled cosine",
        "18 to 25",
        "MIT (code)",
        "3.9 GB",
        (
            ("yuvalkirstain/PickScore_v1", "model.safetensors"),
            ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer.json"),
        ),
    ),
    "imagereward": RewardEntry(
        "vipo.rewards.image_reward:ImageReward",
        "human preference: a BLIP that reads the prompt",
        "-2.3 to 2",
        "Apache-2.0",
        "1.8 GB",
        (("zai-org/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "vocab.txt")),
    ),
    "clipscore": RewardEntry(
        "vipo.rewards.clip_family:ClipScore",
        "agreement with the prompt: cosine; scale=hessel or percent",
        "0.15 to 0.35",
        "MIT",
        "1.7 GB",
        (CLIP_L,),
    ),
    "aesthetic": RewardEntry(
        "vipo.rewards.aesthetic:Aesthetic",
        "LAION's aesthetic predictor; reads no prompt",
        "3 to 8",
        "Apache-2.0 (head), MIT (CLIP)",
        "1.7 GB",
        (CLIP_L,),
    ),
    "videoalign": RewardEntry(
        "vipo.rewards.qwen_vl:VideoAlign",
        "video quality VQ, motion MQ, text TA or Overall; raw or normalised",
        "about -5 to 5",
        "MIT (code), Apache-2.0 (weights)",
        "5 GB",
        (
            ("KwaiVGI/VideoReward", "model_config.json"),
            ("KwaiVGI/VideoReward", "checkpoint-11352/model.pth"),
            ("Qwen/Qwen2-VL-2B-Instruct", "config.json"),
        ),
        ("template",),
        needs="its prompt template, from its repository",
    ),
    "hpsv3": RewardEntry(
        "vipo.rewards.qwen_vl:HpsV3",
        "human preference: a Qwen2-VL 7B",
        "-2 to 13",
        "MIT (code)",
        "16.6 GB",
        (("MizzenAI/HPSv3", "HPSv3.safetensors"), ("Qwen/Qwen2-VL-7B-Instruct", "config.json")),
        ("template",),
        needs="its prompt template, from its repository",
    ),
    "ocr": RewardEntry(
        "vipo.rewards.ocr:Ocr",
        "share of the text in double quotes that can be read in the picture",
        "0 to 1",
        "Apache-2.0",
        "31 MB",
        package="rapidocr",
        extra="ocr",
        needs="prompts with a text in double quotes",
    ),
    "geneval_hf": RewardEntry(
        "vipo.rewards.geneval:GenEvalHf",
        "GenEval's checks of objects, counts, colours, positions; another detector",
        "0 to 1",
        "MIT (both)",
        "2 GB",
        (("facebook/mask2former-swin-small-coco-instance", "model.safetensors"), CLIP_L),
        package="scipy",
        extra="geneval",
        needs="prompts with GenEval's metadata, such as set:geneval",
    ),
    "remote": RewardEntry(
        "vipo.rewards.remote:Remote",
        "whatever `vipo serve-reward` serves at url=",
        "the served reward's",
        needs="url=",
        passes_on=CONNECTION,
    ),
    "openai_judge": RewardEntry(
        "vipo.rewards.openai_judge:OpenAiJudge",
        "a score that a vision language model writes, behind an OpenAI-compatible server",
        "low= to high=",
        "the model's",
        needs="base_url= and model=",
        passes_on=CONNECTION,
    ),
}


def state(entry: RewardEntry) -> str:
    """Whether it can be built here and now, and if not, what is missing and how to get it."""
    if entry.package is not None and find_spec(entry.package) is None:
        return f"missing: pip install 'vipo[{entry.extra}]'"
    wanted = [repository for repository, file in entry.weights if not _downloaded(repository, file)]
    absent = list(dict.fromkeys(wanted))
    if absent:
        commands = "; ".join(f"hf download {repository}" for repository in absent)
        return f"no weights here: {commands}; or name a folder in its options"
    ready = "weights found" if entry.weights else "ready"
    return f"{ready}; needs {entry.needs}" if entry.needs else ready


def _downloaded(repository: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file), str)


def takes(name: str, option: str) -> bool:
    """Whether a reward has an option of that name.

    Raises:
        UserError: no reward of that name, or a file that does not give one.
    """
    if is_user_file(name):
        return option in registry.parameters(named_in_file(REWARD, name))
    return option in registry.find("reward", REWARDS, name, otherwise=OTHERWISE).parameters()


def go_by_rate(sections: Mapping[str, tuple[str, Mapping[str, Any]]]) -> bool:
    """Whether a score depends on the clips' frames per second: a reward takes ``media_fps`` and is not given another.

    Args:
        sections: the reward's name and its options, by the name it goes by.
    """
    asking = (reward for reward, options in sections.values() if "media_fps" not in options)
    return any(takes(reward, "media_fps") for reward in asking)


def build(name: str, offered: Mapping[str, Any] = MappingProxyType({}), /, **options: Any) -> Reward:
    """The reward ``name``, or the user's own function for ``path/to/file.py:function``.

    Args:
        offered: options that it is given if it has them and ``options`` do not say otherwise.

    Raises:
        UserError: no reward of that name, an option it does not have, or a file that does not give a reward.
    """
    for problem in in_the_open(options):
        raise UserError(f"reward {name!r}: option {problem}")
    if is_user_file(name):
        own: Reward = load_part(REWARD, name, offered, **options)
        return own
    reward: Reward = registry.build("reward", REWARDS, name, options, offered=offered, otherwise=OTHERWISE)
    return reward

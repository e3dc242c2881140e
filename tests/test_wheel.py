"""The wheel in fresh environments: the core, and each extra alone doing the thing that it is for. `make wheel-check`.

An environment shares the files of what the core needs, torch above all, with the others (hard links); vipo and the
extra are installed by pip into each, from a package index, at the versions of constraints.txt. Nothing of the tree is
on its path.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from terminal import Said, assert_refused

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: Mapping[str, list[str]] = {
    name: needs for name, needs in PROJECT["optional-dependencies"].items() if name != "dev"
}
CONSTRAINTS = ROOT / "constraints.txt"
SHORT = (
    "training.iterations=2",
    "prompts.per_iteration=2",
    "prompts.group_size=4",
    "evaluation.limit=2",
    "evaluation.samples_per_prompt=1",
)
EXAMPLE = "example"
needs_index = pytest.mark.needs_index


@dataclass(frozen=True)
class Fresh:
    """An environment in ``root``, and the empty folder that commands are run in."""

    root: Path
    work: Path

    @classmethod
    def made(cls, folder: Path, *, with_pip: bool = True) -> Fresh:
        pip = () if with_pip else ("--without-pip",)
        subprocess.run([sys.executable, "-m", "venv", *pip, folder / "env"], check=True)
        (folder / "work").mkdir()
        return cls(folder / "env", folder / "work")

    @property
    def packages(self) -> Path:
        (found,) = self.root.glob("lib/python*/site-packages")
        return found

    @property
    def environment(self) -> dict[str, str]:
        """This process's, without what would lead back to the tree, or to somebody's account."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WANDB", "SWANLAB"))}
        home = {"HOME": str(self.work), "HF_HOME": str(self.work / "hf"), "TRACKIO_DIR": str(self.work / "trackio")}
        path = os.pathsep.join([str(self.root / "bin"), os.defpath])
        return own | home | {"PATH": path, "COLUMNS": "400", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}

    def beside(self, folder: Path) -> Fresh:
        """Another with the same packages, pip among them, but vipo."""
        other = Fresh.made(folder, with_pip=False)
        shutil.copytree(self.packages, other.packages, copy_function=_linked, symlinks=True, dirs_exist_ok=True)
        for ours in other.packages.glob("vipo*"):
            shutil.rmtree(ours)
        return other

    def ends(self, *command: str | Path, cwd: Path | None = None) -> Said:
        """How a command ends."""
        line = [str(self.root / "bin" / command[0]), *map(str, command[1:])]
        where = cwd or self.work
        done = subprocess.run(line, cwd=where, env=self.environment, capture_output=True, text=True, check=False)
        return Said(done.returncode, done.stdout, done.stderr)

    def __call__(self, *command: str | Path, cwd: Path | None = None) -> str:
        """What a command that succeeds says."""
        said = self.ends(*command, cwd=cwd)
        assert said.code == 0, f"{command}: {said.out}\n{said.err}"
        return said.out

    def install(self, *wanted: str) -> None:
        self("python", "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", CONSTRAINTS, *wanted)

    def installed(self) -> set[str]:
        found = json.loads(self("python", "-m", "pip", "list", "--format", "json"))
        return {canonicalize_name(package["name"]) for package in found}

    def train(self, *overrides: str, output: str = "run") -> Path:
        """A quickstart of two iterations."""
        self("vipo", "train", "quickstart", *SHORT, *overrides, "--no-report", "--output", output)
        return self.work / output


def _linked(source: str, target: str) -> None:
    if not Path(target).exists():
        os.link(source, target)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder], cwd=ROOT, check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """vipo without an extra."""
    fresh = Fresh.made(tmp_path_factory.mktemp("core"))
    fresh.install(f"vipo @ {wheel.as_uri()}")
    fresh.train(output=EXAMPLE)
    yield fresh
    shutil.rmtree(fresh.root)


@pytest.fixture
def another(core: Fresh, tmp_path: Path) -> Iterator[Fresh]:
    """An environment with what the core needs, before vipo is installed, and a run that the core has made."""
    fresh = core.beside(tmp_path)
    shutil.copytree(core.work / EXAMPLE, fresh.work / EXAMPLE)
    yield fresh
    shutil.rmtree(fresh.root)


# --- what an extra is for, each in its smallest real form ------------------------------------------------------------


def bitsandbytes(env: Fresh) -> None:
    env.train("generator.quantization=nf4", "optimizer.kind=adamw8bit")


def torchao(env: Fresh) -> None:
    env.train("generator.quantization=int8")


def quantization(env: Fresh) -> None:
    env.train("generator.quantization=float8", "optimizer.kind=adamw8bit")


def parquet(env: Fresh) -> None:
    env("vipo", "metrics", EXAMPLE, "--parquet", "table.parquet")
    read = "from pyarrow.parquet import read_table; print(read_table('table.parquet').to_pydict()['loss'])"
    assert str(_losses(env)[0]) in env("python", "-c", read)


def pandas(env: Fresh) -> None:
    frame = env("python", "-c", f"import vipo; print(vipo.metrics_frame('{EXAMPLE}')['loss'].dropna().tolist())")
    assert json.loads(frame) == _losses(env)


def _losses(env: Fresh) -> list[float]:
    lines = (env.work / EXAMPLE / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def datasets(env: Fresh) -> None:
    (env.work / "set").mkdir()
    (env.work / "set" / "data.csv").write_text("prompt,weight\na cat on a teal background,1\na car,2\n")
    env.train("prompts.file=hub:./set?split=train&column=prompt")


READS = """
import numpy, torch
from PIL import Image, ImageDraw, ImageFont
from vipo.rewards.ocr import Ocr
from vipo.types import Prompt
picture = Image.new("RGB", (384, 256), (200, 30, 30))
ImageDraw.Draw(picture).text((20, 90), "Goal Achieved", font=ImageFont.load_default(36), fill=(255, 255, 255))
media = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float().div(255)[None, :, None]
print(Ocr()(media, [Prompt('a watch that shows "Goal Achieved"')]).item())
"""


def ocr(env: Fresh) -> None:
    assert float(env("python", "-c", READS)) == 1.0


DETECTS = """
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from vipo.rewards.geneval import Detector
stages = ["stage1", "stage2", "stage3", "stage4"]
swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 16, "dim_feedforward": 16, "num_queries": 12}
layers = {"encoder_layers": 1, "encoder_feedforward_dim": 16, "decoder_layers": 2, "num_attention_heads": 2}
config = Mask2FormerConfig(backbone_config=swin, **sizes, **layers, id2label={0: "cat", 1: "car"}, num_labels=2)
Mask2FormerForUniversalSegmentation(config).save_pretrained("detector")
detector = Detector("detector", resolution=64, dtype="float32", offload=False)
print(len(detector(torch.rand(3, 64, 64), {"cat"}, sure=0.0)["cat"]))
"""


def geneval(env: Fresh) -> None:
    """The detector on random weights; the published ones are not there, which a sentence says."""
    assert int(env("python", "-c", DETECTS)) > 0
    assert_refused(env.ends("vipo", *WITHOUT["geneval"]), "no config.json at 'facebook/mask2former")


def trackio(env: Fresh) -> None:
    env.train("tracking={trackio: {auto_log_cpu: false}}")
    assert list((env.work / "trackio").rglob("*.db")) and _unfailing(env)


def wandb(env: Fresh) -> None:
    env.train("tracking=[wandb]")
    assert list((env.work / "run").rglob("*.wandb")) and _unfailing(env)


def swanlab(env: Fresh) -> None:
    env.train("tracking={swanlab: {mode: offline}}")
    assert list((env.work / "run" / "swanlog").iterdir()) and _unfailing(env)


def tracking(env: Fresh) -> None:
    env.train("tracking={tensorboard: {}, trackio: {auto_log_cpu: false}, wandb: {}, swanlab: {mode: offline}}")
    assert list((env.work / "run").rglob("events.out.*")) and _unfailing(env)


def _unfailing(env: Fresh) -> bool:
    """Whether no tracker was left out."""
    return "tracking:" not in env("vipo", "metrics", "run", "--csv")


def video(env: Fresh) -> None:
    """A clip is written as mp4, read again, and a map made of it."""
    env("vipo", "sample", "embedded:emoji-wan", "--prompts", "a cat", "--steps", "2", "--video", "mp4")
    (clip,) = (env.work / "samples").rglob("*.mp4")
    env("vipo", "maps", clip, "--resolution", "64")
    assert list((env.work / "maps").iterdir())


def ui(env: Fresh) -> None:
    """The explorer answers on loopback, and ends on Ctrl-C."""
    assert "--port" in env("vipo", "maps", "--ui", "--help")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(env.work / "red.png")
    command = [env.root / "bin" / "vipo", "maps", "--ui", "red.png"]
    with subprocess.Popen(command, cwd=env.work, env=env.environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        with urlopen(server.stdout.readline().split()[0], timeout=60) as page:
            assert page.status == 200 and b"nicegui" in page.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def deepspeed(env: Fresh) -> None:
    """Two processes on a CPU, where DeepSpeed compiles for a minute first."""
    run = [env.root / "bin" / "python", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    line = [*run, "-m", "vipo", "train", "quickstart", *SHORT]
    own = {**env.environment, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    for stage in ("zero2", "zero3"):
        command = [*line, "--no-report", "--output", stage, f"training.sharding={stage}"]
        subprocess.run(command, cwd=env.work, env=own, check=True)
        parts = sorted((env.work / stage / "checkpoints").rglob("optimizer-*.safetensors"))
        assert len(parts) == 2 and all(part.stat().st_size > 1000 for part in parts)


def docs(env: Fresh) -> None:
    env("mkdocs", "build", "--strict", "--site-dir", env.work / "site", cwd=ROOT)
    assert (env.work / "site" / "index.html").is_file()


USES: Mapping[str, Callable[[Fresh], None]] = {
    use.__name__: use
    for use in (
        bitsandbytes, torchao, quantization, parquet, datasets, ocr, geneval, trackio, wandb, swanlab, tracking, pandas,
        video, ui, deepspeed, docs,
    )
}  # fmt: skip
WITHOUT: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("train", "quickstart", "optimizer.kind=adamw8bit", "--output", "refused"),
    "torchao": ("train", "quickstart", "generator.quantization=int8", "--output", "refused"),
    "parquet": ("metrics", EXAMPLE, "--parquet", "table.parquet"),
    "datasets": ("train", "quickstart", "prompts.file=hub:./set?split=train", "--output", "refused"),
    "ocr": ("train", "quickstart", "rewards={ocr: 1}", "--output", "refused"),
    "geneval": ("train", "quickstart", "rewards={geneval_hf: 1}", "--output", "refused"),
    "trackio": ("train", "quickstart", "tracking=[trackio]", "--output", "refused"),
    "wandb": ("train", "quickstart", "tracking=[wandb]", "--output", "refused"),
    "swanlab": ("train", "quickstart", "tracking=[swanlab]", "--output", "refused"),
    "video": ("maps", "clip.mp4"),
    "ui": ("maps", "--ui"),
}
"""What is refused where an extra is missing, with the line that installs it."""


def test_every_extra_has_a_use() -> None:
    assert set(USES) == set(EXTRAS) and set(WITHOUT) <= set(EXTRAS)


# --- the wheel -------------------------------------------------------------------------------------------------------


@needs_index
def test_the_wheel_has_its_licence_types_recipes_and_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = archive.read(metadata).decode()
        licences = {name.partition(".dist-info/licenses/")[2] for name in names} - {""}
        assert archive.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()
    assert f"License-Expression: {PROJECT['license']}\n" in told
    assert {line.removeprefix("License-File: ") for line in told.splitlines() if line.startswith("License-File")} == (
        licences
    )
    tracked = subprocess.run(["git", "ls-files", "src/vipo", "recipes"], cwd=ROOT, capture_output=True, text=True)
    wanted = {name.removeprefix("src/") for name in tracked.stdout.split()}
    wanted = {f"vipo/{name}" if name.startswith("recipes/") else name for name in wanted}
    ours = {name for name in names if ".dist-info/" not in name}
    assert "vipo/py.typed" in wanted and ours == wanted


@needs_index
def test_the_core_alone(core: Fresh) -> None:
    core("python", "-m", "pip", "check")
    version = core("vipo", "--version")
    assert PROJECT["version"] in version and version == core("python", "-m", "vipo", "--version")
    for shell in ("bash", "zsh", "fish"):
        line = f"{core.root / 'bin' / 'vipo'} --show-completion; :"  # a shell that is a parent, as at a prompt
        if there := shutil.which(shell):
            said = subprocess.run([there, "-c", line], env=core.environment, capture_output=True, text=True, check=True)
            assert "_VIPO_COMPLETE" in said.stdout, said
    core("vipo", "report", EXAMPLE)
    assert core("vipo", "metrics", EXAMPLE, "--csv").startswith("run,iteration,")
    assert not reported(core)


@needs_index
def test_what_an_extra_brings_is_refused_without_it(core: Fresh) -> None:
    (core.work / "set").mkdir()
    (core.work / "clip.mp4").touch()
    for extra, command in WITHOUT.items():
        assert_refused(core.ends("vipo", *command), f"pip install 'vipo[{extra}]'")
    told = core.ends("python", "-c", "import vipo; vipo.metrics_frame()")
    assert "UserError: metrics_frame needs pandas: pip install 'vipo[pandas]'" in told.err


@needs_index
def test_the_line_that_the_doctor_prints_installs_an_extra(another: Fresh, wheel: Path) -> None:
    another.install(f"vipo @ {wheel.as_uri()}")
    (line,) = (line for line in another("vipo", "doctor", "--offline").splitlines() if line.startswith("vipo[geneval]"))
    assert line.rstrip().endswith("lacks scipy: pip install 'vipo[geneval]'")
    another.install("vipo[geneval]")
    assert reported(another) == {"geneval"}


@needs_index
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_alone_does_what_it_is_for(extra: str, another: Fresh, wheel: Path) -> None:
    another.install(f"vipo[{extra}] @ {wheel.as_uri()}")
    another("python", "-m", "pip", "check")
    assert extra in {*reported(another), "docs"}
    USES[extra](another)


def reported(env: Fresh) -> set[str]:
    """The extras that the doctor finds installed, once what it says of every extra is what pip says of its needs."""
    there = env.installed()
    told = {extra.pop("name"): extra for extra in json.loads(env("vipo", "doctor", "--offline", "--json"))["extras"]}
    assert set(told) == set(EXTRAS) - {"docs"}
    for name, said in told.items():
        needs = [Requirement(line).name for line in EXTRAS[name]]
        missing = sorted(need for need in needs if canonicalize_name(need) not in there)
        assert said == {"missing": missing, "install": f"pip install 'vipo[{name}]'"}
    return {name for name, said in told.items() if not said["missing"]}

"""The explorer's page: controls and pictures. What they show is worked out in ``look`` and ``opened``."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from nicegui import events, run, ui
from nicegui.element import Element
from PIL import Image

from vipo.errors import UserError
from vipo.explorer import look, opened
from vipo.explorer.look import Looked
from vipo.explorer.opened import Moment, OpenedRun, Samples
from vipo.explorer.settings import CHOICES, backbones, changed, chosen_of, meaning, option, recipe_lines, settings_of
from vipo.explorer.start import Opening
from vipo.media.reading import VIDEOS
from vipo.report.embed import data_uri

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
PICTURES = ".png,.jpg,.jpeg,.webp,.gif,.tif,.tiff,.bmp,.avif"
FAVICON, ACCENT = "◧", "#1f5fa8"
SETTLED_SECONDS = 0.15  # after the last change of a control

E = TypeVar("E", bound=Element)


def application(opening: Opening) -> FastAPI:
    """The page as an ASGI application."""
    app = FastAPI(openapi_url=None)

    @ui.page("/", title="vipo maps", favicon=FAVICON)
    def page() -> None:
        ui.add_css(STYLE)
        ui.colors(primary=ACCENT)
        with ui.element("header"):
            ui.label("vipo maps").classes("kicker")
            with ui.tabs().props("dense no-caps align=left") as tabs:
                picture, samples = ui.tab("A picture or clip"), ui.tab("A run")
        first = samples if opening.run is not None and opening.picture is None else picture
        with ui.tab_panels(tabs, value=first, animated=False).classes("views"):
            with ui.tab_panel(picture):
                PictureView(opening)
            with ui.tab_panel(samples):
                RunView(opening)

    ui.run_with(app, title="vipo maps", dark=None, tailwind=False, show_welcome_message=False)
    return app


def _image(address: str, words: str) -> None:
    image = ui.element("img")
    image.props["src"], image.props["alt"] = address, words


def _figure(picture: Image.Image, caption: str, *, below: str = "") -> None:
    with _part(ui.element("figure"), caption):
        _image(data_uri(picture, max(picture.size), lossless=look.TILE), caption)
        with ui.element("figcaption"):
            ui.label(caption)
            if below:
                ui.label(below).classes("soft")


def _part(made: E, name: str) -> E:
    """Named in the document."""
    made.props["data-part"] = name
    return made


def _notice(words: str) -> None:
    ui.label(words).classes("notice").props("role=alert")


async def _worked_out(task: Callable[..., Any], *given: Any) -> Any:
    """Off the page's own thread; what the user can mend comes back as its sentence."""
    try:
        return await run.io_bound(task, *given)
    except (UserError, OSError, ValueError) as error:  # of a map that cannot be made, such as of features not finite
        return str(error)


class PictureView:
    """A file, settings, and what they come to; each change is shown beside the look before it."""

    def __init__(self, opening: Opening) -> None:
        self.opening, self.own = opening, opening.settings.structuring.backbone
        self.chosen = chosen_of(opening.settings.structuring)
        self.stride, self.latent = opening.settings.temporal_stride, 0
        self.name, self.clip = "", None
        self.now: Looked | None = None
        self.before: Looked | None = None
        self.problem, self.waiting, self.working = "", False, False
        with ui.element("div").classes("split"):
            with ui.element("aside"):
                self._controls()
            with ui.element("main"):
                self.results()
        if opening.picture is not None:
            ui.timer(0, lambda: self._open(opening.picture.name, opening.picture), once=True)

    def _controls(self) -> None:
        ui.upload(on_upload=self._dropped, auto_upload=True, max_files=None, label="Drop a picture or clip").props(
            f'flat bordered accept="{PICTURES},{",".join(VIDEOS)}"'
        ).classes("drop").props("data-part=drop")
        self._select("backbone", backbones(self.own))
        with ui.element("div").classes("pair"):
            self._number("components", "components K", 1, 16, 1)
            self._select("aggregation")
        self._number("smoothing_sigma", "smoothing sigma, in feature cells", 0, 8, 0.25)
        self._select("orientation")
        with ui.element("div").classes("pair"):
            self._select("scope")
            self._select("normalization")
        with ui.expansion("Backbone's own options, clips").props("dense"):
            self._option("resolution", "input side, in pixels")
            self._option("pretrained", "weights: hub id or folder")
            self._number("temporal_stride", "pixel frames per latent frame", 1, 16, 1)

    def _select(self, key: str, options: dict[str, str] | None = None) -> None:
        made = ui.select(options or list(CHOICES[key]), value=self.chosen[key], label=key, on_change=self._set(key))
        made.props(f"dense outlined options-dense data-part={key}").tooltip(meaning(key))

    def _number(self, key: str, label: str, least: float, most: float, step: float) -> None:
        value = self.stride if key == "temporal_stride" else self.chosen[key]
        made = ui.number(label, value=value, min=least, max=most, step=step, on_change=self._set(key))
        made.props(f"dense outlined debounce={int(1000 * SETTLED_SECONDS)} data-part={key}")

    def _option(self, key: str, label: str) -> None:
        given = str(self.chosen["backbone_options"].get(key, ""))
        made = ui.input(label, value=given, on_change=lambda event: self._set_option(key, event.value))
        made.props(f"dense outlined debounce=600 data-part={key}")

    def _set(self, key: str) -> Callable[[Any], Awaitable[None]]:
        async def set_it(event: events.ValueChangeEventArguments) -> None:
            if event.value is None:
                return  # a number that is being typed
            whole = isinstance(event.value, float) and key != "smoothing_sigma"
            value = int(event.value) if whole else event.value
            if key == "temporal_stride":
                self.stride = value
            else:
                self.chosen = {**self.chosen, key: value}
            await self._again()

        return set_it

    async def _set_option(self, key: str, given: str) -> None:
        kept = {name: value for name, value in self.chosen["backbone_options"].items() if name != key}
        self.chosen = {**self.chosen, "backbone_options": {**kept, **option(key, given)}}
        await self._again()

    async def _dropped(self, event: events.UploadEventArguments) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"dropped{Path(event.file.name).suffix}"
            await event.file.save(path)
            await self._open(Path(event.file.name).name, path)
        event.sender.reset()

    async def _open(self, name: str, path: Path) -> None:
        clip = await _worked_out(look.read, path)
        if isinstance(clip, str):
            self.problem = clip.replace(str(path), name)
            self.results.refresh()
            return
        self.name, self.clip, self.latent, self.now, self.before = name, clip, 0, None, None
        await self._again()

    async def _again(self) -> None:
        """Look with what is chosen now; a change while one look is made waits for it, and only the last one counts."""
        self.waiting = True
        while self.waiting and not self.working and self.clip is not None:
            self.waiting, self.working = False, True
            try:
                self._take(await _worked_out(self._look))
            finally:
                self.working = False
        self.results.refresh()

    def _look(self) -> Looked:
        assert self.clip is not None
        return look.look(self.name, self.clip, settings_of(self.chosen, self.stride))

    def _take(self, found: Looked | str) -> None:
        if isinstance(found, str):
            self.problem = found
            return
        self.problem = ""
        if self.now is None or changed(self.now.settings, found.settings):
            self.before, self.now = self.now, found
        self.latent = min(self.latent, len(found.maps) - 1)

    @ui.refreshable_method
    def results(self) -> None:
        """What the settings come to."""
        if self.problem:
            _notice(self.problem + ("" if self.now is None else ". What is below is of the last settings that worked."))
        if self.now is None:
            if not self.problem:
                ui.label(
                    "Drop a picture or a clip on the left: its map is made here, and nothing leaves this machine."
                ).classes("empty")
            return
        self._heading(self.now)
        if len(self.now.maps) > 1:
            self._frames(self.now)
        self.figures()
        with ui.element("section").classes("two"):
            with ui.element("div"):
                self.difference()
            with ui.element("div"):
                self._lines(self.now)

    def _heading(self, now: Looked) -> None:
        frames, height, width = now.clip.shape[1:]
        size = f"{width} x {height}" + (f", {frames} frames" if frames > 1 else "")
        ui.label(now.name).classes("title")
        ui.label(f"{size} · {look.weights(now)} · {now.seconds:.2f} s on the CPU").classes("soft").props(
            "data-part=weights"
        )

    def _frames(self, now: Looked) -> None:
        with ui.element("div").classes("frames"):
            ui.label("latent frame").classes("soft")
            ui.slider(min=0, max=len(now.maps) - 1, value=self.latent, on_change=self._to_frame).props("label snap")

    def _to_frame(self, event: events.ValueChangeEventArguments) -> None:
        self.latent = int(event.value)
        self.figures.refresh()
        self.difference.refresh()

    @ui.refreshable_method
    def figures(self) -> None:
        """Picture, map, overlay; below them the components."""
        now, at = self.now, self.latent
        assert now is not None
        with ui.element("section").classes("figures"):
            frame = f"frame {now.frames[at]}" if len(now.maps) > 1 else ""
            _figure(look.picture(now, at), "picture", below=frame)
            _figure(look.map_picture(now, at), "map M", below="dark 0, bright its largest weight")
            _figure(look.overlay(now, at), "what the map lights", below="where the credit goes")
        ui.label("Principal components").classes("heading")
        with ui.element("section").classes("tiles"):
            if now.settings.structuring.components > 1:
                _figure(look.component_picture(now, at, None), "as colours", below="z1 to z3 as red, green, blue")
            for number, share in enumerate(look.shares(now, at)):
                with ui.element("div"):
                    _figure(
                        look.component_picture(now, at, number), f"z{number + 1}", below=f"{share:.1%} of the variance"
                    )
                    with ui.element("div").classes("bar"):
                        ui.element("i").style(f"width: {100 * share:.1f}%")
        ui.label(f"together {sum(look.shares(now, at)):.1%} of the variance").classes("soft").props(
            "data-part=variance"
        )

    @ui.refreshable_method
    def difference(self) -> None:
        """Beside the look before it."""
        ui.label("Against the last settings").classes("heading")
        if self.now is None or self.before is None:
            ui.label("Change a setting: what it does to the map is shown here.").classes("soft")
            return
        found = look.change(self.before, self.now)
        with ui.element("ul").props("data-part=changed"):
            for words in found.settings:
                with ui.element("li"):
                    ui.label(words)
        if found.difference is None:
            ui.label("The map has other frames than before, so it cannot be laid over the last one.").classes("soft")
            return
        agree = "" if found.agreement != found.agreement else f", correlation {found.agreement:.3f}"
        ui.label(f"moved {found.moved:.1%} of its mean weight{agree}").classes("soft").props("data-part=moved")
        with ui.element("div").classes("trio"):
            at = min(self.latent, len(self.now.maps) - 1)
            _figure(look.map_picture(self.before, at), "before")
            _figure(look.map_picture(self.now, at), "now")
            _figure(
                look.difference_picture(self.now, found.difference, at), "difference", below="blue rose, orange fell"
            )

    def _lines(self, now: Looked) -> None:
        lines = recipe_lines(now.settings.structuring)
        ui.label("In a recipe").classes("heading")
        ui.label(lines).classes("code").props("data-part=lines")
        with ui.element("div").classes("buttons"):
            ui.button("Copy", on_click=lambda: self._copy(lines)).props("flat dense no-caps")
            ui.button("Save sheet and lines", on_click=self._save).props("outline dense no-caps data-part=save")
        ui.label(
            "With a credit that takes sources, such as advantage_map; beside other sources they are multiplied."
        ).classes("soft")

    def _copy(self, lines: str) -> None:
        ui.clipboard.write(lines)
        ui.notify("copied")

    async def _save(self) -> None:
        saved = await _worked_out(look.save, self.now, self.opening.output)
        words = saved if isinstance(saved, str) else "saved " + " and ".join(str(path) for path in saved)
        ui.notify(words, type="negative" if isinstance(saved, str) else "positive", multi_line=True)


class RunView:
    """A run's folder, an iteration, a group, a sample: its picture, its credit, and every map beside each other."""

    def __init__(self, opening: Opening) -> None:
        self.opened: OpenedRun | None = None
        self.samples: Samples | None = None
        self.detail: opened.Detail | None = None
        self.group, self.place, self.frame, self.problem = 0, 0, 0, ""
        with ui.element("div").classes("opening"):
            self.folder = ui.input("folder of a run", value=str(opening.run or "")).props(
                "dense outlined data-part=folder"
            )
            self.folder.on("keydown.enter", self._open)
            ui.button("Open", on_click=self._open).props("unelevated no-caps data-part=open")
        self.chooser()
        self.shown()
        if opening.run is not None:
            ui.timer(0, self._open, once=True)

    async def _open(self) -> None:
        found = await _worked_out(opened.open_run, Path(self.folder.value.strip()).expanduser())
        self.opened = self.samples = self.detail = None
        if isinstance(found, str):
            self.problem = found
        else:
            self.opened, self.problem = found, ""
            trained = [moment for moment in found.moments if moment.trained]
            await self._to_moment(trained[-1] if trained else found.moments[-1])
        self._refresh()

    def _refresh(self) -> None:
        self.chooser.refresh()
        self.shown.refresh()

    async def _to_moment(self, moment: Moment) -> None:
        assert self.opened is not None
        found = await _worked_out(self.opened.samples, moment)
        self.problem, self.frame = (found, 0) if isinstance(found, str) else ("", 0)
        self.samples = None if isinstance(found, str) else found
        self.moment, self.detail = moment, None
        if self.samples is not None:
            self.group = min(self.group, len(self.samples.groups) - 1)
            await self._to_place(self.samples.of(self.group)[0])

    async def _to_place(self, place: int) -> None:
        self.place = place
        found = await _worked_out(opened.detail, self.opened, self.samples, place, self.frame)
        self.problem = found if isinstance(found, str) else ""
        self.detail = None if isinstance(found, str) else found

    @ui.refreshable_method
    def chooser(self) -> None:
        """Iteration, group, sample."""
        if self.opened is None:
            return
        ui.label(opened.summary(self.opened)).classes("soft").props("data-part=run")
        for note in self.opened.notes:
            _notice(note)
        with ui.element("div").classes("pair wide"):
            moments = {moment: moment.words for moment in self.opened.moments}
            made = ui.select(moments, value=self.moment, label="iteration", on_change=self._moment_chosen)
            made.props("dense outlined options-dense data-part=moment")
            if self.samples is not None:
                groups = {k: f"group {k + 1}: {prompt}" for k, prompt in enumerate(self.samples.groups)}
                made = ui.select(groups, value=self.group, label="group", on_change=self._group_chosen)
                made.props("dense outlined options-dense data-part=group")
        if self.samples is not None:
            with ui.element("div").classes("strip"):
                for place in self.samples.of(self.group):
                    self._thumbnail(self.opened, self.samples, place)

    def _thumbnail(self, run_of: OpenedRun, samples: Samples, place: int) -> None:
        async def choose() -> None:
            await self._to_place(place)
            self._refresh()

        here = place == self.place
        button = ui.element("button").classes("thumbnail" + (" here" if here else "")).on("click", choose)
        number = place - samples.of(self.group)[0] + 1
        with button.props(f'aria-pressed={str(here).lower()} aria-label="sample {number}" data-part=sample-{number}'):
            for small in (opened.thumbnail(samples, place), opened.credit_thumbnail(samples, place)):
                if small is not None:
                    _image(data_uri(small), "")  # the button has its name
            ui.label(opened.caption(run_of, samples, place))

    async def _moment_chosen(self, event: events.ValueChangeEventArguments) -> None:
        await self._to_moment(event.value)
        self._refresh()

    async def _group_chosen(self, event: events.ValueChangeEventArguments) -> None:
        assert self.samples is not None
        self.group = int(event.value)
        await self._to_place(self.samples.of(self.group)[0])
        self._refresh()

    @ui.refreshable_method
    def shown(self) -> None:
        """The sample that was picked."""
        if self.problem:
            _notice(self.problem)
        if self.detail is None:
            if not self.problem:
                ui.label("Open the folder that `vipo train` wrote.").classes("empty")
            return
        self._about(self.detail)
        ui.label("Every map source").classes("heading")
        with ui.element("section").classes("sources"):
            for one in self.detail.maps:
                if one.picture is not None:
                    self._source(one)
        missing = [one for one in self.detail.maps if one.picture is None]
        if missing:
            ui.label("Maps that are not here").classes("heading")
        for one in missing:
            with _part(ui.element("p").classes("missing"), f"missing-{one.source}"):
                ui.label(one.source).classes("name")
                ui.label(one.meaning).classes("soft")

    def _about(self, detail: opened.Detail) -> None:
        ui.label(detail.prompt).classes("title")
        if detail.frames > 1:
            with ui.element("div").classes("frames"):
                ui.label("frame").classes("soft")
                ui.slider(min=0, max=detail.frames - 1, value=self.frame, on_change=self._frame_chosen).props(
                    "label snap"
                )
        with ui.element("section").classes("figures"):
            if detail.before is not None:
                _figure(detail.before, "before training", below="the same prompt and noise")
            _figure(detail.picture, "picture", below=detail.rank)
            if detail.pushed is not None:
                _figure(detail.pushed, "what the update pushed where", below=detail.pushed_words)
            self._facts(detail)

    def _facts(self, detail: opened.Detail) -> None:
        assert self.opened is not None
        with ui.element("dl").props("data-part=facts"):
            for name, value in opened.facts(self.opened, self.moment, detail):
                with ui.element("dt"):
                    ui.label(name)
                with ui.element("dd"):
                    ui.label(value)
            if detail.pushed is None:
                with ui.element("dt"):
                    ui.label("what the update pushed where")
                with ui.element("dd").classes("words"):
                    ui.label(detail.pushed_words)
            for told in self.opened.events(self.moment):
                with ui.element("dd").classes("words"):
                    ui.label(told)

    def _source(self, one: opened.Shown) -> None:
        with _part(ui.element("article").classes("taken" if one.taken else ""), f"source-{one.source}"):
            ui.label(one.source).classes("name")
            with ui.element("div").classes("both"):
                for picture, what in ((one.picture, "map"), (one.lit, "what it lights")):
                    assert picture is not None
                    _image(data_uri(picture, opened.TILE, lossless=opened.TILE), f"{one.source}: {what}")
            ui.label(f"weights {one.weights}").classes("soft")
            ui.label(one.meaning).classes("soft")

    async def _frame_chosen(self, event: events.ValueChangeEventArguments) -> None:
        self.frame = int(event.value)
        await self._to_place(self.place)
        self.shown.refresh()

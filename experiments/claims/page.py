"""Write the results: one HTML page that needs nothing else, and the tables of the Markdown file.

    python experiments/claims/page.py --results experiments/claims/results --pictures runs/claims \\
        --html claims.html --markdown docs/results.md

In the Markdown file only what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced. Without
``--pictures`` a page that is there keeps its own, so that results from another machine can join it.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import plots
from cells import Table
from matrix import ARMS
from results import Results, planned_seeds, read
from tables import ABLATIONS, REDNESS, SOURCES, tables
from verdicts import FROM_PAPER, Claim, Verdict, claims, claims_table
from vipo.errors import UserError
from vipo.files import write_text
from vipo.media.sheets import load_sheet
from vipo.report.svg import fixed, interval, signed
from vipo.report.template import rendered

SIGNS: Mapping[Verdict, tuple[str, str]] = {
    "holds": ("✓", "up"),
    "does not hold": ("✕", "down"),
    "cannot be told apart": ("◆", "flat"),
    "not measured yet": ("○", "flat"),
}
PLURALS: Mapping[Verdict, str] = {
    "holds": "hold",
    "does not hold": "do not hold",
    "cannot be told apart": "cannot be told apart",
    "not measured yet": "not measured yet",
}
SIDE, QUALITY = 128, 80  # pixels and WebP quality of an embedded picture
COMPARED, STRIP_ROWS = 16, 5
COMPARED_ARMS = {
    "scalar GRPO on emoji_match": "groups-sample-1e-3",
    "the quickstart's map on emoji_match": "groups-quickstart-1e-3",
    "scalar GRPO, emoji_clean too": "groups-sample-clean",
    "the quickstart: its map, emoji_clean too": "groups-quickstart-clean",
}
HOW = "write it, with the lines `<!-- table claims -->` and `<!-- end -->` where a table belongs"
MARKER = re.compile(r"(<!-- table ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURES = re.compile(r"<!-- pictures (\w+) -->.*?<!-- end -->", re.DOTALL)


def markdown(table: Table) -> str:
    """A table and its note; remarks stand on a second line of their cell, headings in bold."""
    width = len(table.columns)
    lines = [[*table.columns], ["---"] * width]
    for cells in table.lines:
        words = [_cell(*cell) for cell in cells]
        lines.append([f"**{words[0]}**", *[""] * (width - 1)] if len(words) == 1 < width else words)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{table.note.strip()}\n"


def _cell(text: str, remark: str) -> str:
    return f"{text}<br>{remark}".replace("|", "\\|") if remark else text.replace("|", "\\|")


def filled(text: str, found: Sequence[Table]) -> str:
    """``text`` with every marked table replaced.

    Raises:
        UserError: a marker names no table, or is not closed.
    """
    by_name = {table.name: table for table in found}
    known = ", ".join(by_name)
    opened, closed = text.count("<!-- table "), len(MARKER.findall(text))
    if not opened or opened != closed or any("<!-- table " in m.group(0)[9:] for m in MARKER.finditer(text)):
        raise UserError(
            f"the Markdown has {opened} lines `<!-- table NAME -->`, of which {closed} are followed by `<!-- end -->` "
            f"before the next; write at least one, and close each; tables are {known}"
        )

    def replaced(match: re.Match[str]) -> str:
        name = match.group(2).strip()
        if name not in by_name:
            raise UserError(f"the Markdown asks for the table {name!r}, which does not exist; tables are {known}")
        return f"{match.group(1)}\n{markdown(by_name[name])}\n{match.group(3)}"

    return MARKER.sub(replaced, text)


def embedded(picture: Image.Image) -> str:
    """A tile as a data URI, enlarged once here rather than by every reader."""
    buffer = io.BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(buffer, format="WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Row:
    """One prompt: a picture per column."""

    prompt: str
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def sheets_of(folder: Path | None, arm: str) -> dict[int, Path]:
    """Iteration -> sheet, of the first seed that has one."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob(f"{arm}-*.png")) if folder else ():
        if match := re.fullmatch(rf"{re.escape(arm)}-(\d+)-(\d+)", path.stem):
            found.setdefault(int(match.group(1)), {})[int(match.group(2))] = path
    return found[min(found)] if found else {}


def sheet(title: str, columns: Mapping[str, Path], rows: int) -> Sheet:
    """The first prompts of several sheets, side by side.

    Raises:
        UserError: the sheets are of different prompts.
    """
    loaded = [load_sheet(path) for path in columns.values()]
    prompts = loaded[0][1]["prompts"]
    if any(info["prompts"] != prompts for _, info in loaded):
        names = ", ".join(path.name for path in columns.values())
        raise UserError(f"the sheets {names} are of different prompts; make them with one --prompts")
    made = [Row(prompts[i], tuple(embedded(tiles[i]) for tiles, _ in loaded)) for i in range(min(rows, len(prompts)))]
    return Sheet(title, tuple(columns), tuple(made))


def compared(folder: Path | None) -> Sheet | None:
    """Untrained, and ``COMPARED_ARMS`` at the last iteration that all have a sheet of; None if there is none."""
    start = sheets_of(folder, "groups-untrained")
    found = {words: sheets_of(folder, arm) for words, arm in COMPARED_ARMS.items()}
    shared = set.intersection(*(set(each) for each in found.values()))
    if 0 not in start or not shared:
        return None
    end = max(shared)
    return sheet(
        f"After {end} iterations",
        {"untrained": start[0], **{words: each[end] for words, each in found.items()}},
        COMPARED,
    )


def redness_strips(folder: Path | None) -> list[Sheet]:
    """The way that each arm went under redness."""
    found = {arm: sheets_of(folder, arm) for arm in REDNESS}
    return [sheet(arm, {str(k): way[k] for k in sorted(way)}, STRIP_ROWS) for arm, way in found.items() if way]


def without_pictures(folder: Path | None) -> list[str]:
    """Arms that the page would show and of which the folder has no sheet."""
    return [arm for arm in ("groups-untrained", *COMPARED_ARMS.values(), *REDNESS) if not sheets_of(folder, arm)]


def keeping(text: str, before: str) -> str:
    """``text`` with the pictures of the page ``before``, where that has any."""
    had = {match.group(1): match.group(0) for match in PICTURES.finditer(before)}
    return PICTURES.sub(lambda match: had.get(match.group(1), match.group(0)), text)


def pill(verdict: Verdict) -> dict[str, str]:
    return {"words": verdict, "sign": SIGNS[verdict][0], "tone": SIGNS[verdict][1]}


def shown(claim: Claim) -> dict[str, Any]:
    """A claim as the template sets it."""
    parts = []
    for part in claim.parts:
        found, line = part.effect, {"what": part.what, "wanted": "above 0" if part.above else "below 0"}
        if found:
            line["mean"] = signed(found.mean)
            line["between"] = f"{signed(found.low)} to {signed(found.high)}"
            line["plot"] = interval(found.low, found.mean, found.high, label=line["between"])
            line["seeds"] = plots.count(found.seeds)
        parts.append({**line, "pill": pill(part.verdict)})
    return {"letter": claim.letter, "text": claim.text, "pill": pill(claim.verdict), "parts": parts}


def summary(found: Sequence[Claim]) -> str:
    """How many of the paper's claims got which verdict."""
    verdicts = [claim.verdict for claim in found if claim.letter in FROM_PAPER]
    counted = {verdict: verdicts.count(verdict) for verdict in SIGNS if verdict in verdicts}
    said = [f"{count} {verdict if count == 1 else PLURALS[verdict]}" for verdict, count in counted.items()]
    return f"The paper makes {len(verdicts)} claims: {', '.join(said)}."


def facts(results: Results) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what this rests on."""
    trained = [arm for arm in ARMS if arm != "untrained"]
    planned = sum(map(planned_seeds, trained))
    done = [run for arm in trained for run in results.arms.get(arm, {}).values()]
    counts = {len(row) for run in done for scores in run.evaluations.values() for row in scores.values()}
    longest = max((k for arm in trained for k in results.iterations(arm)), default=0)
    hours = sum(run.seconds for run in done) / 3600
    return [
        ("Runs", f"{len(done)} of {planned}", f"an arm with a seed each; {fixed(hours, 1)} hours of training"),
        ("Iterations", str(longest), "of the longest runs"),
        ("Evaluation", f"{max(counts, default=0)} prompts", "the same starting noise for every run"),
        ("Maps against the gradient", _iterations(results), "measured without training"),
    ]


def _iterations(results: Results) -> str:
    return f"{results.gradient['iterations']} iterations" if results.gradient else "not measured yet"


def render(results: Results, pictures: Path | None) -> str:
    """The page as text."""
    found = claims(results)
    return rendered(
        Path(__file__).with_name("page.html.j2"),
        ["bands.css"],
        summary=summary(found),
        claims=[shown(claim) for claim in found],
        facts=facts(results),
        tables={table.name: table for table in tables(results)},
        gain_panels=plots.gain_panels(results),
        group_panels=plots.group_panels(results),
        clip_panels=plots.clip_panels(results),
        structure_panels=plots.structure_panels(results),
        clipping_panels=plots.clipping_panels(results),
        forest=plots.forest(results),
        source_marks=plots.differences(results, SOURCES, "sample"),
        ablation_marks=plots.differences(results, [arm for arms in ABLATIONS.values() for arm in arms], "vipo"),
        compared=compared(pictures),
        strips=redness_strips(pictures),
    )


def publish(results: Path, pictures: Path | None, html: Path | None, prose: Path | None) -> None:
    """Write the page to ``html`` and the tables into ``prose``."""
    found = read(results)
    if prose:
        if not prose.is_file():
            raise UserError(f"{str(prose)!r} does not exist; {HOW}")
        made = [claims_table(claims(found)), *tables(found)]
        write_text(prose, filled(prose.read_text(encoding="utf-8"), made))
    if html:
        before = html.read_text(encoding="utf-8") if pictures is None and html.is_file() else ""
        write_text(html, keeping(render(found, pictures), before))
        if "<img" in before:
            print(f"{html} keeps the pictures that it had: give --pictures for those of other runs")
        elif lacking := without_pictures(pictures):
            print(f"{html} shows no pictures of {', '.join(lacking)}: give --pictures a folder that has their sheets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--pictures", type=Path, help="folder of the sheets that the arms wrote")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    try:
        publish(args.results, args.pictures, args.html, args.markdown)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

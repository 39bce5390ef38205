"""Tables from results/*.json alone, and the pages that show them.

A page asks for a table by its name, <!-- table:NAME -->: a command (its claims on test worlds),
final-COMMAND (on the last worlds), COMMAND:raw (every row and column), rivals:places (ways to
remember, by place), compare-FOLDER (arms by seed), bench-PRESET-SUITE, or `summary`, the README's.
What stands between the marks of README.md is written anew; results/README.md is made whole by
lab/summary.py. The same json give the same bytes.
"""

import base64
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from engine import configs, weights
from lab import figures, metrics, stats, summary
from lab.claims import CLAIMS

MARK = re.compile(r"<!-- table:([\w:-]+) -->.*?<!-- /table -->", re.S)
CLAIM_HEAD = ("claim", "where", "paper", "predicted", "measured [95 %]", "n", "verdict")
ALL_SAY = ("command", "worlds", "split", "machine", "threads", "versions", "date", "claims", "raw")
ARM_HEAD = ("claim", "arm", "each seed", "mean", "difference [95 % over seeds]")

Rows = Iterable[Iterable[str]]
Results = dict[str, dict]  # command -> what it stored


# ---- cells --------------------------------------------------------------------------------


def number(x: float | None) -> str:
    if x is None:
        return "-"
    if not math.isfinite(x):
        return "nan"
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def table(head: Iterable[str], rows: Rows) -> list[str]:
    """In Markdown."""
    head = list(head)
    lines = [head, *rows]
    written = [f"| {' | '.join(line)} |" for line in lines]
    return [written[0], "|---" * len(head) + "|", *written[1:]]


def measured(claim: dict) -> str:
    """The value, its interval and its unit."""
    if claim["value"] is None:
        return "not measured"
    cell = number(claim["value"])
    if claim["interval"]:
        low, high = map(number, claim["interval"])
        cell += f" [{low}, {high}]"
    return f"{cell} {claim['unit']}".rstrip()


def mean(values: list[float]) -> str:
    """Over the worlds that have it; nothing where the run has no such cell."""
    if not values:
        return ""
    return number(float(np.nanmean(values))) if np.isfinite(values).any() else "nan"


def footer(result: dict) -> str:
    """What to type for these numbers, and where they were measured."""
    parts = [
        f"`{result['command']}`",
        f"{len(result['worlds'])} {result['split']} worlds",
        f"{result['machine']}, {result['threads']} threads",
        f"torch {result['versions']['torch']}",
        f"{result['date']} UTC",
        *result.get("notes", []),
    ]
    return " · ".join(parts)


# ---- tables -------------------------------------------------------------------------------


def claim_table(result: dict) -> str:
    """A row for every claim of a command."""
    rows = []
    for claim in result["claims"]:
        row = [claim["name"], claim["where"], number(claim["paper"])]
        row += [claim["predicted"] or "-", measured(claim), str(claim["n"] or "-")]
        rows.append([*row, claim["verdict"]])
    return "\n".join([*table(CLAIM_HEAD, rows), "", footer(result)])


def raw_table(result: dict) -> str:
    """Rows and columns as the keys say; means over worlds."""
    raw = result["raw"]
    keys = [key.split("/", 1) for key in raw]
    rows = dict.fromkeys(row for row, _ in keys)
    columns = dict.fromkeys(column for _, column in keys)
    lines = []
    for row in rows:
        cells = [mean(raw.get(f"{row}/{column}", [])) for column in columns]
        lines.append([row, *cells])
    return "\n".join([*table(["", *columns], lines), "", footer(result)])


def rivals_table(facts: dict[str, dict]) -> str:
    """Two rows for every way to remember: PSNR at each place with its interval, then its costs."""
    places = list(next(iter(facts.values()))["scores"]["all"])
    head = ["", "pixels", *places, "ms per segment", "numbers kept"]
    rows = []
    for arm, fact in facts.items():
        for pixels, scores in fact["scores"].items():
            row = [arm, pixels, *(with_interval(scores[place]) for place in places)]
            costs = [number(fact["ms"]), f"{fact['numbers kept']:,}"]
            rows.append(row + (costs if pixels == "all" else ["", ""]))
    return "\n".join(table(head, rows))


def with_interval(score: dict) -> str:
    """A mean in dB, and what it could be in other worlds."""
    cell = f"{score['mean']:.1f}"
    if score["interval"]:
        low, high = score["interval"]
        cell += f" [{low:.1f}, {high:.1f}]"
    return cell


def difference(values: dict[str, float], base: dict[str, float]) -> str:
    """Mean over seeds that both arms have, with Student's interval if there are two or more."""
    paired = [values[seed] - base[seed] for seed in values if seed in base]
    if not paired:
        return "-"
    if len(paired) == 1:
        return f"{paired[0]:+.3g}"
    middle, half = stats.student(paired)
    return f"{middle:+.3g} [{middle - half:+.3g}, {middle + half:+.3g}]"


def arms(
    found: dict[tuple[str, str], dict[str, float]],  # (claim, arm) -> seed -> value
    against: str,  # the arm that the others are compared with
) -> list[str]:
    """Arms trained several times as a table: every claim by seed, differences paired by seed."""
    rows = []
    for claim, arm in sorted(found, key=lambda key: (key[0], key[1] != against, key[1])):
        values = found[claim, arm]
        every = {seed for (name, _), seeds in found.items() if name == claim for seed in seeds}
        each = ", ".join(number(values.get(seed)) for seed in sorted(every))
        apart = "-"
        if arm != against:
            apart = difference(values, found.get((claim, against), {}))
        rows.append([claim, arm, each, number(sum(values.values()) / len(values)), apart])
    return table(ARM_HEAD, rows)


def contrast(
    folder: Path,  # with ARM-SEED/*.json
    against: str,
) -> dict:
    """The arms of a folder side by side; the last command of each kind stands for all."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    last = {}
    for path in sorted(folder.glob("*-*/*.json")):
        if path.stem not in CLAIMS:  # predictions of a run that is not over
            continue
        arm, seed = path.parent.name.rsplit("-", 1)
        result = stored(path, *ALL_SAY)
        last[path.stem] = footer(result)
        for claim in result["claims"]:
            if claim["value"] is not None:
                name = f"{claim['name']}, {claim['unit']}".rstrip(", ")
                found.setdefault((name, arm), {})[seed] = claim["value"]
    if not found:
        raise ValueError(f"no measured arms below {folder}: it should hold ARM-SEED/*.json")
    command = f"`python evaluate.py compare --out {folder} --against {against}`"
    source = f"{command} · each seed: {'; '.join(last.values())}"
    return {"table": [*arms(found, against), "", source]}


# ---- pages --------------------------------------------------------------------------------


def results(out: Path) -> Results:
    paths = [path for path in sorted(out.glob("*.json")) if path.stem in CLAIMS]
    found = {path.stem: stored(path, *ALL_SAY) for path in paths}
    for path in paths:
        with configs.reading(path):
            fill_from_gpu(found[path.stem], out)
    return found


def stored(path: Path, *needed: str) -> dict:
    """What a file of results says, if it says all that is needed."""
    with configs.reading(path):
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or not set(needed) <= set(result):
            words = ", ".join(needed) or "results by name"
            raise ValueError(f"it should hold {words}; measure it again")
    return result


def fill_from_gpu(result: dict, out: Path) -> None:
    """Claims that need a GPU, from what lab/gpu.py has stored beside them."""
    seen: dict[str, float] = {}
    for path in out.glob("gpu-*.json"):
        seen |= stored(path, "claims")["claims"]
    for claim in result["claims"]:
        if claim["measure"].startswith("needs ") and claim["name"] in seen:
            claim |= {"value": seen[claim["name"]], "n": 1, "verdict": "reported"}


def check_measures(found: Results, out: Path) -> None:
    """Nothing is reported while a measure ranks fakes wrongly."""
    raw = found.get("sanity", {}).get("raw", {})
    ranked = {name: raw.get(f"ranks fakes as expected/{name}", [1])[0] for name in metrics.METRICS}
    wrong = ", ".join(name for name, right in ranked.items() if right < 1)
    if wrong:
        path = out / "sanity.json"
        raise ValueError(f"{wrong}: ranks fakes wrongly (see {path}), so nothing is reported")


def all_tables(out: Path, found: Results) -> dict[str, str]:
    tables = {}
    for name, result in found.items():
        with configs.reading(out / f"{name}.json"):
            tables[name] = claim_table(result)
            tables[f"{name}:raw"] = raw_table(result)
    last = results(out / "final")
    for name, result in last.items():
        with configs.reading(out / f"final/{name}.json"):
            tables[f"final-{name}"] = claim_table(result)
    for kind, those in (("", found), ("final-", last)):
        if facts := those.get("rivals", {}).get("facts"):
            tables[f"{kind}rivals:places"] = rivals_table(facts["rivals"])
    others = (path for kind in ("bench", "compare", "gpu") for path in out.glob(f"{kind}-*.json"))
    for path in others:
        tables[path.stem] = "\n".join(stored(path, "table")["table"])
    return tables


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with the tables that it asks for; the summary stays where its sources were not measured."""
    known = {*tables, "summary"}

    def between(mark: re.Match) -> str:
        if mark[1] not in known:
            raise ValueError(f"{mark[1]} is no table; there are {', '.join(sorted(known))}")
        content = tables.get(mark[1])
        return f"<!-- table:{mark[1]} -->\n{content}\n<!-- /table -->" if content else mark[0]

    return MARK.sub(between, page)


def report(out: Path, readme: Path, pictures: Path) -> None:
    """Both pages and all figures."""
    found = results(out)
    check_measures(found, out)
    tables = all_tables(out, found)
    summary.write_page(out, tables)
    if set(found) >= {row.source for row in summary.ROWS}:
        tables["summary"] = summary.table(found)
        print(tables["summary"])
    if readme.exists():
        weights.write_text(readme, fill(readme.read_text(), tables))

    # pictures of the runs, and figures drawn anew
    pictures.mkdir(parents=True, exist_ok=True)
    for result in found.values():
        for name, content in result.get("pictures", {}).items():
            # a name with dots and slashes leads out of the folder
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"a result names a picture {name!r:.80}: it may have letters alone"
                )
            (pictures / f"{name}.png").write_bytes(base64.b64decode(content, validate=True))
    ladder = out / "bench-tiny-ladder.json"
    rows = json.loads(ladder.read_text())["rows"] if ladder.exists() else []
    try:
        figures.plot(found, rows, pictures)
    except ModuleNotFoundError:
        print("figures need: pip install matplotlib (the tables are written)")

"""Tables and figures from results/*.json alone."""

import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine import weights
from lab import metrics, stats, summary
from lab.claims import CLAIMS


def number(x: float | None) -> str:
    return (
        "-"
        if x is None
        else "nan"
        if not math.isfinite(x)
        else f"{x:.0f}"
        if abs(x) >= 1000
        else f"{x:.4g}"
    )


def together(
    claims: Sequence[tuple[float, str, str]],
) -> list[str]:  # p, where it was measured, claim
    """Holm as a table: which claims hold when all of them are asked at once, at 5 %."""
    rows = sorted(claims)
    held = ["holds" if yes else "does not" for yes in stats.holm([p for p, _, _ in rows])]
    return [
        "| command | primary claim | p | with all the others |",
        "|---|---|---|---|",
        *(
            f"| {where} | {claim} | {number(p)} | {said} |"
            for (p, where, claim), said in zip(rows, held, strict=True)
        ),
    ]


def arms(
    found: dict[tuple[str, str], dict[str, float]], against: str
) -> list[str]:  # (claim, arm) -> seed -> value
    """Arms trained several times as a table: every claim by seed, and the difference from the arm `against`, paired by seed."""
    table = [
        "| claim | arm | each seed | mean | difference [95 % over seeds] |",
        "|---|---|---|---|---|",
    ]
    for (name, arm), values in sorted(
        found.items(), key=lambda row: (row[0][0], row[0][1] != against, row[0][1])
    ):
        base = found.get((name, against), {})
        m, half = stats.student([values[seed] - base[seed] for seed in values if seed in base])
        every = sorted(
            {seed for (other, _), seeds in found.items() if other == name for seed in seeds}
        )
        cells = [
            ", ".join(number(values.get(seed)) for seed in every),
            number(sum(values.values()) / len(values)),
        ]
        table.append(
            f"| {name} | {arm} | {' | '.join([*cells, '-' if arm == against else f'{m:+.3g} [{m - half:+.3g}, {m + half:+.3g}]'])} |"
        )
    return table


def claim_table(result: dict) -> str:
    lines = [
        "| claim | where | paper | predicted | measured [95 %] | n | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in result["claims"]:
        span = f" [{', '.join(map(number, c['interval']))}]" if c["interval"] else ""
        got = (
            "not measured"
            if c["value"] is None
            else f"{number(c['value'])}{span} {c['unit']}".rstrip()
        )
        lines.append(
            f"| {c['name']} | {c['where']} | {number(c['paper'])} | {c['predicted'] or '-'} | {got} | {c.get('n', '-')} | {c['verdict']} |"
        )
    return "\n".join([*lines, "", footer(result)])


def raw_table(result: dict) -> str:  # rows and columns as the keys say; means over worlds
    keys = [key.split("/", 1) for key in result["raw"]]
    rows, columns = (list(dict.fromkeys(k[i] for k in keys)) for i in (0, 1))
    mean = lambda x: number(float(np.nanmean(x))) if np.isfinite(x).any() else "nan" if x else ""
    lines = [f"| {' | '.join(['', *columns])} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {' | '.join([r, *(mean(result['raw'].get(f'{r}/{c}', [])) for c in columns)])} |"
        for r in rows
    ]
    return "\n".join([*lines, "", footer(result)])


def footer(result: dict) -> str:
    v, worlds = result["versions"], f"{len(result['worlds'])} {result['split']} worlds"
    return " · ".join(
        [
            f"`{result['command']}`",
            worlds,
            f"{result['machine']}, {result['threads']} threads",
            f"torch {v['torch']}",
            f"{result['date']} UTC",
            *result.get("notes", []),
        ]
    )


def contrast(
    folder: Path, against: str
) -> dict:  # folder/ARM-SEED/*.json; the last command of each kind stands for all
    found, each = {}, {}
    for path in sorted(folder.glob("*-*/*.json")):
        (arm, seed), each[path.stem] = (
            path.parent.name.rsplit("-", 1),
            footer(result := json.loads(path.read_text())),
        )
        for c in (c for c in result["claims"] if c["value"] is not None):
            found.setdefault((f"{c['name']}, {c['unit']}".rstrip(", "), arm), {})[seed] = c["value"]
    said = f"`python evaluate.py compare --out {folder} --against {against}` · each seed: {'; '.join(each.values())}"
    return {"table": [*arms(found, against), "", said]}


def results(out: Path) -> dict[str, dict]:
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(out.glob("*.json"))
        if path.stem in CLAIMS
    }


def report(out: Path, readme: Path, figures: Path) -> None:
    """Rewrite what stands between <!-- table:NAME --> (or NAME:raw, final-NAME) and <!-- /table -->, and the figures, from the json."""
    found, final = results(out), results(out / "final")
    if wrong := [
        m
        for m in metrics.BETTER
        if found.get("sanity", {}).get("raw", {}).get(f"ranks fakes as expected/{m}", [1])[0] < 1
    ]:
        raise ValueError(
            f"{', '.join(wrong)}: ranks fakes wrongly (see {out}/sanity.json), so nothing is reported"
        )
    tables = {
        name: claim_table(result)
        for name, result in [
            *found.items(),
            *((f"final-{name}", result) for name, result in final.items()),
        ]
    }
    others = {
        path.stem: json.loads(path.read_text())["table"]
        for path in (*out.glob("bench-*.json"), *out.glob("compare-*.json"))
    }
    primary = {
        (c["p"], name, c["name"])
        for name, result in (found | final).items()
        for c in result["claims"]
        if c.get("p") is not None
    }
    holm = [
        *together(primary),
        "",
        f"`python evaluate.py report` · {len(primary)} tests, Holm at 5 %, p by bootstrap over worlds",
    ]
    tables |= {f"{name}:raw": raw_table(result) for name, result in found.items()}
    tables |= {name: "\n".join(lines) for name, lines in (others | {"holm": holm}).items()}
    print(tables["holm"])
    summary.write_page(out, tables)
    if set(found) >= {row.source for row in summary.ROWS}:
        tables["summary"] = summary.table(found)
    fill = lambda at: (
        f"<!-- table:{at[1]} -->\n{tables.get(at[1], 'not measured')}\n<!-- /table -->"
    )
    readme.exists() and weights.write_text(
        readme,
        re.sub(r"<!-- table:([\w:-]+) -->.*?<!-- /table -->", fill, readme.read_text(), flags=re.S),
    )
    figures.mkdir(parents=True, exist_ok=True)
    for name, content in (
        pair for result in found.values() for pair in result.get("pictures", {}).items()
    ):
        (figures / f"{name}.png").write_bytes(base64.b64decode(content))
    try:
        plot(
            found,
            json.loads(path.read_text())["rows"]
            if (path := out / "bench-tiny-ladder.json").exists()
            else [],
            figures,
        )
    except ModuleNotFoundError:
        print("figures need: pip install matplotlib (the tables are written)")


def plot(found: dict, ladder: list[list], figures: Path) -> None:
    """Revisits by arm with floors and ceiling; drift by segment; what is looked back at, from above; where the time of a segment goes."""
    import matplotlib.figure  # optional

    for name, source, pattern, label in (
        ("memory", "memory", r"exact, ([^/]+)/psnr", "PSNR of an exact revisit, dB"),
        ("drift", "drift", r"segment \d+/(.+): psnr", "PSNR by segment, dB"),
        ("sharpness", "drift", r"segment \d+/(.+): sharpness", "sharpness by segment, 1 = truth"),
    ):
        axes, curves = (
            (figure := matplotlib.figure.Figure((7, 3))).subplots(subplot_kw={"title": label}),
            {},
        )
        for key, values in sorted(found.get(source, {}).get("raw", {}).items()):
            if at := re.fullmatch(pattern, key):
                curves.setdefault(at[1], []).append(np.mean(values))
        for arm, ys in curves.items():
            axes.barh(arm, ys) if name == "memory" else axes.plot(
                range(1, len(ys) + 1), ys, label=arm
            )
        if curves:
            axes.legend(*axes.get_legend_handles_labels()).set_visible(name != "memory")
            figure.savefig(figures / f"{name}.png", bbox_inches="tight", dpi=110)
    if facts := found.get("retrieval", {}).get("facts"):
        figure, poses, past = (
            matplotlib.figure.Figure((5, 5)),
            np.array(facts["poses"]),
            range(facts["bank"]),
        )
        axes = figure.subplots(
            subplot_kw={
                "title": "the old frames that are looked back at; metres",
                "aspect": "equal",
            }
        )
        axes.pcolormesh(np.array(facts["solid"]).T, cmap="Greys", vmax=2)
        for label, which, colour in (
            ("bank", past, "silver"),
            ("chosen", facts["chosen"], "tab:blue"),
            ("next views", facts["asks"], "tab:red"),
        ):
            x, z, yaw = poses[list(which)].T
            axes.quiver(
                x,
                z,
                np.sin(np.radians(yaw)),
                np.cos(np.radians(yaw)),
                color=colour,
                label=label,
                scale=18,
                width=0.006,
            )
        axes.set(
            xlim=(poses[:, 0].min() - 3, poses[:, 0].max() + 3),
            ylim=(poses[:, 1].min() - 3, poses[:, 1].max() + 3),
        )
        axes.legend(loc="upper right")
        figure.savefig(figures / "retrieval.png", bbox_inches="tight", dpi=110)
    if ladder:  # rows "name: 81.0 ms, ...", the release first; "5 new" makes fewer frames a segment
        times = [
            (row[0].split(":")[0], float(re.search(r": ([\d.]+) ms", row[0])[1]))
            for row in ladder
            if " new:" not in row[0]
        ]
        axes = (figure := matplotlib.figure.Figure((7, 3))).subplots(
            subplot_kw={"title": "ms per segment; green: saved against the release"}
        )
        for name, ms in times:
            axes.barh(name, ms, color="tab:gray")
            axes.barh(name, times[0][1] - ms, left=ms, color="tab:green")
            axes.annotate(f"{ms:.0f} ", (ms, name), va="center", ha="right", color="white")
        axes.invert_yaxis()
        figure.savefig(figures / "ladder.png", bbox_inches="tight", dpi=110)

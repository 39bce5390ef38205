"""What is claimed, and how it is judged."""

import contextlib
import math
from collections import namedtuple
from collections.abc import Callable

import numpy as np

from lab import metrics, stats

Raw = dict[str, list[float]]  # "row/column" -> one value per world
PLACES, PANES = (
    {"exact": 0.0, "0.4 m": 0.4, "0.85 m": 0.85, "1.9 m": 1.9},
    {"Wan2.2": "full", "50 %": "light50", "75 %": "light75"},
)
OUT, GAPS = (
    {"l2:40 w:4 -:12 a:4": "", "l2:40 w:4 -:12 l2:56 s:4 -:28 j2:84": " over 8 W"},
    (0.5, 1, 2, 4, 8),
)  # 60 and 228 actions
OPPOSITE = {
    "forward, back": ("w:3", "s:3", (0, 2), 0.1),
    "left, right": ("a:3", "d:3", (0, 2), 0.1),
    "turn": ("j2:4", "l2:4", (4,), 2.0),
}
# One row: what the paper says, what we predicted ("6-10", ">= 6", "<= 2", "> 0", "" for none), how raw numbers become the measured value
# (None: not here), whether only the paper's digits will do, and whether it is its command's in the table of all primary claims.
Claim = namedtuple(
    "Claim", "name paper predicted unit where measure exact primary", defaults=(None, False, False)
)


def of(column: str, row: str, other: str = "", ratio: bool = False) -> Callable[[Raw], list[float]]:
    """The values of a row, or their paired difference from another row (or ratio to it): both sides come from one run."""
    pairs = lambda raw: zip(raw[f"{row}/{column}"], raw[f"{other or row}/{column}"], strict=True)
    return lambda raw: [x / y if ratio else x - y if other else x for x, y in pairs(raw)]


gain = lambda raw, at, arm: np.subtract(
    raw[f"{at}, {arm}/psnr bank-only"], raw[f"{at}, none/psnr bank-only"]
)  # of every world
C, S, T50, T3 = Claim, "student, 3 steps", "teacher, 50 steps", "teacher, 3 steps"
CLAIMS: dict[str, list[Claim]] = {
    "sanity": [
        C(
            "metrics that rank fakes as expected",
            None,
            ">= 1",
            "",
            "M0",
            lambda r: [r[f"ranks fakes as expected/{m}"][0] for m in metrics.BETTER],
        ),
        *(
            C(
                f"registration of clean frames, median, {u}",
                None,
                f"<= {gate}",
                u,
                "M0",
                lambda r, u=u: np.median(r[f"registration of clean frames/{u}"]),
            )
            for u, gate in (("deg", 0.25), ("m", 0.01))
        ),
    ],
    "memory": [
        *(
            C(
                f"{at}: memory minus none, {what}",
                None,
                f">= {goal}",
                "dB",
                "M1",
                of(column, f"{at}, camera", f"{at}, none"),
                False,
                column.startswith("r") and at == "0.85 m",
            )
            for what, column, goals in (
                ("registered, bank-only", "registered psnr bank-only", (1, 1, 1, 1)),
                ("all pixels", "psnr", (6, 7, 5, 3)),
            )
            for at, goal in zip(PLACES, goals, strict=True)
        ),
        *(
            C(
                f"{at}: memory minus copying",
                None,
                ">= 3" if offset else "",
                "dB",
                "§3.2",
                of("psnr", f"{at}, camera", f"{at}, copy nearest"),
            )
            for at, offset in PLACES.items()
        ),
        *(
            C(
                f"{at}: gain of memory / of the oracle warp, bank-only",
                None,
                ">= 0.5",
                "x",
                "M1",
                lambda r, at=at: gain(r, at, "camera") / np.nanmean(gain(r, at, "oracle warp")),
            )
            for at in PLACES
        ),
        *(
            C(f"{at}: {what}", None, "", unit, "M1", of(column, f"{at}, camera"))
            for at in PLACES
            for what, column, unit in (
                ("pose error of what is drawn", "m", "m"),
                ("lost frames", "lost", ""),
            )
        ),
        *(
            C(
                f"there and back from {start}, 2 W apart: memory minus none",
                None,
                "> 0",
                "dB",
                "M2",
                of(
                    "2 W apart, dB",
                    f"palindrome from {start}, camera",
                    f"palindrome from {start}, none",
                ),
            )
            for start in ("a bank", "one frame")
        ),
        C(
            "there and back over 8 W from a bank: half-life",
            None,
            "",
            "W",
            "M2",
            lambda r: [
                stats.half_life(GAPS, x)
                for x in np.array(
                    [r[f"palindrome over 8 W from a bank, camera/{g} W apart, dB"] for g in GAPS]
                ).T
                - np.mean(r["exact, floor: other world/psnr"])
            ],
        ),
        *(
            C(
                f"there and back from a bank: {what}",
                None,
                goal,
                unit,
                "M3",
                of(column, "palindrome from a bank, camera"),
            )
            for what, column, goal, unit in (
                ("way travelled / commanded", "travelled / commanded", "0.8-1.2", "x"),
                ("from home at the end, m", "m", "<= 0.1", "m"),
                ("degrees", "deg", "<= 2", "deg"),
            )
        ),
        C(
            "exact: VAE ceiling minus memory",
            None,
            "<= 1.5",
            "dB",
            "§3.2",
            of("psnr", "exact, VAE ceiling", "exact, camera"),
        ),
        C(
            "reliance on what is remembered",
            None,
            "> 0",
            "dB",
            "M11",
            of("psnr bank-only", "exact, camera", "exact, zeros"),
        ),
        C(
            "adoption of another world's memory",
            None,
            ">= 0.7",
            "",
            "M11",
            of("adoption", "exact, other world"),
        ),
    ],
    "drift": [
        *(
            C(
                f"in place, memory {said}: slope",
                None,
                goal,
                "dB/100 frames",
                "§3.1",
                of("dB per 100 frames", f"in place, {arm}"),
                primary=said == "on",
            )
            for said, arm, goal in (("on", "camera", ">= -0.5"), ("off", "none", ""))
        ),
        *(
            C(
                f"exploring: sharpness after {n} frames",
                None,
                "0.85-1.15",
                "x",
                "§3.3",
                of(f"sharpness after {n}", "exploring, camera"),
            )
            for n in (256, 640)
        ),
        *(
            C(
                f"exploring: TWFD around frame {n}",
                None,
                "",
                "",
                "M6",
                of("exploring, camera: TWFD", f"segment {-(-n // 40):02d}"),
            )
            for n in (256, 640)
        ),
        C(
            "in place: frames until lost, restricted mean",
            None,
            "",
            "",
            "M4",
            lambda r, m="in place, camera": stats.restricted_mean(
                t := r[f"{m}/frames until lost"], r[f"{m}/lost"], max(t) or 1
            ),
        ),
    ],
    "action": [
        C(
            "true minus shuffled actions",
            None,
            ">= 3",
            "dB",
            "§3.1",
            of("psnr", "true actions", "shuffled actions"),
            primary=True,
        ),
        *(
            C(f"gain: {kind}", None, "0.9-1.1", "x", "M5", of("gain", kind))
            for kind in ("turn", "move")
        ),
        C(
            "KCtrl: opposite keys that both act",
            None,
            ">= 0.9",
            "",
            "M5",
            lambda r: np.mean([r[f"KCtrl/{pair}"] for pair in OPPOSITE], 0),
        ),
        C(
            "keys read off frames: model minus VAE",
            None,
            ">= -0.05",
            "",
            "M5",
            lambda r: np.mean(
                [
                    np.subtract(r[f"keys read: model/{key}"], r[f"keys read: VAE/{key}"])
                    for key in metrics.READ
                ],
                0,
            ),
        ),
    ],
    "ablation": [
        C(name, None, "", unit, "§3", of(*how))
        for name, unit, *how in (
            ("revisit", "dB", "psnr bank-only", "memory"),
            ("revisit, memory switched off", "dB", "psnr bank-only", "no memory"),
            (
                "revisit 800 latents later minus at once",
                "dB",
                "psnr",
                "memory, 800 latents later",
                "memory",
            ),
            *(
                (f"in place, {unit}", "", unit, "in place")
                for unit in ("dB per 100 frames", "grey levels per 100 frames", "frames until lost")
            ),
            ("true minus shuffled actions", "dB", "psnr", "true actions", "shuffled actions"),
            *(
                (f"pose error: {kind}", unit, "relative pose error", kind)
                for kind, unit in (("turn", "deg"), ("move", "m"))
            ),
        )
    ],
    "distill": [
        C(
            "student at 3 steps minus teacher at 50, seen",
            None,
            "-0.5-0.5",
            "dB",
            "§3.3",
            of("psnr seen", S, T50),
            primary=True,
        ),
        C("student minus teacher, both at 3 steps", None, "> 0", "dB", "§3.3", of("psnr", S, T3)),
        C(
            "spread of seeds, unseen: student / teacher at 50",
            None,
            ">= 0.7",
            "x",
            "M6",
            of("rms between seeds, unseen", S, T50, True),
        ),
        C(
            "sharpness: student / teacher at 50",
            None,
            ">= 1",
            "x",
            "M6",
            of("sharpness", S, T50, True),
        ),
        C(
            "sharpness: student / guided teacher at 50",
            None,
            "",
            "x",
            "M6",
            of("sharpness", S, f"{T50}, guided", True),
        ),
        C("TWFD: student / teacher at 50", None, "<= 1.1", "x", "§3.3", of("TWFD", S, T50, True)),
        C(
            "segment time: teacher at 50 / student",
            None,
            "10-17",
            "x",
            "§3.3",
            of("ms per segment", T50, S, True),
        ),
    ],
    "int8": [
        C(
            "velocity SQNR at sigma 0.5",
            None,
            ">= 25",
            "dB",
            "§3.4",
            of("sigma 0.5", "velocity SQNR dB"),
        ),
        C(
            "nearness to float: int8 minus disturbed",
            None,
            ">= 0",
            "dB",
            "M7",
            of("latent SQNR to float, segment 3", "int8", "disturbed"),
            primary=True,
        ),
    ],
    "vae": [
        *(
            C(f"{row}: PSNR", paper, goal, "dB", "Table 2", of("psnr", f"{row}, 33 frames"))
            for row, paper, goal in zip(
                PANES, (33.79, 31.84, 31.14), (">= 30", "", ""), strict=True
            )
        ),
        *(
            C(
                f"{row}: SSIM",
                0.99,
                ">= 0.93" if row == "Wan2.2" else "",
                "",
                "Table 2",
                of("ssim", f"{row}, 33 frames"),
            )
            for row in PANES
        ),
        *(
            C(
                f"{row}: PSNR lost",
                lost,
                f"<= {lost + 0.5:.2f}",
                "dB",
                "Table 2",
                of("psnr", "Wan2.2, 33 frames", f"{row}, 33 frames"),
            )
            for row, lost in (("50 %", 1.95), ("75 %", 2.65))
        ),
        *(
            C(
                f"{row}: streams faster",
                paper,
                goal,
                "x",
                "Table 2",
                of("s for 40 frames", "Wan2.2, streaming", f"{row}, streaming", True),
            )
            for row, paper, goal in (("50 %", 2.53, ">= 2.5"), ("75 %", 5.85, ">= 4"))
        ),
        *(
            C(
                f"{row}: streams 40 frames",
                None,
                f">= {goal}",
                "FPS",
                "§3.4",
                of("FPS", f"{row}, streaming"),
            )
            for row, goal in (("Wan2.2", 400), ("75 %, float32", 100))
        ),
        *(
            C(f"{row}: {what}, 17 frames at 720p", paper, "", "s", "Table 2")
            for what, papers in (
                ("encode + decode", (0.99, 0.52, 0.35)),
                ("decode", (0.76, 0.30, 0.13)),
            )
            for row, paper in zip(PANES, papers, strict=True)
        ),
    ],
    "retrieval": [
        C(
            "coverage@5 of the camera rule",
            None,
            ">= 0.75",
            "",
            "§3.2",
            of("coverage@5", "camera, uniform"),
            primary=True,
        ),
        C(
            "coverage@5: camera minus recent",
            None,
            "> 0",
            "",
            "§3.2",
            of("coverage@5", "camera, uniform", "recent"),
        ),
        C(
            "coverage@5: sampled minus exact overlap",
            None,
            "-0.05-0.05",
            "",
            "§3.4",
            of("coverage@5", "camera, uniform", "camera, exact"),
        ),
    ],
    "rope": [
        C(
            "likeness of distant times, sigma_theta 0.8 minus 0",
            None,
            "<= 0",
            "",
            "Eq. 7",
            of("likeness", "sigma_theta 0.8", "sigma_theta 0.0"),
        ),
        C(
            "revisit 800 latents later minus at once",
            None,
            "-0.5-0.5",
            "dB",
            "§3.2",
            of("psnr", "800 latents later", "0 latents later"),
        ),
    ],
    "moe": [
        C(
            f"{view} person, {what}: experts minus dense",
            None,
            "> 0",
            "dB",
            "§3.5",
            of(column, f"moe-0.9, {view}", f"dense, {view}"),
            primary=what == "revisit",
        )
        for view in ("first", "third")
        for what, column in (("revisit", "psnr"), ("action effect", "true - shuffled actions, dB"))
    ],
    "latency": [
        *(
            C(f"5B, 8+1 GPUs, {w}", fps, "", "FPS", "Table 1")
            for w, fps in (("all", 40.0), ("no INT8", 27.38), ("no GPU retrieval", 6.6))
        ),
        C(
            "no LightVAE: 40 frames in 1.551 s",
            25.79,
            "",
            "FPS",
            "Table 1",
            of("FPS at 1.551 s a segment", "arithmetic"),
            True,
        ),
        C(
            "a 5B segment as released",
            None,
            "905-906",
            "TF",
            "§3.1",
            of("TF as released", "arithmetic"),
        ),
        *(
            C(
                f"{n} latents at once minus 10",
                None,
                "-0.5-0.5",
                "dB",
                "§3.4",
                of("psnr", f"{n} latents at once", "10 latents at once"),
            )
            for n in (5, 2)
        ),
        C(
            "tiny on this machine, one after the other",
            None,
            ">= 200",
            "FPS",
            "§3.4",
            of("FPS, one after the other", "tiny"),
        ),
        C(
            "action to photon: clock / formula",
            None,
            "0.9-1.1",
            "x",
            "M9",
            lambda r: (
                np.mean(r["action to photon at 40 FPS/s by the clock"])
                / r["action to photon at 40 FPS/s by formula"][0]
            ),
        ),
    ],
    "explore": [
        C(
            "256 frames out: sharpness",
            None,
            ">= 0.6",
            "x",
            "M4",
            of("sharpness after 256", "10 at once"),
        ),
        C(
            "640 frames out: sharpness",
            None,
            ">= 0.6",
            "x",
            "M4",
            of("sharpness after 640", "10 at once"),
        ),
        C(
            "256 frames out: sharpness of the VAE",
            None,
            "",
            "x",
            "M4",
            of("sharpness of the VAE after 256", "10 at once"),
        ),
        C(
            "640 frames out: sharpness of the VAE",
            None,
            "",
            "x",
            "M4",
            of("sharpness of the VAE after 640", "10 at once"),
        ),
        C(
            "640 frames out: sharpness, 5 at once",
            None,
            "",
            "x",
            "M4",
            of("sharpness after 640", "5 at once"),
        ),
        C(
            "640 frames out: sharpness, 2 at once",
            None,
            "",
            "x",
            "M4",
            of("sharpness after 640", "2 at once"),
        ),
    ],
}


def judge(claim: Claim, raw: Raw) -> dict:
    """Value, interval and verdict: met, missed, unclear, reported, or not measured."""
    row = {
        name: getattr(claim, name)
        for name in ("name", "paper", "predicted", "unit", "where", "exact", "primary")
    }
    x: list[float] = []
    with contextlib.suppress(KeyError):
        x = [
            v
            for v in np.atleast_1d(claim.measure(raw) if claim.measure else []).tolist()
            if math.isfinite(v)
        ]
    if not x:
        return row | {"value": None, "interval": None, "verdict": "not measured"}
    said, p, interval = stats.verdict(x, claim.predicted)
    said = (
        {True: "met", False: "missed"}[round(sum(x) / len(x), 2) == claim.paper]
        if claim.exact
        else said
    )
    return row | {
        "value": sum(x) / len(x),
        "interval": interval,
        "n": len(x),
        "verdict": said,
        "p": p if claim.primary else None,
    }

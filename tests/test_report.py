"""What report.py promises."""

from lab import report
from lab.claims import CLAIMS, Claim, judge


def test_primary_claims_are_asked_together() -> None:
    claims = [
        Claim(name, None, "> 0", "dB", "", lambda raw, k=name: raw[k], primary=name != "c")
        for name in "abc"
    ]
    raw = {
        "a": [1.0, 1.1, 0.9, 1.2, 1.05, 0.95],
        "b": [-2.0, 3.0, -1.0, 2.0, 0.5, -0.5],
        "c": [1.0, 1.1, 0.9],
    }
    judged = [judge(claim, raw) for claim in claims]
    table = report.together([(c["p"], "x", c["name"]) for c in judged if c["p"] is not None])
    assert any("| a |" in row and row.endswith("| holds |") for row in table)
    assert any("| b |" in row and row.endswith("| does not |") for row in table) and not any(
        "| c |" in row for row in table
    )
    assert sum(c.primary for claims in CLAIMS.values() for c in claims) >= 7

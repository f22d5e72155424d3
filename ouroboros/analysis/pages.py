"""The claims as pages: claims.md of a profile, README's table, docs/claims.md, one claim for the command line.

No torch.
"""

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.learning_rates import search_of
from .claims import REPORTED_SCALE, SMALL_SHARE, VALUES, Verdict, find, records, with_runs
from .comparisons import NORMS_NEAR
from .ledger import PAPER_RANK, Claim, numbers, read_claims
from .results import Results
from .statistics import MARGIN, MARGIN_SHARE, margin

SMOKE = "**smoke: not a result.** "
SOURCES = ("A: the paper's abstract; R: README of the authors' release; C: its code; D: a third "
           "party's digest of the full text, secondary where it is alone")
RULES = {  # as docs/claims.md says them
    "value": "the reported value, at profile `paper` only",
    "positive": "above 0 in every part",
    "negative": "below 0 in every part",
    "small": f"within {100 * SMALL_SHARE:g} % of the Controller's loss reduction",
    "count": "exact, counted on the model",
}


def _on_signs(found: pd.DataFrame) -> pd.Series:
    """Which rows are of claims on signs, orders and trends."""
    return ~found["id"].isin([claim.id for claim in read_claims() if claim.rule in VALUES])


def _side_by_side(found: pd.DataFrame, results: Results, key: list[str], values: str) -> pd.DataFrame:
    """A column of the rows with protocols side by side, in the ledger's order."""
    order = found.drop_duplicates("id").set_index(key).index
    return found.pivot(index=key, columns="protocol", values=values).loc[order, [*results.profile.protocols]]


def summary(*several: Results) -> str:
    """The verdicts on signs, orders and trends as a short table, one row a claim, for one profile or several side by
    side; without those that no profile has run yet."""
    tables = []
    for results in several:
        found = with_runs(results).copy()
        found.loc[found["diverged"] != "", "verdict"] += " (a run diverged)"
        name = f"{results.profile.name}, " if len(several) > 1 else ""
        tables.append(_side_by_side(found[_on_signs(found)], results, ["id", "claim"], "verdict").add_prefix(name))
    both = pd.concat(tables, axis=1)
    run = ~both.isin([Verdict.NO_RUNS, Verdict.NOT_PLANNED]).all(axis=1)
    return both[run if run.any() else slice(None)].reset_index().drop(columns="id").to_markdown(index=False)


def markdown(results: Results) -> str:
    """The whole of claims.md: verdicts in a small table, a section a claim on signs and trends, values folded away."""
    made = results.cells.drop_duplicates("run")["status"].value_counts()
    counts = ", ".join(f"{made[s]} {s}" for s in ("finished", "diverged", "missing") if s in made)
    mark = SMOKE if results.profile.name == "smoke" else ""
    searched = search_of("controller", None, results.profile)[0].depth
    found, near = with_runs(results), NORMS_NEAR
    signs = found[_on_signs(found)]
    verdicts = _side_by_side(signs, results, ["id"], "verdict").reset_index()
    verdicts["id"] = [f"[{name}](#{name})" for name in verdicts["id"]]
    return "\n".join([
        f"# Claims at profile `{results.profile.name}`", "",
        f"{mark}Generated from the raw logs; runs of the matrix: {counts}. Sources: {SOURCES}. Measured values are "
        f"means over seeds with paired 95 % intervals, nats per token unless said otherwise; the intervals cover "
        "training seeds and, of losses on held-out text, evaluation documents (docs/statistics.md), but those of a "
        "spread over configurations seeds alone; where nothing was trained, seeds draw text. "
        f"Under `corrected` an arm trains at the rates that are best on `dev` at depth {searched} with a spare seed. "
        f"Step norms are far from the stream's size where their mean weight ended below {near[0]:g} or above "
        f"{near[1]:g} times its root mean square. The rules, `ouroboros/analysis/claims.yaml`, were written before the "
        "runs but for what is dated there. Every row as data: [tables/claims.csv](tables/claims.csv).", "",
        verdicts.to_markdown(index=False, disable_numparse=True), "",
        *(_section(rows) for _, rows in signs.groupby("id", sort=False)),
        "## Values of the paper's own model", "",
        f"They are judged at profile `{REPORTED_SCALE}` only; what was measured here stands beside them.", "",
        "<details><summary>all of them</summary>", "",
        _values(found[~_on_signs(found)]).to_markdown(index=False, disable_numparse=True), "", "</details>", ""])


def _section(rows: pd.DataFrame) -> str:
    """A claim: what is reported, and under each protocol the verdict, what was measured, why, the runs."""
    first = rows.iloc[0]
    lines = [f"## {first['id']}", "", f"{first['claim'][0].upper()}{first['claim'][1:]}. Reported: {first['reported']} "
             f"(source {first['source']}).{_difference(find(first['id']))}", ""]
    for row in rows.itertuples():
        measured = f" {row.measured}." if row.measured not in ("", row.verdict) else ""
        lines += [f"- **`{row.protocol}`: {row.verdict}.**{measured} {row.why[0].upper()}{row.why[1:]}."]
        if row.runs:
            links = ", ".join(f"[{name}](runs/{name}.jsonl)" for name in row.runs.split())
            # blank lines: inside of an HTML block links wouldn't be links
            count = len(row.runs.split())
            lines += ["", f"  <details><summary>read: {count} run{'s' * (count != 1)}</summary>", "", f"  {links}", "",
                      "  </details>"]
    return "\n".join([*lines, ""])


def _difference(claim: Claim) -> str:
    """Of what a claim's measured differences are."""
    measure = claim.measure
    if measure is None or not measure.minus and measure.statistic == "loss":
        return ""
    what = " minus that of ".join(f"`{arm}`" for arm in (measure.arm, measure.minus) if arm)
    statistic = "" if measure.statistic == "loss" else f", its {measure.statistic}"
    return f" What is measured: the loss of {what}{statistic}."


def _values(rows: pd.DataFrame) -> pd.DataFrame:
    """The absolute values, protocols side by side."""
    shown = rows["measured"].where(rows["measured"] != "", rows["why"])
    plain = rows["verdict"].eq(Verdict.NOT_TESTABLE) | (rows["verdict"] == shown)
    cells = rows.assign(cell=shown.where(plain, rows["verdict"] + ": " + shown))
    first = rows.drop_duplicates("id").set_index("id")[["claim", "reported", "recomputed", "source"]]
    return first.join(cells.pivot(index="id", columns="protocol", values="cell")).reset_index()


def one(name: str, results: Results) -> str:
    """A claim of one profile as text: what is reported, the rule, its formula, verdicts, and the runs behind them.
    Raises InputError for an id that no claim has."""
    claim = find(name)
    rows = records(claim, results)
    lines = [f"{claim.id}: {claim.what}", f"reported: {claim.reported_text}; source {claim.sources}",
             f"judged by: {_judged_by(claim)}; rule: {RULES[claim.rule]}"]
    if rows[0]["recomputed"] and claim.recompute.of:
        lines.append(f"formula: {claim.recompute.function} of {', '.join(claim.recompute.of)}; of the reported values "
                     f"{rows[0]['recomputed']}")
    for row in rows:
        lines += [f"\n{row['protocol']}: {row['verdict']}", f"  measured: {row['measured'] or 'nothing'}",
                  f"  why: {row['why']}", *(f"  results/{results.profile.name}/runs/{run}.jsonl"
                                            for run in row["runs"].split())]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- sheet

def sheet() -> pd.DataFrame:
    """What will be judged and how, before any run: one row a claim, nothing measured."""
    rows = [{"id": claim.id, "claim": claim.what, "source": claim.sources,
             "reported": claim.reported_text, "open": claim.unsupported or claim.open or "",
             "judged by": _judged_by(claim), "rule": RULES[claim.rule], "margin": _margin(claim)}
            for claim in read_claims()]
    return pd.DataFrame(rows)


def _judged_by(claim: Claim) -> str:
    """The arms and runs that a claim's measure reads."""
    measure = claim.measure
    if measure is None:
        return f"nothing yet: {claim.unmeasured}" if claim.unmeasured else "the model, not trained"
    arms = ", ".join(f"`{arm}`" for arm in measure.arms)
    if not any(arm not in ARMS or ARMS[arm].loops for arm in measure.arms):
        return arms
    where = [f"depth {measure.depth}" if measure.depth else "",
             f"rank {measure.rank} (base rank {PAPER_RANK})" if measure.rank else "", measure.places]
    return f"{arms}; {', '.join(filter(None, where)) or 'base depth'}"


def _margin(claim: Claim) -> str:
    if claim.rule == "count":
        return "none"
    share = {"reduction": ", in % of the cut model's loss", "recovery": ", in % of the gap"}
    function = claim.recompute.function if claim.recompute else ""
    return f"min({MARGIN:g} nats, {100 * MARGIN_SHARE:g} % of the gap){share.get(function, '')}"


def sheet_markdown() -> str:
    """The whole of docs/claims.md."""
    reported = numbers(read_claims())
    gap = float(reported["L17"] - reported["L36"])
    return f"""# What the paper claims, and how each claim is judged

Made from `ouroboros/analysis/claims.yaml` by `pages.sheet_markdown()`, before and without any run; verdicts
are in `results/<profile>/claims.md`.

- **Source.** {SOURCES}.
  Numbers have the digits of their source.
- **Open.** What no source states about a claim, or why no reported number stands behind it.
- **Judged by.** The arms whose runs are read, each seed paired with itself. Without a depth, the
  profile's base depth; ranks are the paper's, a profile has the same shares of its base rank.
- **Rule.** A sign holds where every part's 95 % interval lies on its side, and fails where one lies
  on the other after Holm's correction over the parts; fewer than three trained seeds judge nothing.
  Where the protocol makes one run of all depths, what a claim says of one arm at a depth, or at
  different depths, is `by construction`.
- **Margin.** Two losses closer than the smaller of {MARGIN:g} nats per token and
  {100 * MARGIN_SHARE:g} % of the gap (cut - full) count as equal; {MARGIN:g} nats where the gap is
  undefined. At the reported gap of {gap:.3f} nats that is {margin(gap):g} nats. A sign whose every
  90 % interval lies within it holds, or fails, `within the margin`; one that is left open so is
  `equivalent`.

{sheet().to_markdown(index=False, disable_numparse=True)}
"""

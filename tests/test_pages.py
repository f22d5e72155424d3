"""What README and docs state as numbers is computed again: from profiles, benchmarks, the ledger and the code.

Not checked, since nothing here can know them: minutes and memory of a command, sizes of downloads, docs/log.md (dated),
what a source reports, and the coverage in docs/statistics.md, which `tests/helpers/simulate_coverage.py` prints.
docs/claims.md is generated, and compared by test_ledger.
"""

import math
import re
from pathlib import Path

import drift
import pandas as pd
import pytest

from ouroboros import reproduce
from ouroboros.analysis import ledger, reported, statistics, tables
from ouroboros.errors import AGAIN
from ouroboros.experiment import cost, forecast
from ouroboros.experiment import protocol as protocol_
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.profile import load_profile
from ouroboros.log import read_run
from ouroboros.training import rescore, resume, run, trainer

ROOT = Path(__file__).resolve().parents[1]
FIRST = 200, 3e-3  # updates and rate of `tiny-first`
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def bench(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / f"results/bench/{name}.csv")


def listed(values, digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def tokens(profile) -> int:
    """Tokens that a run trains on."""
    return profile.training.updates * profile.training.tokens_per_update


def sentences() -> list[tuple[str, str]]:
    """(page, what stands on it, its numbers computed)."""
    smollm2, tiny, small, paper = map(load_profile, ("smollm2", "tiny", "small", "paper"))
    layers = smollm2.base.model["num_hidden_layers"]
    kept = smollm2.split.prelude + 1 + smollm2.split.coda
    told = {claim.id: claim for claim in ledger.read_claims()}
    narrow = f"{tiny.base.model['num_hidden_layers']} layers of width {tiny.base.model['hidden_size']}"
    words = pd.read_csv(ROOT / "results/smollm2/last_word.csv").set_index("model")
    share = (100 * words["accuracy"]).round().astype(int)
    loops = share[[name for name in share.index if " at depth " in name]]
    return [
        ("README.md", "the full model finds [the last word](results/smollm2/last_word.md) of "
                      f"{share[ARMS['full'].label]} % of {words['n'].max()} sentences, LoRA of "
                      f"{share[ARMS['lora'].label]} %, no loop of more than {loops.max()} %"),
        ("README.md", f"train on {tokens(paper) / tokens(smollm2):,.0f} times the"),
        ("README.md", f"wins back {told['rec'].reported} % of what cutting cost"),
        ("README.md", f"cut from {layers} layers to {kept}"),
        ("README.md", f"the {round(tokens(smollm2), -3):,} tokens that a run sees"),
        ("README.md", f"`tiny` ({narrow})"),
        ("README.md", f"[{NUMBERS[len(protocol_.SWITCHES)]} settings](docs/protocol.md)"),
        ("README.md", f'prelude["prelude: {paper.split.prelude} layers, frozen"]'),
        ("README.md", f'coda["coda: {paper.split.coda} layers, frozen"]'),
        *artifact(), *scale(smollm2, narrow, small, paper), *model(paper), *protocol(paper), *system(paper),
        ("docs/statistics.md", f"the smaller of {statistics.MARGIN:g} nats and 1 % of the gap"),
        ("docs/CONTRIBUTING.md", f"differs by more than {run.RERUN_TOLERANCE} nats per token"),
    ]


def artifact() -> list[tuple[str, str]]:
    other = bench("instructions")
    assert not other["runs that end otherwise"].any()
    apart = other[other["beyond"] > 0]
    assert set(zip(apart["arm"], apart["purpose"])) == {("cut_coda_full", "matrix"), ("lora", "rate")}
    agree = other["losses"].sum() - apart["beyond"].sum()
    return [("docs/artifact.md", f"{agree:,} of {other['losses'].sum():,} final losses agree within "
                                 f"{run.RERUN_TOLERANCE} nats per token; the others, at most "
                                 f"{apart['largest'].max():.3f} apart"),
            ("docs/artifact.md", f"{-round(math.log10(reproduce.DIGITS))} significant digits"),
            ("docs/artifact.md", f"else {run.RERUN_TOLERANCE} nats per token"),
            ("docs/artifact.md", f"{rescore.TOLERANCE:.0e}".replace("e-03", "e-3") + " nats per token of a block")]


def scale(smollm2, narrow: str, small, paper) -> list[tuple[str, str]]:
    """The table of profiles, and what a run may lose."""
    speed = forecast.Speed(paper.resources.teraflops * 1e12, paper.resources.teraflops * 1e12, "")
    runs = paper.runs()
    hours = sum(forecast.seconds(spec, paper, speed) for spec in runs) / 3600
    shape = "{num_hidden_layers} layers of width {hidden_size}"
    smoke = load_profile("smoke")
    cells = [f"{smoke.base.model['num_hidden_layers']} layers | docstrings of {len(smoke.corpus.packages)} packages",
             f"{narrow} | docstrings of {len(load_profile('tiny').corpus.packages)} packages",
             f"SmolLM2-135M-Instruct, {shape.format(**smollm2.base.model)}, dequantised from 4 bits | docstrings of "
             f"{len(smollm2.corpus.packages)} packages",
             f"{shape.format(**small.base.model)} | sources",
             f"by count {float(f'{hours:.3g}'):,.0f} H100-hours for {len(runs)} runs at an assumed "
             f"{paper.resources.teraflops:g} TFLOP/s",
             f"(36 layers split {paper.split.prelude}/1/{paper.split.coda}", f"at most {resume.SECONDS:.0f} s old",
             f"exits with code {AGAIN}", f"{NUMBERS[round(trainer.EXPLODED)]} times that of a guess"]
    return [("docs/scale.md", cell) for cell in cells]


def model(paper) -> list[tuple[str, str]]:
    """Defaults, and what `make bench` measured."""
    updates, words, svd, decoding = map(bench, ("updates", "vocabulary", "svd", "generation"))
    saved, converted = bench("checkpoints").set_index("trained tensors of"), bench("conversion")
    svd = svd[svd["spectrum"].str.startswith("residual")]
    slower = 1 / updates["without modulation / ours"]
    memory = words["ours peak MB"] / words["plain peak MB"]
    cells = [
        f"n_prelude={paper.split.prelude}, recurrent_layer={paper.split.recurrent}, n_coda={paper.split.coda}, rank="
        f"{paper.rank}` are the paper's, for {paper.base.model['num_hidden_layers']} layers",
        f"depth {', '.join(map(str, updates['depth']))} | a plain implementation, frozen weights without gradients too "
        f"| {listed(updates['plain / ours'])} times the speed; the first two may be none (spread "
        f"{updates['plain / ours min'].min():.2f} to {updates['plain / ours max'][:2].max():.2f})",
        f"every weight trained | {listed(updates['base / ours'])} times the speed",
        f"{' and '.join(f'{x:.1f}' for x in words['plain / ours'])} times faster; peak memory "
        f"{' and '.join(f'{x:.2f}' for x in memory)} of its",
        f"{slower.min():.2f} to {slower.max():.2f} times the time |",
        f"a checkpoint every {resume.SECONDS:.0f} s | the run | {saved.loc['tiny', '% of a run']:.1g} % at `tiny`, "
        f"{saved.loc['paper', '% of a run']:.2g} % with",
        f"rank {' and '.join(map(str, svd['rank']))} | full SVD | "
        f"{' and '.join(f'{x:.0f}' for x in svd['times faster'])} times faster; error "
        f"{' and '.join(f'{x:.2f} %' for x in svd['error above the optimum %'])} above",
        f"a checkpoint of {converted['checkpoint MB'][0] / 1000:.1f} GB",
        f"kept layers + 4 more: {converted['kept + 4 layers MB'][0]:.0f} MB | at most "
        f"{converted['peak net of imports MB'].max():.0f} MB at the peak, beyond",
        f"{decoding['times faster'].iloc[0]:.1f} times faster at depth {decoding['depth'].iloc[0]}, "
        f"{decoding['times faster'].iloc[-1]:.1f} times at depth {decoding['depth'].iloc[-1]}"]
    drafts = bench("drafts")
    assert (drafts["same text"] == drafts["prompts"]).all()
    drafts = drafts.set_index(["profile", "drafts by"]).sort_index()
    (own, lookup), (tinys, tinys_lookup) = ([drafts.loc[name, way] for way in ("the same at depth 1", "prompt lookup")]
                                            for name in ("smollm2", "tiny"))
    assert (own["times faster"] < 1).all() and (tinys["times faster"] < 1).all()  # it didn't pay in any case tried

    def speeds(rows) -> list[str]:
        rows = [rows[rows["checkpoint"].str.startswith(arm)].iloc[0] for arm in ("controller", "static", "none")
                if rows["checkpoint"].str.startswith(arm).any()]
        return [f"{row['times faster']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in rows]

    page = " ".join((ROOT / "docs/model.md").read_text().split())
    said = page[page.index("- **Draft.**"):page.index("## Families")]
    assert re.findall(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", said) == speeds(own) + speeds(tinys) + speeds(lookup)
    assert re.findall(r"(\d+) % ", said) == [
        f"{rows[rows['checkpoint'].str.startswith(arm)]['accepted %'].iloc[0]:.0f}"
        for rows in (own, tinys) for arm in ("controller", "static", "none")
        if rows["checkpoint"].str.startswith(arm).any()]
    cells += [f"at {both(tinys_lookup['times faster'][:2], 1)} times on tiny"]
    ends = {arm: read_run(ROOT / f"results/smollm2/runs/{arm}-corrected-s0.jsonl").last("heldout", "loss_t+1")
            for arm in ("controller-d1-r32", "static-d1-r32", "none-d1", "controller_matched-d1-r32",
                        "static_matched-d1-r32", "none_matched-d1")}
    worse = [loss - ends[arm.replace("_matched", "")] for arm, loss in ends.items() if "_matched" in arm]
    cells += [f"on one seed it ends {min(worse):.2f} to {max(worse):.2f} nats above norms that begin at one"]
    return [("docs/model.md", cell) for cell in cells]


def both(values, digits: int) -> str:
    """Controller's and table's."""
    return " and ".join(f"{value:.{digits}f}" for value in values)


def protocol(paper) -> list[tuple[str, str]]:
    updates, rate = FIRST
    reach = protocol_.travel(rate, updates, "cosine")
    stream = 50 * paper.training.micro_batch * paper.training.block / tokens(paper)
    deep = read_run(ROOT / "results/smollm2/runs/controller-d8-r32-corrected-s0.jsonl")
    rms, norms = (deep.last("model", name) for name in ("stream_rms", "step_norm"))
    return [("docs/protocol.md", f"could have travelled {deep.manifest['travel']['elementwise']:.1f} to a stream of "
                                 f"{min(rms):.1f} to {max(rms):.1f}, and the Controller's ended at {min(norms):.1f} to "
                                 f"{max(norms):.1f} on average"),
            ("docs/protocol.md", f"is {reported.PEAK * paper.training.updates:.1f} ({paper.training.updates:,} updates "
                                 "at 3e-4)"),
            ("docs/protocol.md", f"norms could travel {reach:.1f} and"),
            ("docs/protocol.md", f"The start of the stream is {100 * stream:.2f} % of")]


def system(paper) -> list[tuple[str, str]]:
    """What the paper's shape implies."""
    shape, counted = paper.base.model, cost.Cost.of(paper, "controller").trainable()
    static = cost.Cost.of(paper, "static").trainable()
    total = sum(counted.values())
    whole = tokens(paper)
    cells = [
        f"{shape['num_hidden_layers']} layers of width {shape['hidden_size']}, {shape['num_attention_heads']} query "
        f"and {shape['num_key_value_heads']} key/value heads, an MLP of {shape['intermediate_size']:,}, a vocabulary "
        f"of {shape['vocab_size']:,}",
        f"the first {paper.split.prelude} layers (prelude), layer {paper.split.recurrent} (recurrent) and the last "
        f"{paper.split.coda} (coda)",
        f"{shape['num_hidden_layers'] - paper.split.prelude - 1 - paper.split.coda} layers are removed",
        f"the start g = {1 / (1 + math.exp(2)):.3f}",
        f"Controller {counted['modulation']:,}, gate {counted['gate']:,}, step norms of {paper.max_steps} steps "
        f"{counted['step_norm']:,}, together {total:,}, which is the reported {total / 1e6:.1f} million; the gate is "
        f"{100 * counted['gate'] / total:.0f} % of them",
        f"({paper.max_steps * 7 * paper.rank:,} at rank {paper.rank}, zeros at the start), the same gate and norms: "
        f"{sum(static.values()):,}",
        f"with them the released total is {total + reported.UNUSED:,}",
        f"{reported.MICRO_STEPS:,} micro-steps, which are {reported.UPDATES:,} updates of "
        f"{whole // reported.UPDATES:,} tokens, {whole:.2e} in all".replace("e+09", "e9")]
    return [("docs/system.md", cell) for cell in cells]


def plain(text: str) -> str:
    return " ".join(text.split())


def faults(pages: dict[str, str]) -> list[str]:
    """What a page should state and doesn't."""
    found = {page: plain(text) for page, text in pages.items()}
    return [f"{page}: '{plain(sentence)}' isn't there" for page, sentence in SENTENCES
            if plain(sentence) not in found[page]]


SENTENCES = sentences()
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in dict(SENTENCES)}


def test_the_pages_state_what_is_computed():
    assert faults(PAGES) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_changed_number_of_a_page_is_named(page):
    text = plain(PAGES[page])
    for _, sentence in filter(lambda stated: stated[0] == page, SENTENCES):
        start = text.index(plain(sentence))
        for match in re.finditer(r"\d+(?:\.\d+)?", plain(sentence)):
            a, b = start + match.start(), start + match.end()
            changed = text[:a] + drift.other(text[a:b]) + text[b:]
            assert f"{page}: '{plain(sentence)}' isn't there" in faults(PAGES | {page: changed})


def test_a_brief_table_can_lay_one_columns_values_side_by_side():
    frame = pd.DataFrame([{"arm": arm, "text": kind, "loss": mean, "loss_low": mean - 0.1, "loss_high": mean + 0.1,
                           "loss_n": 3} for arm, kind, mean in
                          [("static", "train", -2.0), ("static", "foreign", -1.0), ("controller", "foreign", -0.5)]])
    shown = tables.brief(frame, {"arm": "arm", "text": "text", "loss": "arm - cut", "loss_n": "seeds"}, across="text")
    assert list(shown) == ["arm", "seeds", "train", "foreign"], "rows and columns as they came, not by the alphabet"
    assert shown["foreign"].tolist() == ["-1.00 [-1.10, -0.90]", "-0.50 [-0.60, -0.40]"]
    assert shown["train"].tolist()[0] == "-2.00 [-2.10, -1.90]" and pd.isna(shown["train"].tolist()[1])

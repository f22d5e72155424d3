"""README's first screen: the answer, a table of questions for several profiles, the paper's claims. Never imports
torch. Every sentence is a template; where a direction can flip, both are written."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from ..experiment.arms import ARMS
from ..experiment.cost import Cost
from . import pages, reported, text
from .claims import Verdict
from .comparisons import DRAWN, Comparisons, by_protocol
from .results import Results, shown_depth
from .statistics import (
    BETTER,
    EQUIVALENT,
    FEWEST,
    NOT_JUDGED,
    UNDECIDED,
    WORSE,
    Interval,
    family,
    interval,
    minus,
    verdicts,
)
from .tables import searched_difference, sized


class Question(NamedTuple):
    """What a reader asks, as a difference of losses, an arm's minus another's, and what its sign says."""

    text: str
    arm: str
    other: str
    lower: str
    higher: str
    notebook: str
    at: int | None = None  # the other's depth; None: the arm's
    also: tuple[str, str, str] | None = None  # two more arms, and what their difference shows, said beside it
    searched: bool = False  # said beside it too: between what the rates that were searched move it


QUESTIONS = (
    Question("Is the loop better than just cutting?", "controller", "cut", "Yes", "No, worse", "02_gap"),
    Question("Is the loop better than LoRA on the cut model, with as many trained parameters?", "controller", "lora",
             "Yes", "No, worse", "07_instead"),
    Question("Is the loop better than counting pairs of tokens in the text that it was trained on?", "controller",
             "bigram_seen", "Yes", "No, worse", "02_gap"),
    Question("Do passes after the first help?", "controller", "controller", "Yes", "No, worse", "02_gap", at=1),
    Question("Is the Controller better than a learned table?", "controller", "static", "Yes", "No, worse",
             "03_controller_vs_static", searched=True),
    Question("Is the whole system better than its gate alone, without modulation and step norms?", "controller",
             "none_nonorm", "Yes", "No, worse", "06_parts"),
    Question("Is the Controller better than a table of its own size?", "controller", "static_wide", "Yes", "No, worse",
             "06_parts"),
    Question("Does what the Controller reads matter, or does a constant do?", "controller", "controller_blind",
             "Yes, better than a constant", "No, a constant is better", "06_parts"),
    Question("Does a loop without modulation need its step norms, which begin at 1?", "none", "none_nonorm",
             "Yes, better with them", "No, better without", "06_parts", also=("none_matched", "none",
             "With norms begun at the stream's size, at rates searched for norms that begin at 1, its loss is")),
    Question("Does the loop, with its step norms, need its gate?", "controller", "controller_nogate",
             "Yes, better with it", "No, better without", "04_gate", also=("none_nogate", "none",
             "Without modulation, what leaves the gate out has a loss")),
)
OPENING = {  # by the verdicts on the first two questions: loop against cut, loop against LoRA
    (BETTER, WORSE): "Partly. The loop wins back {loop} of what cutting cost{once}, and plain LoRA on the cut model, "
                     "with as many trained parameters, {lora}{foreign}.",
    (BETTER, BETTER): "Yes. The loop wins back {loop} of what cutting cost{once}, and plain LoRA on the cut model, "
                      "with as many trained parameters, {lora}{foreign}.",
    (BETTER, UNDECIDED): "The loop wins back {loop} of what cutting cost{once}. Against plain LoRA on the cut model, "
                         "with as many trained parameters, nothing is decided.",
    (WORSE, WORSE): "No. The loop ends above the model that was cut and left alone, and plain LoRA on the cut model, "
                    "with as many trained parameters, wins back {lora} of what cutting cost.",
}
BESIDE = {"static": "a table in the Controller's place", "none_nonorm": "the gate alone",
          "bigram_seen": "counting pairs of tokens in the text that a run sees",
          "bigram": "counting them in the whole training split"}
OPEN = {EQUIVALENT: "Equivalent", UNDECIDED: "No detectable difference"}
DIVERGED = "no loss: a run diverged"
OTHERWISE = "The table says what is known so far."


def page(*several: Results) -> str:
    """The first screen, for the first profile, with the others beside it."""
    first = several[0]
    name, depth = first.profile.name, shown_depth(first)
    planned = {purpose: [run.id for run in first.profile.runs() if run.purpose == purpose]
               for purpose in ("matrix", "rate")}
    made, searched = (f"{sum(run in first.runs for run in ids)} of {len(ids)}" for ids in planned.values())
    return "\n".join([
        paper_said(), "",
        f"**Does it work?** {opening(first)} (`{name}`, protocol `corrected`, depth {depth}, held-out text.)", "",
        f"![{text.shown_overview(first)}](figures/{name}/overview.png)", "",
        questions(*several).to_markdown(index=False, disable_numparse=True), "",
        "Sizes are differences of held-out loss in nats per token, with 95 % intervals over n seeds and the documents "
        "scored. The gap is what cutting costs; more than all of it can be won back, since the "
        f"full model was not trained further on this text{adapted(first)}. {at_what_cost(first)}{on_more_tokens(first)}"
        f"`{name}`: {made} planned runs are there, and {searched} searches of rates. {why_released(first)}",
        "", "## The paper's claims", "",
        f"{pages.summary(*several)}", "",
        f"Depths: {'; '.join(_depths(found) for found in several)}. *Holds*: our runs say what the paper says. "
        "*Fails*: they say the opposite. *Undecided*: too few seeds, or an interval that leaves it open. Under "
        "`corrected` the first and the last row are one measurement. Reasons, sizes, and the claims that "
        "can't be tested at these scales: "
        + ", ".join(f"[{found.profile.name}](results/{found.profile.name}/claims.md)" for found in several) + "."])


def _depths(results: Results) -> str:
    """The depths of the claims, of each column where they differ."""
    found = {" ".join(map(str, each.depths_of("controller"))): each.protocol for each in by_protocol(results)}
    said = [depths + (f" under `{protocol}`" if len(found) > 1 else "") for depths, protocol in found.items()]
    drawn = f" (its Controller has {DRAWN})"
    said = [each + (drawn if each.endswith("`released`") else "") for each in said]
    return f"{', '.join(said)} in `{results.profile.name}`"


def opening(results: Results) -> str:
    """Whether the method works, in a few sentences."""
    found, depth = Comparisons(results, "corrected"), shown_depth(results)
    words = tuple(_direction(judged(found, question)[1].get(depth, UNDECIDED)) for question in QUESTIONS[:2])
    if words not in OPENING:
        return OTHERWISE
    loop, lora, first = (_recovered(found, arm, at) for arm, at in
                         (("controller", depth), ("lora", depth), ("controller", 1)))
    once = f" ({first} with a single pass)" if depth > 1 and found.loss("controller", 1) else ""
    beside = [f"{what} {_recovered(found, arm, depth)}" for arm, what in BESIDE.items() if found.loss(arm, depth)]
    said = OPENING[words].format(loop=loop, lora=lora, once=once, foreign=foreign_share(results))
    return said + (f" For comparison: {'; '.join(beside)}." if beside else "")


def _recovered(found: Comparisons, arm: str, depth: int) -> str:
    """The share of the gap that an arm wins back, and of how few seeds that is."""
    share = interval(found.recovery(arm, depth))
    few = ARMS[arm].fit != "none" and share.n < FEWEST
    return f"{share.mean:.0f} %" + (f" (n = {share.n})" if few else "")


def paper_said() -> str:
    """What the paper's own numbers allow, by their arithmetic alone."""
    checked = reported.table().set_index("quantity")["recomputed"]
    full, cut = (checked[f"{name} model, passages - abstract"] for name in ("full", "cut"))
    return (f"**Are the paper's numbers true?** Their arithmetic is right: {checked['loss reduction, depth 8']} and "
            f"{checked['gap recovery, depth 8']} follow from the losses that it reports. What these losses mean is "
            "doubtful. The authors' code scores the full model on the next token and all others on the one after it; "
            "whether the numbers come from that code isn't known. From the abstract's losses to those of 12 other "
            f"passages the full model's changes by {full}, the cut model's by {cut}; on these passages, the only "
            "text known to be the same for all three losses, gap recovery is "
            f"{checked['gap recovery on the passages']}. The evidence for the gate is, by the code, of another system, "
            "an intact model. "
            "[The arithmetic](results/smollm2/notebooks/01_target.ipynb). We had the abstract, the authors' README and "
            "code, and a third party's digest, [not the full text](docs/system.md).")


def adapted(results: Results) -> str:
    """Half a sentence: what the full model itself wins back by LoRA."""
    found = Comparisons(results, "corrected")
    return f" (with LoRA it wins back {_recovered(found, 'full_lora', 1)})" if found.loss("full_lora") else ""


def at_what_cost(results: Results) -> str:
    """What a token costs loop and LoRA, in percent of the full model's FLOPs; nothing where the loop wasn't run."""
    profile, depth = results.profile, shown_depth(results)
    if not Comparisons(results, "corrected").loss("controller", depth):
        return ""

    def flops(arm: str, depth: int = 1) -> float:
        return Cost.of(profile, arm).forward(depth, profile.training.block)

    share = {name: f"{100 * each / flops('full'):.0f} %" for name, each in (
        ("loop", flops("controller", depth)), ("once", flops("controller")), ("lora", flops("lora")))}
    once = f" ({share['once']} with a single pass)" if depth > 1 else ""
    return (f"A token costs the loop {share['loop']} of the full model's FLOPs{once}, the cut model with LoRA "
            f"{share['lora']}. ")


def foreign_share(results: Results) -> str:
    """Half a sentence: what loop, LoRA and counts win back on text of sources never trained on."""
    found, depth = Comparisons(results, "corrected"), shown_depth(results)
    loop, lora, pairs = (
        interval(found.share(found.difference("cut", arm, depth=depth, column="foreign"), "foreign")).mean
        for arm in ("controller", "lora", "bigram_seen"))
    if not math.isfinite(loop + lora):
        return ""
    beside = f" (counts of token pairs {pairs:.0f} %)" if math.isfinite(pairs) else ""
    return f"; on text of packages that no run saw, {loop:.0f} and {lora:.0f} %{beside}"


def on_more_tokens(results: Results) -> str:
    """What a single pass and LoRA win back of what cutting cost with the most tokens that they were trained on."""
    own, most = results.profile.training.updates, max(results.profile.budgets)
    once, lora = (interval(Comparisons(results, "corrected", updates=most).recovery(arm, 1))
                  for arm in ("controller", "lora"))
    if most == own or not once.n:
        return ""
    beside = f", LoRA {lora.mean:.0f} %" if lora.n else ""
    return f"With {most / own:g} times the tokens a single pass wins back {once.mean:.0f} %{beside} (n = {once.n}). "


def questions(*several: Results) -> pd.DataFrame:
    """A row a question with its notebook, a column a profile; questions that no profile's plan has are left out."""
    rows = []
    for question in QUESTIONS:
        cells, shown = {}, None
        for results in several:
            depth = shown_depth(results)
            said = cells[f"`{results.profile.name}`, depth {depth}"] = answer(results, question, depth)
            if not said.endswith((text.NOT_RUN, Verdict.NOT_PLANNED)):
                shown = shown or results.profile.name
        if set(cells.values()) != {Verdict.NOT_PLANNED}:
            link = f"results/{shown or several[0].profile.name}/notebooks/{question.notebook}.ipynb"
            rows.append({"question": f"[{question.text}]({link})"} | cells)
    return pd.DataFrame(rows)


def judged(found: Comparisons, question: Question) -> tuple[dict[int, Interval], dict[int, str]]:
    """What a question's arms differ by at each depth where both are planned, and the verdicts, corrected over these."""
    parts = family({at: minus(found.loss(question.arm, at), found.loss(question.other, question.at or at))
                    for at in found.results.profile.depths if at != question.at
                    and found.plans(question.arm, at) and found.plans(question.other, question.at or at)})
    return parts, verdicts(parts)


def diverged(found: Comparisons, question: Question, depth: int) -> bool:
    """Whether a run that a question is asked of at a depth diverged."""
    here = Comparisons(found.results, found.protocol, updates=found.updates)
    here.loss(question.arm, depth), here.loss(question.other, question.at or depth)
    return bool(here.diverged)


def answer(results: Results, question: Question, depth: int) -> str:
    """A cell: the answer at a depth with its size, and at each other depth of the plan where it is another one."""
    found = Comparisons(results, "corrected")
    parts, words = judged(found, question)
    if not parts:
        return Verdict.NOT_PLANNED
    gap = interval(found.difference("cut", "full")).mean
    said = {at: _said(question, part, words[at], gap) if part.n or not diverged(found, question, at) else (DIVERGED, "")
            for at, part in parts.items()}
    own = ["".join(said[depth])] if depth in parts else [f"{Verdict.NOT_PLANNED} at depth {depth}"]
    others = [f"At depth {at}: {said[at][0][0].lower()}{said[at][0][1:]}{said[at][1]}" for at, part in parts.items()
              if depth not in parts or said[at][0] != said[depth][0] and (
                  part.judged or part.n and part.mean * parts[depth].mean < 0)]
    return ". ".join([*own, *others, *_beside(found, question)])


def _beside(found: Comparisons, question: Question) -> Iterator[str]:
    """Between what the rates move a question's difference; what its two other arms differ by, at the first depth where
    both were run."""
    if question.searched:
        searched = searched_difference(found.results, question.other, question.arm)
        ends = [f"{leads.min():+.2f} to {leads.max():+.2f} at depth {depth}" for (depth, _), leads in searched.items()]
        if ends:
            yield f"Over the rates searched its lead is {', '.join(ends)} (n = 1)"
    if question.also:
        arm, other, what = question.also
        parts = {at: interval(found.difference(arm, other, depth=at)) for at in found.depths_of(arm)}
        for at, part in [(at, part) for at, part in parts.items() if part.n][:1]:
            side = "higher" if part.mean > 0 else "lower"
            yield f"{what} {abs(part.mean):.2f} nats {side} (depth {at}, n = {part.n})"


def _said(question: Question, found: Interval, judged: str, gap: float) -> tuple[str, str]:
    """The answer that a difference gives, as it is judged; and its size, whose direction is the answer's."""
    if found.n == 0:
        return text.NOT_RUN, ""
    seeds = f"n = {found.n}"
    if judged in OPEN:
        return OPEN[judged], f": at most {max(-found.low, found.high):.2g} nats either way ({seeds})"
    if judged == NOT_JUDGED:
        side = BETTER if found.mean < 0 else WORSE
        return text.TOO_FEW.capitalize(), f": {side} by {abs(found.mean):.2f} nats ({seeds})"
    size = sized(found if found.mean >= 0 else replace(found, mean=-found.mean, low=-found.high, high=-found.low))
    share = 100 * abs(found.mean) / gap
    part = f", {share:.{0 if share >= 10 else 1}f} % of the gap" if math.isfinite(share) else ""
    answer = question.lower if judged.startswith(BETTER) else question.higher
    margin = ", which is less than the margin" if judged.endswith("margin") else ""
    return answer, f", by {size} nats{part}{margin} ({seeds})"


def _direction(word: str) -> str:
    """`BETTER`, `WORSE` or `UNDECIDED`, whatever the size."""
    return next((side for side in (BETTER, WORSE) if word.startswith(side)), UNDECIDED)


def why_released(results: Results) -> str:
    """Why the authors' protocol gives other numbers, with the losses that it would score."""
    found = Comparisons(results, "corrected")
    losses = [[run.last("heldout", "loss_t+2") for run in found.runs_of(arm)] for arm in ("full", "cut")]
    if not all(losses):
        return ""
    full, cut = (sum(values) / len(values) for values in losses)
    return ("The authors' code (`released`) scores all but the full model on the token after the next one, where even "
            f"the full model has {full:.2f} on held-out text (the cut one {cut:.2f}): gap recoveries under `released` "
            f"mix two targets, so don't cite them.{_on_the_next_token(results, found)}")


def _on_the_next_token(results: Results, found: Comparisons) -> str:
    """What a Controller that learned by the authors' code wins back on the next token; nothing where none was run."""
    released = Comparisons(results, "released")
    own = released.scored("controller", min(released.depths_of("controller"), default=None), "t+1")
    share = interval(found.share(minus(found.loss("cut"), own)))
    if math.isnan(share.mean):
        return ""
    return f" On the next token a Controller trained by it wins back {share.mean:.0f} % of the gap (n = {share.n})."

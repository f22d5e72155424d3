"""README's first screen: the answer, a table of questions for several profiles, the paper's claims. Never imports
torch. Every sentence is a template; where a direction can flip, both are written."""

import math
from typing import NamedTuple

import pandas as pd

from . import pages, text
from .comparisons import Comparisons
from .results import Results, shown_depth
from .statistics import BETTER, EQUIVALENT, NOT_JUDGED, UNDECIDED, WORSE, Interval, family, interval, verdict, verdicts


class Question(NamedTuple):
    """What a reader asks, as a difference of losses, an arm's minus another's, and what its sign says."""

    text: str
    arm: str
    other: str
    lower: str
    higher: str
    notebook: str


QUESTIONS = (
    Question("Is the loop better than just cutting?", "controller", "cut", "Yes", "No, worse", "02_gap"),
    Question("Is it better than LoRA on the cut model, as many parameters trained?", "controller", "lora", "Yes",
             "No, worse", "07_instead"),
    Question("Is the Controller better than a learned table?", "controller", "static", "Yes", "No, worse",
             "03_controller_vs_static"),
    Question("Is it better than a table of its own size?", "controller", "static_wide", "Yes", "No, worse", "06_parts"),
    Question("Does it matter what the Controller reads, or does a constant do?", "controller", "controller_blind",
             "It matters", "A constant does better", "06_parts"),
    Question("Does a loop without modulation need its step norms?", "none", "none_nonorm", "It needs them",
             "It is better without", "06_parts"),
    Question("Does the loop need its gate?", "controller", "controller_nogate", "It needs it", "It is better without",
             "04_gate"),
)
OPENING = {  # by the verdicts on the first two questions: loop against cut, loop against LoRA
    (BETTER, WORSE): "Partly. The loop wins back {loop} of what cutting cost, and plain LoRA on the cut model, with as "
                     "many trained parameters, {lora}.",
    (BETTER, BETTER): "Yes. The loop wins back {loop} of what cutting cost, and plain LoRA on the cut model, with as "
                      "many trained parameters, {lora}.",
    (BETTER, UNDECIDED): "The loop wins back {loop} of what cutting cost. Against plain LoRA on the cut model, with as "
                         "many trained parameters, nothing is decided.",
    (WORSE, WORSE): "No. The loop ends above the model that was cut and left alone, and plain LoRA on the cut model, "
                    "with as many trained parameters, wins back {lora} of what cutting cost.",
}
OPEN = {NOT_JUDGED: "Too few seeds to judge", EQUIVALENT: "Equivalent", UNDECIDED: "No detectable difference"}
OTHERWISE = "Nothing is decided yet; the table says what is known."


def page(*several: Results) -> str:
    """The first screen, for the first profile, with the others beside it."""
    first = several[0]
    name, depth = first.profile.name, shown_depth(first)
    made = sum(run.id in first.runs for run in first.profile.runs())
    return "\n".join([
        f"**Does it work?** {opening(first)} (`{name}`, protocol `corrected`, depth {depth}, held-out text.)", "",
        f"![{text.shown_overview(first)}](figures/{name}/overview.png)", "",
        questions(*several).to_markdown(index=False, disable_numparse=True), "",
        f"Losses of the first minus the second, nats per token, 95 % intervals. `{name}`: {made} of "
        f"{len(first.profile.runs())} planned runs are there. {why_released(first)}", "",
        "## The paper's claims", "",
        f"{pages.summary(*several)}", "",
        "Why, and the rest, absolute values among it that can't be tested at these scales: "
        + ", ".join(f"[{found.profile.name}](results/{found.profile.name}/claims.md)" for found in several) + "."])


def opening(results: Results) -> str:
    """In one or two sentences, whether the method works."""
    found, depth = Comparisons(results, "corrected"), shown_depth(results)
    judged = tuple(_direction(interval(found.difference(question.arm, question.other, depth=depth)))
                   for question in QUESTIONS[:2])
    loop, lora = (f"{interval(found.recovery(arm, depth)).mean:.0f} %" for arm in ("controller", "lora"))
    return OPENING.get(judged, OTHERWISE).format(loop=loop, lora=lora)


def questions(*several: Results) -> pd.DataFrame:
    """A row a question, a column a profile; questions that no profile's plan has are left out."""
    rows = []
    for question in QUESTIONS:
        cells = {}
        for results in several:
            depth = shown_depth(results)
            cells[f"`{results.profile.name}`, depth {depth}"] = answer(results, question, depth)
        if any(cells.values()):
            links = [f"[{question.notebook[:2]}](results/{results.profile.name}/notebooks/{question.notebook}.ipynb)"
                     for results, cell in zip(several, cells.values()) if cell]
            rows.append({"question": question.text} | cells | {"look": ", ".join(links)})
    return pd.DataFrame(rows)


def answer(results: Results, question: Question, depth: int) -> str:
    """A cell: the answer at a depth with its size, and at each other depth of the plan where it is another one; empty
    where the plan has no such arm."""
    if not {question.arm, question.other} <= set(results.profile.arms):
        return ""
    found = Comparisons(results, "corrected")
    gap = interval(found.difference("cut", "full")).mean
    parts = family({at: found.difference(question.arm, question.other, depth=at)
                    for at in (depth, *results.profile.depths)})
    judged = verdicts(parts)
    said = {at: _said(question, part, judged[at], gap) for at, part in parts.items()}
    others = [f"at depth {at}: {said[at]}" for at, part in parts.items()
              if part.n and part.mean * parts[depth].mean < 0 or part.judged and _word(said[at]) != _word(said[depth])]
    return "; ".join([said[depth], *others])


def _said(question: Question, found: Interval, judged: str, gap: float) -> str:
    """The answer that a difference gives, as it is judged, with its size."""
    if found.n == 0:
        return text.NOT_RUN
    if judged in OPEN:
        return f"{OPEN[judged]}: {found}"
    share = 100 * abs(found.mean) / gap
    size = f", {share:.{0 if share >= 10 else 1}f} % of the gap" if math.isfinite(share) else ""
    answer = question.lower if judged.startswith(BETTER) else question.higher
    return f"{answer}{', by less than the margin' if judged.endswith('margin') else ''}: {found}{size}"


def _word(said: str) -> str:
    """An answer without its size."""
    return said.partition(":")[0]


def _direction(found: Interval) -> str:
    """`BETTER`, `WORSE` or `UNDECIDED`, whatever the size."""
    judged = verdict(found)
    return next((word for word in (BETTER, WORSE) if judged.startswith(word)), UNDECIDED)


def why_released(results: Results) -> str:
    """Why the authors' protocol gives other numbers, with the losses that it would score."""
    found = Comparisons(results, "corrected")
    losses = [[run.last("heldout", "loss_t+2") for run in found.runs_of(arm)] for arm in ("full", "cut")]
    if not all(losses):
        return ""
    full, cut = (sum(values) / len(values) for values in losses)
    return ("The authors' code (`released`) scores the token after the next one, for which the full model was never "
            f"trained: there it has {full:.2f}, the cut model {cut:.2f}, and its gap is taken to a full model read on "
            "the next token, so its gap recovery is not a fraction of one gap.")

"""Where two models agree: the first screen's questions at the headline's profile and at a smaller one, and where their
answers differ, what the smaller one, changed in one respect, says. Never imports torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from .comparisons import Comparisons
from .overview import QUESTIONS, Question, diverged, judged
from .results import Results, shown_depth
from .statistics import BETTER, EQUIVALENT, NOT_JUDGED, UNDECIDED, WITHIN, WORSE, interval
from .text import NOT_RUN

VARIANTS = {"deep": ("cut deeper", "the cut"), "other": ("on another base", "the base")}  # profiles <scale>-<name>
YES, NO, OPEN, FEW, DIVERGED = "yes", "no", "open", "too few seeds", "diverged"
SAID = {BETTER: YES, WORSE: NO, EQUIVALENT: EQUIVALENT, UNDECIDED: OPEN, NOT_JUDGED: FEW}
DECIDED = (YES, NO, EQUIVALENT)


class Scale(NamedTuple):
    """A profile's results at a budget (its own, if none is named), and as what it is changed, if it is."""

    results: Results
    heading: str
    cause: str = ""
    updates: int | None = None


class Answer(NamedTuple):
    """`yes`, `no`, `equivalent`, `open`, `too few seeds`, `diverged`, `not run yet`, or nothing where none is planned;
    and the size in % of the gap."""

    word: str
    share: float = math.nan

    def __str__(self) -> str:
        size = f", by {abs(self.share):.{0 if abs(self.share) >= 10 else 1}f} %"
        return self.word + (size if self.word in (YES, NO) and math.isfinite(self.share) else "")


def variants(scale: str) -> list[str]:
    """The profiles that are a scale changed in one respect."""
    return [f"{scale}-{name}" for name in VARIANTS]


def scales(results: Results, changed: Sequence[Results]) -> list[Scale]:
    """The smaller profile at its own budget, changed in one respect, and with more tokens."""
    name, own = results.profile.name, results.profile.training.updates
    words = dict(zip(variants(name), VARIANTS.values(), strict=True))
    other = [Scale(each, f"{name}, {words[each.profile.name][0]}", words[each.profile.name][1]) for each in changed]
    longer = [Scale(results, f"{name}, {updates / own:g} x the tokens", f"the budget ({updates / own:g} x the tokens)",
                    updates) for updates in results.profile.budgets if updates > own]
    return [Scale(results, name), *other, *longer]


def answer(scale: Scale, question: Question, depth: int) -> Answer:
    """What a scale says of a question at a depth, judged together with the other depths that the question has."""
    found = Comparisons(scale.results, "corrected", updates=scale.updates)
    parts, words = judged(found, question)
    if depth not in parts:
        return Answer("")
    if not parts[depth].n:
        return Answer(DIVERGED if diverged(found, question, depth) else NOT_RUN)
    if words[depth].endswith(WITHIN):  # one is ahead, by less than matters
        return Answer(EQUIVALENT)
    word = SAID[words[depth]]
    return Answer(word, 100 * parts[depth].mean / interval(found.difference("cut", "full")).mean)


def why(first: Answer, changed: Sequence[tuple[str, Answer]]) -> str:
    """With which changes the smaller model says what the larger one says."""
    decided = [(cause, each.word) for cause, each in changed if each.word in DECIDED]
    causes = [cause for cause, word in decided if word == first.word]
    if causes or not decided:
        words = {each.word for _, each in changed}
        return " or ".join(causes) or ("tested, open" if words & {OPEN, DIVERGED} else FEW if FEW in words else
                                       "not tested yet")
    return ("neither " if len(decided) > 1 else "not ") + " nor ".join(cause for cause, _ in decided)


def table(first: Results, second: Results, changed: Sequence[Results] = ()) -> pd.DataFrame:
    """A row a question that both profiles plan: both answers, whether they are the same, with which changes they would
    be, and what the second says changed."""
    rows, depth = [], shown_depth(first)
    small, *others = scales(second, changed)
    for question in QUESTIONS:
        answers = {scale: answer(scale, question, shown_depth(scale.results)) for scale in others}
        large, own = answer(Scale(first, ""), question, depth), answer(small, question, shown_depth(second))
        if not large.word or not own.word:
            continue
        both = {large.word, own.word} <= {*DECIDED}
        same = ("yes" if large.word == own.word else "no") if both else OPEN
        reason = why(large, [(scale.cause, each) for scale, each in answers.items()]) if same == "no" else ""
        rows.append({"question": question.text, f"{first.profile.name}, depth {depth}": str(large),
                     f"{small.heading}, depth {shown_depth(second)}": str(own), "the same?": same,
                     f"{small.heading} says it with": reason}
                    | {scale.heading: str(each) for scale, each in answers.items()})
    return pd.DataFrame(rows)


def markdown(first: Results, second: Results, changed: Sequence[Results] = ()) -> str:
    """The whole of results/scales.md."""
    one, two = first.profile.name, second.profile.name
    seen = [f"{each.profile.training.updates * each.profile.training.tokens_per_update:,}" for each in (first, second)]
    changes = (f"The columns on the right change `{two}` in one respect. Where it then says what `{one}` says, the "
               "answer depends on that change; it needn't be what tells the two models apart (a run sees "
               f"{seen[0]} tokens in `{one}`, {seen[1]} in `{two}`)." if len(scales(second, changed)) > 1 else
               f"No variant of `{two}` has been run that could explain a difference.")
    return f"""# Two scales: what `{one}` and `{two}` say

Generated from the raw logs. Each answer is judged as in README's table, which has other depths too, and norms begun
otherwise, under `corrected`, on held-out text; sizes are in percent of each model's own gap, what cutting costs. *Yes*
and *no*: the interval excludes 0 after correction for the depths that are asked, and the first or the second of the two
is ahead by so much. *Equivalent*: within the margin. *Open*: neither.
{changes}

{table(first, second, changed).to_markdown(index=False, disable_numparse=True)}

The paper's own claims at both, under both protocols, are README's second table; their reasons are in
[{one}/claims.md]({one}/claims.md) and [{two}/claims.md]({two}/claims.md).
"""

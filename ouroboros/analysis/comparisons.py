"""Losses of two arms set against each other, seed by seed. Never imports torch.

What is compared is a mapping {part: {seed: value}}: several parts where a claim speaks of several depths. Differences
are taken within a seed, so that what the seed decides cancels. Losses are nats per token.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from ..experiment.arms import ARMS
from ..experiment.plan import Cell, RunSpec
from ..experiment.protocol import COLUMNS, DRAWN_DEPTHS, switches
from ..log import Run
from .results import Results, read_blocks, splits
from .statistics import BySeed, Ratio, above_zero, margin, minus

NORMS_NEAR = 0.5, 2.0  # times the stream's size: step norms that ended outside had no time to reach it
INTERVENTIONS = ("other_sequence", "corpus_mean", "step_mean")  # probes.intervened
LADDER = {"step norms alone": "none_nogate", "gate alone": "none_nonorm", "gate and static": "static_nonorm",
          "gate and Controller": "controller_nonorm", "gate and step norms": "none", "both and static": "static",
          "both and Controller": "controller"}
STEPS = {"step norms, to the gate": ("none_nonorm", "none"), "gate, to the step norms": ("none_nogate", "none"),
         "static, to the gate": ("none_nonorm", "static_nonorm"),
         "Controller, to the gate": ("none_nonorm", "controller_nonorm"),
         "static, to both": ("none", "static"), "Controller, to both": ("none", "controller")}
LOOPS = ("controller", "static", "none")
DRAWN = f"passes drawn from {', '.join(map(str, DRAWN_DEPTHS))}"  # of a run that stands for every depth
BLIND = ("static", "static_wide", "controller_blind")  # a table, and two arms with the Controller's parameter count


class Comparisons:
    """The losses of a profile's runs under one protocol, and what they differ by.

    `diverged` collects the runs that were asked for and have no loss because they diverged: no mean hides them. With
    `endless` such a run's loss is infinite.
    """

    def __init__(self, results: Results, protocol: str, endless: bool = False, updates: int | None = None):
        self.results, self.protocol, self.endless = results, protocol, endless
        self.updates = updates or results.profile.training.updates
        self.diverged: set[str] = set()
        self._margins: dict[str, float] = {}

    def depths_of(self, arm: str) -> tuple[int, ...]:
        """The depths at which an arm is planned under this protocol; in either column where it flips a switch."""
        return self.results.profile.depths_of(arm, (self.protocol,) if self.protocol in COLUMNS else COLUMNS)

    # ---------------------------------------------------------------------------------------------- losses

    def _rows(self, arm: str, depth: int | None = None, rank: int | None = None, level: str = "") -> list:
        """The declared rows of an arm under this protocol, a seed each, at a depth (the base depth), rank (the base
        rank) and level of the rate; these mean nothing to an arm without a loop."""
        rows = self._declared(arm, *self._place(arm, depth, rank), level)
        self.results.note(row.run for row in rows)
        return rows

    def plans(self, arm: str, depth: int | None = None) -> bool:
        """Whether the plan has an arm at a depth, the base rank and the chosen rate."""
        return bool(self._declared(arm, *self._place(arm, depth), ""))

    def _place(self, arm: str, depth: int | None, rank: int | None = None) -> tuple[int | None, int | None]:
        profile = self.results.profile
        return (depth or profile.depth, rank or profile.rank_of(arm)) if ARMS[arm].loops else (None, None)

    def _declared(self, arm: str, *place) -> list:
        updates = self.updates if ARMS[arm].longer else self.results.profile.training.updates
        return self.results.places.get((self.protocol, arm, *place, updates), [])

    def loss(self, arm: str, depth: int | None = None, rank: int | None = None, level: str = "",
             column: str = "loss") -> BySeed:
        """An arm's loss: as the protocol reports it, or in next-token loss on one of the `splits`."""
        rows = self._rows(arm, depth, rank, level)
        self.diverged |= {row.run for row in rows if row.status == "diverged"}
        endless = {row.seed: math.inf for row in rows if self.endless and row.status == "diverged"}
        losses = {row.seed: getattr(row, column) for row in rows} | endless
        losses = {seed: value for seed, value in losses.items() if not math.isnan(value)}
        setting, blocks, clusters = switches(self.protocol), None, None
        own = setting["evaluation"] != "splits" or arm == "full" and setting["reference"] == "short"
        split, target = ("heldout", setting["target"]) if column == "loss" else (column, "t+1")
        if not endless and not (column == "loss" and own):
            blocks, clusters = self._blocks(rows, split, target)
        trained = RunSpec(arm, depth, rank, self.protocol, 0).fit != "none"
        return BySeed(losses, blocks, clusters, trained, self._margin(column), arm)

    def _blocks(self, rows: list, split: str, target: str) -> tuple[dict | None, np.ndarray | None]:
        """The losses of some rows block by block, and the blocks' clusters, where these are the same blocks at every
        seed, as on held-out, foreign and newer text."""
        clusters = self.results.clusters.get(split)
        if clusters is None:
            return None, None
        return {row.seed: np.array(self.results.runs[row.run].last(split, f"block_losses_{target}"))
                for row in rows if row.status == "finished"}, clusters

    def _margin(self, column: str) -> float:
        """The margin of a difference in a column: see `statistics.margin`; the gap is between means over seeds."""
        if column not in self._margins:  # not noted as read: it enters words, no number
            full, cut = ([getattr(row, column) for row in self._declared(arm, None, None, "")
                          if row.status == "finished"] for arm in ("full", "cut"))
            self._margins[column] = margin(float(np.mean(cut) - np.mean(full)) if full and cut else None)
        return self._margins[column]

    def runs_of(self, arm: str, depth: int | None = None) -> list[Run]:
        """The finished runs of an arm at a depth (the base depth), a seed each, in the order of the matrix."""
        return [self.results.runs[row.run] for row in self._rows(arm, depth) if row.status == "finished"]

    def logged(self, arm: str, depth: int | None, metric: str) -> BySeed:
        """The last value, a number or a list, that each seed's run logged of a metric on held-out text; a run whose
        log's format is of before that metric isn't in it."""
        found = self.loss(arm, depth)  # only finished runs have a loss
        runs = {row.seed: row.run for row in self._rows(arm, depth)}
        values = {seed: self.results.runs[runs[seed]].last("heldout", metric, math.nan) for seed in found}
        return BySeed({seed: value for seed, value in values.items() if np.isfinite(value).all()})

    def scored(self, arm: str, depth: int | None, target: str) -> BySeed:
        """An arm's loss on held-out text on a target, whichever its protocol has, with its blocks."""
        blocks, clusters = self._blocks(self._rows(arm, depth), "heldout", target)
        return BySeed(self.logged(arm, depth, f"loss_{target}"), blocks, clusters, ARMS[arm].fit != "none",
                      self._margin("heldout"), arm)

    # ------------------------------------------------------------------------------------------ differences

    def difference(self, a: str, b: str, **at) -> BySeed:
        """The loss of arm `a` minus that of `b`; `at` as of `loss`."""
        return minus(self.loss(a, **at), self.loss(b, **at))

    def compare(self, a: str, b: str | None = None, by: str = "", **at) -> dict[str, BySeed]:
        """The loss of arm `a`, or minus that of `b`, at each place of a kind.

        `by`: `depth`, those at which Controller and static are compared; `own depth`, those at which `a` is planned;
        `rank`; `configuration`, the depths, and at the base depth the other ranks and rates; `text`, the `splits`; or
        nothing, once. Rates are each arm's own, or the same factor of it.
        """
        places = {name: at | place for name, place in self._places(a, by).items()}
        return {name: self.difference(a, b, **place) if b else self.loss(a, **place) for name, place in places.items()}

    def _places(self, arm: str, by: str) -> dict[str, dict]:
        profile = self.results.profile
        depths = {f"depth {depth}": {"depth": depth} for depth in self.depths_of("controller")}
        if by == "configuration" and self.protocol == "corrected":
            return depths | {f"rank {rank}": {"rank": rank} for rank in profile.ranks} | {
                f"rate {level}": {"level": level} for level in profile.levels}
        if by == "own depth" and (own := self.depths_of(arm)):
            return {f"depth {depth}": {"depth": depth} for depth in own}
        if by == "text":
            return {split: {"column": split} for split in splits(profile)}
        if by == "rank":
            return {f"rank {rank}": {"rank": rank} for rank in sorted({profile.rank, *profile.ranks})}
        return depths if by else {"": {}}

    def pairs(self, pairs: Mapping[str, tuple[str, str]], depth: int | None = None) -> dict[str, BySeed]:
        """The first arm of each pair minus the second, at one depth (the base depth)."""
        return {name: self.difference(a, b, depth=depth) for name, (a, b) in pairs.items()}

    def against(self, arms: Iterable[str], other: str, depth: int | None = None) -> dict[str, BySeed]:
        """Each of some arms minus another one, at one depth (the base depth)."""
        return self.pairs({arm: (arm, other) for arm in arms}, depth)

    def change(self, kind: str, arm: str, other: str | None = None) -> dict[str, BySeed]:
        """How an arm's loss, or its difference from another's, changes over the depths.

        `kind`: `rise from depth 1`, each other depth minus depth 1; `fall from depth 1`, the negative of that; `fall
        from depth to depth`, each minus the next.
        """
        depths = self.depths_of("controller")
        at = {depth: self.difference(arm, other, depth=depth) if other else self.loss(arm, depth) for depth in depths}
        if kind == "fall from depth to depth":
            return {f"depth {a} to {b}": minus(at[a], at[b]) for a, b in zip(depths, depths[1:], strict=False)}
        ends = {f"depth {depth}": (at[depth], at[1]) for depth in depths if 1 in at and depth != 1}
        return {name: minus(*(pair if kind.startswith("rise") else pair[::-1])) for name, pair in ends.items()}

    def spread(self, arm: str) -> BySeed:
        """Largest minus smallest loss over the configurations, of each seed that has all."""
        losses = self.compare(arm, by="configuration").values()
        seeds = [seed for seed in next(iter(losses)) if all(seed in part for part in losses)]
        return BySeed({seed: max(part[seed] for part in losses) - min(part[seed] for part in losses)
                       for seed in seeds})

    def _planned(self, depth: int, *arms: str) -> bool:
        return all(depth in self.depths_of(arm) for arm in arms)

    def ladder(self, depth: int) -> dict[str, BySeed]:
        """Loss minus the cut model's of a loop with more and more parts, at one depth; of those planned there."""
        return self.pairs({name: (arm, "cut") for name, arm in LADDER.items() if self._planned(depth, arm)}, depth)

    def steps(self, depth: int) -> dict[str, BySeed]:
        """What each part adds to the loss, at one depth: the arm with it minus the arm without it."""
        return self.pairs({name: pair[::-1] for name, pair in STEPS.items() if self._planned(depth, *pair)}, depth)

    def coda(self, depth: int) -> dict[str, BySeed]:
        """Loss minus the cut model's with the coda frozen and with LoRA on it, at one depth; of those planned."""
        names = [name for name in ("controller", "controller_coda_lora", "cut_coda_lora")
                 if name in self.results.profile.arms]
        return self.against(names if len(names) > 1 else [], "cut", depth)

    def at_other_depths(self, arm: str) -> dict[str, BySeed]:
        """Held-out next-token loss of the runs of the base depth, scored at each depth."""
        profile = self.results.profile
        return {f"depth {depth}": self.logged(arm, profile.depth, f"loss_t+1/depth_{depth}")
                for depth in profile.probes.depths}

    def interventions(self, depth: int) -> dict[str, BySeed]:
        """What the Controller's loss rises by when it sees something else (`probes.intervened`)."""
        own = self.logged("controller", depth, "loss_t+1/as_trained")
        return {kind: minus(self.logged("controller", depth, f"loss_t+1/{kind}"), own) for kind in INTERVENTIONS}

    # --------------------------------------------------------------------------------------------- the gap

    def reduction(self, arm: str, depth: int | None = None, rank: int | None = None) -> Ratio:
        """Loss reduction, (L17 - Lc) / L17, in percent."""
        cut = self.loss("cut")
        return Ratio(minus(cut, self.loss(arm, depth, rank)), cut)

    def recovery(self, arm: str, depth: int | None = None, rank: int | None = None) -> Ratio:
        """Gap recovery, (L17 - Lc) / (L17 - L36), in percent."""
        return self.share(minus(self.loss("cut"), self.loss(arm, depth, rank)))

    def share(self, values: BySeed, column: str = "loss") -> Ratio:
        """A quantity in percent of the gap, cut - full; undefined where the blocks that were read leave open whether
        there is one (no seed enters full or cut, so seeds can't tell)."""
        gap = self.difference("cut", "full", column=column)
        runs = {arm: run for arm in ("full", "cut") for run in self.runs_of(arm)[:1]}
        if len(runs) < 2:
            return Ratio(values, gap)
        full, cut = (read_blocks(run, arm, self.protocol) if column == "loss" else
                     np.array(run.last(column, "block_losses_t+1")) for arm, run in runs.items())
        setting = switches(self.protocol)
        same = column != "loss" or (setting["evaluation"], setting["reference"]) == ("splits", "same")
        return Ratio(values, gap, above_zero(cut, full, same))

    def gap_on_common_blocks(self) -> BySeed:
        """cut - full on the blocks that both are read on; nothing where the full model is read on other texts."""
        setting = switches(self.protocol)
        if setting["reference"] == "short":
            return BySeed()
        if setting["evaluation"] == "splits":  # both on all of the same blocks
            return self.difference("cut", "full")
        cut, full = ({run.manifest["seed"]: read_blocks(run, arm, self.protocol) for run in self.runs_of(arm)}
                     for arm in ("cut", "full"))
        common = {seed: min(len(cut[seed]), len(full[seed])) for seed in cut if seed in full}  # both begin at the first
        return BySeed({seed: float(cut[seed][:count].mean() - full[seed][:count].mean())
                       for seed, count in common.items()})

    # ------------------------------------------------------------------------------------------ step norms

    def norms_reached(self, arm: str, depth: int | None = None) -> float:
        """Where an arm's step norms ended: their mean weight in parts of the root mean square of the stream that they
        read before training, mean over seeds and steps; NaN without step norms, or where a log doesn't say."""
        found = []
        for run in self.runs_of(arm, depth):
            if ("model", "step_norm") in run.series:  # logged together with the stream's size
                found.append(np.mean(run.last("model", "step_norm")) / np.mean(run.last("model", "stream_rms")))
        return float(np.mean(found)) if found else math.nan

    def norms_near(self, arm: str, depth: int | None = None) -> bool | None:
        """Whether an arm's step norms ended near the size of the stream; None without them, or where no log says."""
        reached = self.norms_reached(arm, depth)
        return None if math.isnan(reached) else NORMS_NEAR[0] <= reached <= NORMS_NEAR[1]


def draws_depths(arm: str, protocol: str) -> bool:
    """Whether the protocol makes one run of all depths of an arm (protocol.md `depth`)."""
    one, other = (Cell(arm, depth, None, protocol, 0).run for depth in (1, 2))
    return ARMS[arm].loops and one == other


def by_protocol(results: Results) -> list[Comparisons]:
    """Under each whole column that the plan has."""
    return [Comparisons(results, protocol) for protocol in results.profile.protocols]

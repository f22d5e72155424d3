"""What the reported numbers say of each other: all that can be checked without a run. No torch.

`table` uses reported numbers and the reported shape alone (system.md 6 and 8); `settings` says what the set-up and the
released code's settings imply (system.md 7, protocol.md). Nothing here is measured.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

import numpy as np
import pandas as pd

from ..experiment.cost import Cost, Shape
from ..experiment.profile import load_profile
from ..experiment.protocol import DRAWN_DEPTHS, schedule
from .ledger import Claim, numbers, read_claims

PEAK, MICRO_STEPS, ACCUMULATION, BATCH, BLOCK = 3e-4, 300_000, 16, 2, 2048  # system.md 7
UNUSED = 2 * 2048  # system.md `unused`: two vectors that are trained in name
ADDS_RESIDUAL = 32 / 16  # m at which alpha / r * m is 1 (system.md 3)
UPDATES = MICRO_STEPS // ACCUMULATION
# system.md 9: depths 1, 2, 4, 8, 16 and ranks 8, 32, 64; the run of rank 32 is that of depth 8
D_TABLE = ("c1", "c2", "c4", "c8", "c16", "cr8", "c8", "cr64")
OTHER_RATE = "clr"  # the Controller at the rate 1e-3

Numbers = dict[str, Decimal]


def bfloat16(values) -> np.ndarray:
    """float32 values rounded to bfloat16, to nearest, ties to even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def reach(rates: Iterable[float], half: bool, start: float = 0.0) -> np.ndarray:
    """Where an entry is after each update, (updates + 1,), if each moves it by its whole rate, in float32 or kept in
    bfloat16: about the most that AdamW moves it when its gradient never changes sign."""
    rates = np.asarray(list(rates), dtype=np.float32)
    values = np.full(len(rates) + 1, start, dtype=np.float32)
    for update, rate in enumerate(rates):
        moved = values[update] + rate
        values[update + 1] = bfloat16(moved) if half else moved
    return values


# --------------------------------------------------------------------------------- reported numbers

def table(claims: Sequence[Claim] | None = None) -> pd.DataFrame:
    """One row a check of the reported numbers: quantity, reported, recomputed, how, agrees, what it can't show.

    Numbers are computed exactly from the typed ones and shown with the digits of the reported one. `agrees` is `yes` or
    `no`, and empty where nothing was reported to compare with.
    """
    paper = numbers(claims or read_claims())
    parts = (_percentages, _differences, _gate_and_guess, _two_texts, _parameters)
    return pd.DataFrame([row for part in parts for row in part(paper)])


def _row(quantity: str, value: Decimal | int | str, how: str, limit: str,
         reported: Decimal | None = None, decimals: int = 3, unit: str = "nats",
         sign: str = "") -> dict:
    """A row; `decimals` where nothing is reported, `sign` is `+` for a change."""
    if reported is not None:
        decimals = _decimals(reported)
    shown = value if isinstance(value, str) else f"{value:{sign},.{decimals}f}"
    agrees = "" if reported is None else _yes(Decimal(shown.replace(",", "")) == reported)
    return {"quantity": quantity,
            "reported": "" if reported is None else f"{reported:{sign},} {unit}".strip(),
            "recomputed": f"{shown} {unit}".strip(), "how": how, "agrees": agrees,
            "what it can't show": limit}


def _decimals(number: Decimal) -> int:
    return -number.as_tuple().exponent


def _yes(agrees: bool) -> str:
    return "yes" if agrees else "no"


def _percentages(paper: Numbers) -> Iterator[dict]:
    """Loss reduction and gap recovery: over all configurations, at depth 8, and which of them give both."""
    whole = {"red": paper["L17"], "rec": paper["L17"] - paper["L36"]}

    def share(name: str, loss: str) -> Decimal:
        return round(100 * (paper["L17"] - paper[loss]) / whole[name], _decimals(paper[name]))

    for name, quantity, over, limit in (
            ("red", "loss reduction", "L17", "that both losses are of one text and one target"),
            ("rec", "gap recovery", "(L17 - L36)",
             "that L36 has the target of the other two; else it is no share")):
        low, high = share(name, "Lc.high"), share(name, "Lc.low")
        row = _row(f"{quantity}, all configurations", f"{low} to {high}",
                   f"(L17 - Lc) / {over}, ends of Lc", limit, unit="%")
        yield row | {"reported": f"{paper[name]} %", "agrees": _yes(low <= paper[name] <= high)}
        yield _row(f"{quantity}, depth 8", share(name, "c8"), f"(L17 - c8) / {over}", limit, paper[name], unit="%")
    both = [loss for loss in dict.fromkeys((*D_TABLE, OTHER_RATE))
            if all(share(name, loss) == paper[name] for name in whole)]
    yield _row("configurations that give both percentages", ", ".join(both) or "none",
               "each loss in both formulas", "which of them was used", unit="")


def _differences(paper: Numbers) -> Iterator[dict]:
    """Static minus Controller, by depth and at the other rate; the spread over the eight configurations, by which eight
    they are."""
    limit = "how sure it is: one seed, so no interval"
    for depth, name, source in ((1, "adv1", ""), (1, "adv1.as A says it", ", abstract"), (4, "adv4", ""),
                                (8, "adv8", ""), (16, "adv16", "")):
        yield _row(f"static - Controller, depth {depth}{source}", paper[f"s{depth}"] - paper[f"c{depth}"],
                   f"s{depth} - c{depth}", limit, paper[name])
    yield _row("static - Controller, depth 8, rate 1e-3", paper["slr"] - paper["clr"], "slr - clr",
               "the lead with each arm at its own best rate")
    losses, different = [paper[name] for name in D_TABLE], len(set(D_TABLE))
    yield _row("spread over the eight rows of D's table", max(losses) - min(losses),
               f"5 depths and 3 ranks, {different} different runs", "which eight were meant: open", paper["range"])
    losses.append(paper[OTHER_RATE])
    yield _row("spread with the run at rate 1e-3", max(losses) - min(losses),
               f"those {different} and clr: {different + 1}", "whether that run is one of the eight: open",
               paper["range"])
    low, high = paper["Lc.low"], paper["Lc.high"]
    yield _row("spread between the ends of Lc", high - low, f"{high} - {low}", "which runs they are", paper["range"])


def _gate_and_guess(paper: Numbers) -> Iterator[dict]:
    """The gate's evidence, and that it doesn't begin at the cut model; how far losses lie below that of a uniform guess
    over the vocabulary."""
    before = paper["gate.before"]
    limit = "anything of the cut model: its base is an intact Qwen2.5-0.5B"
    yield _row("loss with the gate", before + paper["gate"], f"{before} + gate", limit, paper["gate.after"])
    yield _row("loss without the gate", before + paper["nogate"], f"{before} + nogate", limit, decimals=2)
    yield _row("the gate's baseline - L17", before - paper["L17"], f"{before} - L17",
               "more than that they are two measurements", sign="+")
    vocabulary = Shape.of(load_profile("paper")).vocabulary
    guess = Decimal(math.log(vocabulary))
    yield _row("a uniform guess", guess, f"ln {vocabulary:,}", "what a model has that was trained on it", decimals=2)
    for name, loss, limit in (
            ("L17", paper["L17"], "its target: cutting alone may cost that much"),
            ("the gate's baseline", before,
             "its target; but an intact model has far less on the next token, as L36 and h36 do"),
            ("h17, passages,", paper["h17"], "why the same weights have L17 elsewhere")):
        yield _row(f"{name} below a uniform guess", guess - loss, f"ln {vocabulary:,} - {loss}", limit, decimals=2)


def _two_texts(paper: Numbers) -> Iterator[dict]:
    """From the abstract's losses to those of the 12 passages: which way each model goes, gap recovery there."""
    one = "twelve short passages of one source (D)"
    change = {}
    for name, here, there in (("full model", "h36", "L36"), ("cut model", "h17", "L17"), ("Controller", "hc", "c8")):
        change[name] = paper[here] - paper[there]
        yield _row(f"{name}, passages - abstract", change[name], f"{here} - {there}", one, sign="+")
    yield _row("full and cut model go the same way", _yes(change["full model"] * change["cut model"] > 0),
               "signs of the two", "why: two targets would explain it, arithmetic can't exclude two texts", unit="")
    behind = paper["hc"] - paper["h17"]
    yield _row("gap recovery on the passages", -100 * behind / (paper["h17"] - paper["h36"]),
               "(h17 - hc) / (h17 - h36)", f"more than {one}; no interval", decimals=1, unit="%")
    yield _row("Controller - cut on the passages", behind, "hc - h17", "whether hmit is of the same passages",
               paper["hmit.before"], sign="+")
    yield _row("what dropout, mixed text or alpha 0.5 took off", paper["hmit.before"] - paper["hmit"],
               "hmit, before - after", "which of the three did it", decimals=2)


def _parameters(paper: Numbers) -> Iterator[dict]:
    """Trainable parameters, counted from the reported shape."""
    profile = load_profile("paper")
    loop, static = (Cost.of(profile, arm).trainable() for arm in ("controller", "static"))
    total, moved = sum(loop.values()), "which of them move in training (protocol.md `precision`)"
    yield _row("trainable parameters", Decimal(total) / 10**6, "Controller + gate + step norms", moved,
               paper["params"], unit="million")
    for quantity, value, how, limit in (
            ("of the Controller", loop["modulation"], "system.md 4", moved),
            ("of the gate", loop["gate"], "2 x 2048 x 2048 + 2048", moved),
            ("of the step norms", loop["step_norm"], "64 x 2048", moved),
            ("all of them", total, "the sum", moved),
            ("with the two unused vectors", total + UNUSED, "system.md `unused`", "whether the paper counts them"),
            ("of the static arm", sum(static.values()), "table 64 x 7 x 32, the same gate and norms",
             "that the arms' capacities are alike")):
        yield _row(quantity, value, how, limit, decimals=0, unit="")
    yield _row("the gate's share", Decimal(100 * loop["gate"]) / total, "gate / all", "whether the gate needs them",
               decimals=0, unit="%")
    shape = Shape.of(profile)
    for layers, reported in ((17, paper["params.% of the model"]), (shape.layers, None)):
        yield _row(f"share of the model with {layers} layers", Decimal(100 * total) / shape.parameters(layers),
                   "with embedding", "which model was meant", reported, decimals=1, unit="%")


# ----------------------------------------------------------------------------------------- settings

def settings() -> pd.DataFrame:
    """One row a number that follows from the set-up and the released settings: quantity, reported, recomputed, how,
    agrees."""
    loop = Cost.of(load_profile("paper"), "controller")
    flops = np.mean([loop.training(depth, BLOCK) for depth in DRAWN_DEPTHS]) * MICRO_STEPS * BATCH * BLOCK
    tokens = Decimal(MICRO_STEPS * BATCH * BLOCK) / 10**9
    last = Decimal(100 * schedule(UPDATES - 1, UPDATES, "stretched"))
    rows = [_row("updates", UPDATES, "300,000 micro-steps / 16", "", Decimal(18_750), unit=""),
            _row("tokens seen", tokens, "300,000 x 2 x 2048", "", Decimal("1.23"), unit="billion"),
            _row("learning rate at the last update", last, "protocol.md `schedule`, released", "", decimals=1,
                 unit="% of the peak"),
            _row("training FLOPs of a Controller run", Decimal(flops / 1e18),
                 "cost model, depths drawn from 4, 8, 16", "", decimals=1, unit="x 1e18"),
            _row("m that adds the whole residual", Decimal(ADDS_RESIDUAL), "r / alpha, 32 / 16 (system.md 3)", "",
                 unit="")]
    for name, half in (("float32", False), ("bfloat16", True)):
        for quantity, start in (("largest m of a static table", 0.0), ("a step norm's weight, from 1", 1.0)):
            reached = reach([PEAK] * UPDATES, half, start)[-1]
            rows.append(_row(f"{quantity}, {name}", Decimal(float(reached)), "18,750 updates of 3e-4, one sign", "",
                             unit=""))
    return pd.DataFrame(rows).drop(columns="what it can't show")

"""What the reported numbers say of each other: everything that can be checked without a run. Never imports torch.

`reported` is typed from the sources in claims.yaml and SYSTEM sections 2 to 8; `computed` follows from other reported
numbers, from the reported shape, or from the released code's settings (AUDIT). Nothing here is measured.
"""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from . import claims
from .cost import Cost, Shape
from .experiment import DRAWN_DEPTHS, load_profile

PEAK, MICRO_STEPS, ACCUMULATION, BATCH, BLOCK = 3e-4, 300_000, 16, 2, 2048  # SYSTEM section 7
WARM_UP = 124  # updates, of the released code (AUDIT `schedule`)
HORIZON = 16  # AUDIT `schedule`: times the number of updates
UNUSED = 2 * 2048  # AUDIT `unused`: two vectors that are trained in name
WHOLE = 32 / 16  # m at which alpha / r * m is 1 (SYSTEM section 3)
UPDATES = MICRO_STEPS // ACCUMULATION


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


def released_rate(update: int, updates: int = UPDATES) -> float:
    """The released learning rate at an update, counted from 0: a cosine with a horizon of 16 times the updates."""
    if update < WARM_UP:
        return PEAK * (update + 1) / WARM_UP
    share = (update - WARM_UP) / (HORIZON * updates - WARM_UP)
    return PEAK * 0.5 * (1 + math.cos(math.pi * share))


def table() -> pd.DataFrame:
    """One row a check: quantity, reported, computed, how it was computed, and whether they agree to the digits given.

    `agrees` is empty where nothing was reported to compare with.
    """
    told, paper = claims.reported(claims.load()), load_profile("paper")
    shape, loop, static = Shape.of(paper), Cost.of(paper, "controller"), Cost.of(paper, "static")
    trained = sum(loop.trainable().values())
    low, high = told["Lc"]
    l17, l36 = told["L17"], told["L36"]
    rows: list[dict] = []

    def check(quantity: str, reported, computed: float, how: str, digits: int | None = None) -> None:
        rows.append({"quantity": quantity, "reported": "" if reported is None else f"{reported:,.10g}",
                     "computed": f"{computed:,.6g}", "how": how,
                     "agrees": "" if digits is None else round(computed, digits) == round(reported, digits)})

    for name, share, of in (("loss reduction", told["red"], l17), ("gap recovery", told["rec"], l17 - l36)):
        ends = [100 * (l17 - loss) / of for loss in (high, low)]
        # the loss that it was computed from isn't told: any of the eight may be it
        rows.append({"quantity": f"{name}, %", "reported": f"{share}", "computed": f"{ends[0]:.4g} to {ends[1]:.4g}",
                     "how": "the range of the eight", "agrees": round(ends[0], 1) <= share <= round(ends[1], 1)})
    for depth in (1, 4, 8):
        check(f"static - Controller at depth {depth}, nats per token", told[f"adv{depth}"],
              told[f"s{depth}"] - told[f"c{depth}"], f"s{depth} - c{depth}", 3)
    check("spread over the configurations, nats per token", told["range"], high - low, "ends of the reported range", 3)
    check("loss with the gate in the gate's comparison, nats per token", None, l17 + told["gate"], "L17 + gate")
    check("its distance from the worst of the 8 configurations, nats per token", None, l17 + told["gate"] - high,
          "so it isn't one of them")
    check("trained parameters, million", told["params"], trained / 1e6, "Controller + gate + step norms", 1)
    check("the gate's share of them, %", None, 100 * loop.trainable()["gate"] / trained, "SYSTEM section 6")
    check("share of the model, %", 0.6, 100 * trained / shape.parameters(17), "of the 17 kept layers with embedding", 1)
    check("share of the full model, %", None, 100 * trained / shape.parameters(shape.layers), "of all 36 layers")
    check("trained parameters with the unused vectors", None, trained + UNUSED, "AUDIT `unused`")
    check("static's trained parameters, % of the Controller's", None, 100 * sum(static.trainable().values()) / trained,
          "table 64 x 7 x 32, same gate and norms")
    check("updates", 18_750, UPDATES, "300,000 micro-steps / 16", 0)
    check("tokens seen, billion", 1.23, MICRO_STEPS * BATCH * BLOCK / 1e9, "300,000 x 2 x 2048", 2)
    check("learning rate at the last update, % of the peak", None, 100 * released_rate(UPDATES - 1) / PEAK,
          "AUDIT `schedule`, released")
    flops = np.mean([loop.training(depth, BLOCK) for depth in DRAWN_DEPTHS]) * MICRO_STEPS * BATCH * BLOCK
    check("training FLOPs of a Controller run, 1e18", None, flops / 1e18, "cost model, depths drawn from 4, 8, 16")
    check("a uniform guess, nats per token", None, math.log(shape.vocabulary), "ln 151,936")
    check("perplexity of the full model", None, math.exp(l36), "exp(L36)")
    check("perplexity of the cut model", None, math.exp(l17), "exp(L17)")
    check("perplexity of the Controller's best configuration", None, math.exp(low), f"exp({low})")
    check("m that adds the whole residual", None, WHOLE, "r / alpha, 32 / 16 (SYSTEM section 3)")
    for name, half in (("float32", False), ("bfloat16", True)):
        check(f"largest m of a static table, {name}", None, reach([PEAK] * UPDATES, half)[-1],
              "18,750 updates of 3e-4, never changing sign")
        check(f"a step norm's weight, from 1, {name}", None, reach([PEAK] * UPDATES, half, 1.0)[-1], "the same")
    return pd.DataFrame(rows)


def found() -> str:
    """What the arithmetic shows, generated from its table."""
    rows = table().set_index("quantity")
    compared = rows[rows["agrees"] != ""]
    off = [f"{name} (reported {row.reported}, computed {row.computed})"
           for name, row in compared[~compared["agrees"].astype(bool)].iterrows()]
    stuck = rows.loc["a step norm's weight, from 1, bfloat16", "computed"]
    apart = rows.loc["its distance from the worst of the 8 configurations, nats per token", "computed"]
    return (f"- `paper`: {len(compared) - len(off)} of {len(compared)} reported numbers are what the others and "
            "the reported set-up give, to their digits" + (f"; not: {'; '.join(off)}" if off else "") + ".\n"
            f"- The gated run that the gate's comparison speaks of lies {apart} nats above the worst of the eight "
            "configurations, so it is none of them.\n"
            f"- By the released settings an entry kept in bfloat16 that starts at 1 ends at {stuck}; a static table's "
            f"entries reach {rows.loc['largest m of a static table, bfloat16', 'computed']} in bfloat16 and "
            f"{rows.loc['largest m of a static table, float32', 'computed']} in float32, where "
            f"{rows.loc['m that adds the whole residual', 'computed']} would add the residual.")

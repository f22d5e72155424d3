"""The arms: what each puts in place of the removed layers, as data. Never imports torch.

An arm is one entry of `ARMS`. `docs/own-arm.md` adds one without changing the package.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Passes:
    """Further passes over layers of the cut model, beside each one's own (docs/hypotheses.md)."""

    count: int | None = 1  # None: one for each removed layer, in their order around the middle layer's own
    layers: int = 1  # neighbours that are passed together
    at: Literal["scanned", "middle"] = "scanned"  # which: those that the profile's scan chose, or the middle one
    kind: Literal["damped", "plain", "affine"] = "damped"
    """h <- h + g (f(h) - h) with a vector g a pass, from 0; h <- f(h), for the middle layer's own pass too; no pass,
    but a scale and a shift of each channel in its place."""
    bases: Literal["none", "frozen", "trained"] = "none"  # low-rank factors a pass, from that removed layer's residual
    modulation: Literal["none", "static", "controller"] = "none"  # scales LoRA's ranks, or the factors', at each pass


@dataclass(frozen=True)
class Arm:
    """What an arm puts in place of the removed layers, and what it trains."""

    label: str  # its name in words
    middle: Literal["all", "one", "maps", "loop", "affine", "none", "intact", "refine", "counts"]
    """Between prelude and coda: every layer of the base; the recurrent layer once (and `more` of those after it); it
    once, between two linear maps; it, looped; a scale and a shift of each channel; nothing. `refine`: every layer, and
    the last one again, looped; `intact`: that system without its loop. `counts`: no network at all, but the frequencies
    of tokens in the training split, or with fit `counts` in the blocks that a run would train on."""
    modulation: str = "none"  # of a loop: a name in `modulation.MODULATIONS`
    module: str | None = None  # of an own arm: the class of its modulation, `path/to/file.py:Class`
    reads: bool = False  # whether its modulation reads the hidden state, so is computed for each token
    tables: tuple[str, ...] = ("table",)  # the modulation's tensors that train at the elementwise rate
    gate: bool = False
    step_norm: bool = False
    matched: bool = False  # step norms begin at the stream's root mean square instead of 1
    lora: Literal["none", "coda", "kept", "kept_coda", "kept_last"] = "none"
    """Where LoRA is trained: on the coda, at the base rank; at the Controller's trained count, on every kept layer, on
    the coda, or on the last LAST layers."""
    more: int = 0  # layers kept after the recurrent one
    other: bool = False  # keeps the middle layer that the profile's scan chose instead
    passes: Passes | None = None
    pairs: bool = False  # of counts: of pairs of tokens, not of tokens alone
    teacher: Literal["none", "states", "logits"] = "none"  # what of the full model is learned from, beside the text
    scans: bool = False  # the cut model with other layers kept, or passed again, is scored instead of it
    ends: int | None = None  # layers kept at either end; None: the profile's split
    fit: Literal["none", "counts", "least squares", "gradient"] = "gradient"

    @property
    def loops(self) -> bool:
        return self.middle in ("loop", "refine")

    @property
    def scanned(self) -> bool:
        """Whether its layers are those that the profile's scan chose."""
        return self.other or self.passes is not None and self.passes.at == "scanned"

    @property
    def trained(self) -> bool:
        return self.fit == "gradient"

    @property
    def longer(self) -> bool:
        """Whether more updates make another run of it: it trains on more text, or counts more."""
        return self.fit in ("gradient", "counts")

    @property
    def loadable(self) -> bool:
        """Whether a library loads what it trained: a loop on a frozen base, or LoRA on the cut model (`trained`)."""
        loop = self.middle == "loop" and self.trained and self.lora == "none"
        return loop or (self.middle == "one" and self.lora.startswith("kept"))

    @property
    def modulated(self) -> bool:
        return self.modulation != "none"

    @property
    def elementwise(self) -> bool:
        """Whether it trains step norms, a table, an affine or passes' gates: tensors whose travel is about rate times
        updates."""
        gates = self.passes is not None and self.passes.kind != "plain"
        table = self.modulation == "static" or (self.module is not None and bool(self.tables))
        return self.step_norm or table or self.middle == "affine" or gates


LAST = 4  # layers that LoRA on the last ones has

FULL = Arm("the full model", "all", fit="none")
CUT = Arm("the cut model", "one", fit="none")
CONTROLLER = Arm("Controller", "loop", "controller", reads=True, gate=True, step_norm=True)
STATIC = Arm("static table", "loop", "static", gate=True, step_norm=True)
NONE = Arm("loop without modulation", "loop", gate=True, step_norm=True)
LORA = Arm("LoRA on the cut model", "one", lora="kept")


def _like(arm: Arm, what: str, **changes) -> Arm:
    """A variant of an arm; `what` is added to its name."""
    return replace(arm, label=f"{arm.label}, {what}", **changes)


_LOOPS = {"controller": CONTROLLER, "static": STATIC, "none": NONE}

# a loop that pays? (docs/hypotheses.md): what is tried, and what it must beat; `lora` and `lora_layer` are too
PAYS = {
    "scan": _like(CUT, "other layers kept or passed again", scans=True),
    "lora_coda": Arm("LoRA on the coda, at the same trained count", "one", lora="kept_coda"),
    "lora_last": Arm(f"LoRA on the last {LAST} layers", "one", lora="kept_last"),
    "lora_other": Arm("LoRA, another middle layer kept", "one", lora="kept", other=True),
    "lora_layers": Arm("LoRA on the cut model with three layers more", "one", lora="kept", more=3),
    **{name: replace(LORA, label=label, passes=passes) for name, label, passes in (
        ("repeat", "LoRA and one extra pass", Passes()),
        ("repeat_more", "LoRA and three extra passes", Passes(3)),
        ("repeat_static", "LoRA and three extra passes, scaled by a table", Passes(3, modulation="static")),
        ("repeat_controller", "LoRA and three extra passes, scaled by a Controller",
         Passes(3, modulation="controller")),
        ("repeat_affine", "LoRA and three channel-wise affines", Passes(3, kind="affine")),
        ("block_two", "LoRA and one extra pass over two layers", Passes(layers=2)),
        ("block_three", "LoRA and one extra pass over three layers", Passes(layers=3)),
        ("bases_static", "a pass a removed layer, its frozen bases scaled by a table; LoRA",
         Passes(None, at="middle", bases="frozen", modulation="static")),
        ("bases_controller", "a pass a removed layer, its frozen bases scaled by a Controller; LoRA",
         Passes(None, at="middle", bases="frozen", modulation="controller")))},
    "taught": replace(LORA, label="LoRA and three extra passes, taught the full model's states",
                      passes=Passes(3, at="middle"), teacher="states"),
    "bases_trained": Arm("a damped pass a removed layer, its bases trained", "one",
                         passes=Passes(None, at="middle", bases="trained")),
    "relaxed": Arm("a pass a removed layer, its bases trained (relaxed recursion)", "one",
                   passes=Passes(None, at="middle", kind="plain", bases="trained")),
}

PAYS |= {f"{name}_distilled": _like(arm, "distilled", teacher="logits")
         for name, arm in ({"lora": LORA} | PAYS).items() if arm.trained and arm.teacher == "none"}

ARMS = {
    "full": FULL, "cut": CUT, **_LOOPS,
    # which part does it
    **{f"{name}_nogate": _like(arm, "no gate", gate=False) for name, arm in _LOOPS.items()},
    **{f"{name}_nonorm": _like(arm, "no step norms", step_norm=False) for name, arm in _LOOPS.items()},
    "controller_nogate_nonorm": _like(CONTROLLER, "neither gate nor step norms", gate=False, step_norm=False),
    # step norms that begin where the stream is
    **{f"{name}_matched": _like(arm, "step norms from the stream's size", matched=True)
       for name, arm in _LOOPS.items()},
    # blind to the input, with as many parameters as the Controller
    "static_wide": replace(STATIC, label="wide static table", modulation="static_wide"),
    "controller_blind": replace(CONTROLLER, label="Controller that reads a constant", modulation="controller_blind",
                                reads=False),
    # as much variation, no information
    "controller_other": replace(CONTROLLER, label="Controller that reads another sequence",
                                modulation="controller_other"),
    # the authors' next step
    "controller_coda_lora": _like(CONTROLLER, "LoRA on the coda", lora="coda"),
    # what one would do instead of looping
    "lora": LORA,
    "lora_layer": Arm("LoRA on the cut model with a layer more", "one", lora="kept", more=1),
    # how much of a recovery is that the text is trained on
    "full_lora": Arm("LoRA on the intact model", "all", lora="kept"),
    "linear_fit": Arm("fitted linear maps", "maps", fit="least squares"),
    "linear": Arm("trained linear maps", "maps"),
    "cut_coda_lora": _like(CUT, "LoRA on the coda", fit="gradient", lora="coda"),
    # the system behind the paper's evidence for the gate (system.md `refiner`)
    "refine": Arm("refiner of the intact model", "refine", gate=True, step_norm=True),
    "refine_nogate": Arm("refiner, neither gate nor step norms", "refine"),
    "refine_base": Arm("the intact model as the refiner reads it", "intact", fit="none"),
    # how much of a loss is the target's alone
    "affine": Arm("a scale and a shift of each channel", "affine"),
    "bare": Arm("the kept layers, nothing between them", "none", fit="none"),
    "unigram": Arm("unigram", "counts", fit="none"),
    # under t+2 skip-bigrams
    "bigram": Arm("counts of token pairs, all training text", "counts", pairs=True, fit="none"),
    "bigram_seen": Arm("counts of token pairs, a run's own text", "counts", pairs=True, fit="counts"),
    # the loop before it learns anything
    "untrained": _like(NONE, "untrained", fit="none"),
    "untrained_matched": _like(NONE, "untrained, step norms from the stream's size", matched=True, fit="none"),
    "untrained_nonorm": _like(NONE, "untrained, no step norms", step_norm=False, fit="none"),
    **PAYS,
    # the cut model with fewer or more layers
    **{f"cut_{ends}": _like(CUT, f"{ends} layers at either end", ends=ends) for ends in (2, 4, 6, 10, 12)},
}

# the seven modulated projections, as in model/configuration.py
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

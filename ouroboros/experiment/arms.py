"""What an arm puts in place of the removed layers, as data. Never imports torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """What an arm puts in place of the removed layers, and what it trains."""

    middle: Literal["all", "one", "two", "maps", "loop", "affine", "none", "intact", "refine", "counts"]
    """Between prelude and coda: every layer of the base; the recurrent layer once; it and the layer after it; it once,
    between two linear maps; it, looped; a scale and a shift of each channel; nothing. `refine`: every layer, and the
    last one again, looped; `intact`: that system without its loop. `counts`: no network at all, but the frequencies of
    tokens in the training text."""
    modulation: str = "none"  # of a loop: `modulation.MODULATIONS`
    gate: bool = False
    step_norm: bool = False
    matched: bool = False  # step norms begin at the stream's root mean square instead of 1
    lora: Literal["none", "kept", "coda"] = "none"  # where LoRA is trained: every kept layer, or the coda alone
    coda: bool = False  # trained whole
    ends: int | None = None  # layers kept at either end; None: the profile's split
    fit: Literal["none", "least squares", "gradient"] = "gradient"

    @property
    def loops(self) -> bool:
        return self.middle in ("loop", "refine")

    @property
    def trained(self) -> bool:
        return self.fit == "gradient"

    @property
    def loadable(self) -> bool:
        """Whether a library loads what it trained: a loop on a frozen base, or LoRA on the cut model (`trained`)."""
        loop = self.middle == "loop" and self.trained and self.lora == "none" and not self.coda
        return loop or (self.middle == "one" and self.lora == "kept")

    @property
    def modulated(self) -> bool:
        return self.modulation != "none"

    @property
    def elementwise(self) -> bool:
        """Whether it trains step norms, a table or an affine: tensors whose travel is about rate times updates."""
        return self.step_norm or self.modulation == "static" or self.middle == "affine"


def _loop(modulation: str, gate: bool = True, step_norm: bool = True, **more) -> Arm:
    return Arm("loop", modulation, gate, step_norm, **more)


ARMS = {
    "full": Arm("all", fit="none"),
    "cut": Arm("one", fit="none"),
    "controller": _loop("controller"),
    "static": _loop("static"),
    "none": _loop("none"),
    # which part does it
    "controller_nogate": _loop("controller", gate=False),
    "static_nogate": _loop("static", gate=False),
    "none_nogate": _loop("none", gate=False),  # step norms alone
    "none_nonorm": _loop("none", step_norm=False),  # the gate alone
    "controller_nonorm": _loop("controller", step_norm=False),
    "static_nonorm": _loop("static", step_norm=False),
    "controller_nogate_nonorm": _loop("controller", gate=False, step_norm=False),
    # step norms that begin where the stream is
    **{f"{name}_matched": _loop(name, matched=True) for name in ("controller", "static", "none")},
    # blind to the input, with as many parameters as the Controller
    "static_wide": _loop("static_wide"),
    "controller_blind": _loop("controller_blind"),
    # the Controller reads another sequence of its batch: as much variation, no information
    "controller_other": _loop("controller_other"),
    # with the coda trained too
    **{f"{name}_coda_lora": _loop(name, lora="coda") for name in ("controller", "static", "none")},
    **{f"{name}_coda_full": _loop(name, coda=True) for name in ("controller", "static", "none")},
    # what one would do instead of looping
    "lora": Arm("one", lora="kept"),
    "lora_layer": Arm("two", lora="kept"),
    "linear_fit": Arm("maps", fit="least squares"),
    "linear": Arm("maps"),
    "cut_coda_lora": Arm("one", lora="coda"),
    "cut_coda_full": Arm("one", coda=True),
    # the system behind the paper's evidence for the gate (system.md `refiner`)
    "refine": Arm("refine", gate=True, step_norm=True),
    "refine_nogate": Arm("refine"),  # nor step norms
    "refine_base": Arm("intact", fit="none"),
    # how much of a loss is the target's alone
    "affine": Arm("affine"),
    "bare": Arm("none", fit="none"),
    "unigram": Arm("counts", fit="none"),
    "bigram": Arm("counts", fit="none"),  # under t+2 a skip-bigram
    # the loop before it learns anything
    "untrained": _loop("none", fit="none"),
    "untrained_matched": _loop("none", matched=True, fit="none"),
    "untrained_nonorm": _loop("none", step_norm=False, fit="none"),
    # the cut model with fewer or more layers
    **{f"cut_{ends}": Arm("one", ends=ends, fit="none") for ends in (2, 4, 6, 10, 12)},
}
CORE = ("full", "cut", "controller", "static", "none")

# the seven modulated projections, as in model/configuration.py
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

READS = ("controller", "controller_other")  # modulations that read the state: computed for each token

"""A run, and the row of a table that it is made for; both have a name that says what they are."""

from dataclasses import dataclass
from typing import Literal

from .arms import ARMS
from .protocol import COLUMNS, switches, trained_under


@dataclass(frozen=True)
class RunSpec:
    """One training run (of what isn't trained, one evaluation), the unit that has a raw log."""

    arm: str
    depth: int | Literal["mixed"] | None
    rank: int | None
    protocol: str
    seed: int
    rate: float | None = None  # of a search; None: the rate that the search chose
    factor: float | None = None  # of a search: the elementwise rate as a multiple of that one; None: what it chose
    level: str | None = None  # a factor of that rate, by its name
    updates: int | None = None  # None: the profile's
    aim: Literal["matrix", "screen", "pays"] = "matrix"  # the tables; a choice on dev; docs/hypotheses.md

    @property
    def id(self) -> str:
        parts = [self.arm, self.depth and f"d{self.depth}", self.rank and f"r{self.rank}", self.protocol,
                 f"s{self.seed}", self.rate and f"lr{self.rate:g}", self.factor and f"x{self.factor:g}", self.level,
                 self.updates and f"u{self.updates}"]
        return "-".join(part for part in parts if part)

    @property
    def purpose(self) -> str:
        return self.aim if self.rate is None and self.factor is None else "rate"

    @property
    def chooses(self) -> bool:
        """Whether a rate, or what is confirmed, is chosen by it: then it is scored on dev alone."""
        return self.purpose in ("rate", "screen")

    @property
    def fit(self) -> str:
        """How the run learns, `Arm.fit`; nothing trains where all that could is dead (system.md `dead Controller`)."""
        dead = self.arm == "refine_nogate" and self.protocol.startswith(COLUMNS[0])
        return "none" if dead else ARMS[self.arm].fit

    @property
    def trained(self) -> bool:
        return self.fit == "gradient"


@dataclass(frozen=True)
class Cell:
    """One row of a table; several cells may be measured by one run (protocol.md `depth`)."""

    arm: str
    depth: int | None
    rank: int | None
    protocol: str
    seed: int
    level: str | None = None
    updates: int | None = None

    @property
    def run(self) -> RunSpec:
        if ARMS[self.arm].middle == "intact":  # its last state is normed as the column says
            return RunSpec(self.arm, None, None, self.protocol.partition("+")[0], self.seed)
        if ARMS[self.arm].fit == "none":  # the protocol only decides what is read off its log
            return RunSpec(self.arm, self.depth, None, "any", self.seed)
        depth = self.depth
        if switches(self.protocol)["depth"] == "drawn" and ARMS[self.arm].modulation == "controller":
            depth = "mixed"  # the released Controller draws its depths, whatever depth is given
        return RunSpec(self.arm, depth, self.rank, trained_under(self.protocol, self.arm), self.seed, level=self.level,
                       updates=self.updates)

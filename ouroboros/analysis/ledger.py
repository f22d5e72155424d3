"""What the paper claims, as typed: the schema of `claims.yaml`, and what its numbers alone give.

Never imports torch. Nothing measured stands here; `claims.py` judges each claim on the raw logs.
"""

import functools
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import InputError
from ..experiment.yaml_files import read_yaml, validated

FILE = Path(__file__).parent / "claims.yaml"
PAPER_RANK = 32  # the paper's base rank (system.md 3), of which a claim's rank is told

READS = {"reduction": ("cut",), "recovery": ("cut", "full")}  # beside the claim's own arms
CHANGES = ("rise from depth 1", "fall from depth 1", "fall from depth to depth")
TAKES = {"loss": ("minus", "by", "depth", "rank", "column"), "reduction": ("depth", "rank"),
         "recovery": ("depth", "rank"), "spread": (), **dict.fromkeys(CHANGES, ("minus",))}
PLACES = {"": "", "depth": "every depth", "own depth": "every depth of the first", "rank": "every rank"}
QUOTED = "must be a number in quotes, digits as in the source"


RECOMPUTE = {
    "difference": lambda a, b: a - b,
    "reduction": lambda cut, arm: 100 * (cut - arm) / cut,  # in percent, (L17 - Lc) / L17
    "recovery": lambda cut, arm, full: 100 * (cut - arm) / (cut - full),  # (L17 - Lc) / (L17 - L36)
    "spread": lambda ends: max(ends) - min(ends),
    "parameters": lambda: 9.214592,  # million, system.md 6 at d = 2048 and r = 32; the tests count it on the model
}


def _number_or_ends(value: object) -> object:
    ends = value if isinstance(value, list) and len(value) == 2 else [value]
    if value is not None and not all(isinstance(end, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?", end) for end in ends):
        raise ValueError(f"{QUOTED}, or a list of two")
    return value


def _number(value: object) -> object:
    if not isinstance(_number_or_ends(value), str):
        raise ValueError(QUOTED)
    return value


Typed = Annotated[str, BeforeValidator(_number)]
Words = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Recompute(_Strict):
    """The claim's quantity from the reported numbers of other claims."""

    function: Literal[tuple(RECOMPUTE)]
    of: list[str]


class Measure(_Strict):
    """What measures a claim, as the arguments of `comparisons.Comparisons`. An arm need not exist yet."""

    arm: str
    minus: str | None = None  # the arm whose loss is subtracted
    statistic: Literal[tuple(TAKES)] = "loss"
    by: Literal[tuple(PLACES)] = ""
    depth: Annotated[int, Field(gt=0)] | None = None
    rank: Annotated[int, Field(gt=0)] | None = None  # the paper's, where the base rank is 32
    column: Literal["loss", "heldout"] = "loss"  # as the protocol reports it, or on held-out text

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that is read, the claim's own first."""
        own = (self.arm, self.minus) if self.minus else (self.arm,)
        return (*own, *READS.get(self.statistic, ()))

    @property
    def of_depths(self) -> bool:
        """Whether this is one arm's loss at a depth, or how that changes over depths."""
        changes = self.statistic in (*CHANGES, "spread") or self.statistic == "loss" and self.depth is not None
        return changes and not self.minus

    @property
    def several_depths(self) -> bool:
        """Whether it is read at more depths than one."""
        return "depth" in self.by or self.statistic in (*CHANGES, "spread")

    @property
    def places(self) -> str:
        """At which depths, ranks and rates it is read, where these are several."""
        if self.statistic == "spread":
            return "every depth; every other rank and rate"
        where = PLACES["depth" if self.statistic in CHANGES else self.by]
        return where + (", held-out text" if self.column == "heldout" else "")


class Claim(_Strict):
    """One claim: what is reported, where, and how it is judged. The head of `claims.yaml` says what
    each field is."""

    id: Annotated[str, Field(pattern=r"^\w+$")]
    what: Words
    reported: Annotated[str | list[str] | None, BeforeValidator(_number_or_ends)] = None
    also: dict[str, Typed] = {}
    words: Words | None = None
    unit: Literal["nats per token", "%", "million"] | None = None
    source: Annotated[list[Literal["A", "R", "C", "D"]], Field(min_length=1)]
    secondary: bool = False
    unsupported: Words | None = None
    open: Words | None = None
    rule: Literal["value", "positive", "negative", "small", "count"]
    recompute: Recompute | None = None
    measure: Measure | None = None
    unmeasured: Words | None = None
    notes: dict[Literal["released", "corrected"], Words] = {}

    @property
    def typed(self) -> list[str]:
        """The reported number, or the two ends of its range, as typed; nothing for words."""
        return [self.reported] if isinstance(self.reported, str) else list(self.reported or ())

    @property
    def numbers(self) -> list[float]:
        return [float(text) for text in self.typed]

    @property
    def decimals(self) -> int:
        """Decimals of the reported number, of a range the most that an end has."""
        return max(len(text.partition(".")[2]) for text in self.typed)

    @property
    def reported_text(self) -> str:
        """What is reported, digits as typed: a number with its unit, words, or `as stated`."""
        if not self.typed:
            return self.words or "as stated"
        more = [*([self.words] if self.words else []), *(f"{name}: {number}" for name, number in self.also.items())]
        return f"{' to '.join(self.typed)} {self.unit}" + (f" ({', '.join(more)})" if more else "")

    @property
    def sources(self) -> str:
        return " ".join(self.source) + (" (secondary)" if self.secondary else "")


@functools.cache
def read_claims(file: Path = FILE) -> tuple[Claim, ...]:
    """Every claim of a ledger. Raises InputError, naming file, claim, field and value."""
    data = read_yaml(file)
    if not isinstance(data, list):
        raise InputError(f"{file.name}: {type(data).__name__}: a ledger is a list of claims")
    claims = [_parse(entry, place, file.name) for place, entry in enumerate(data, 1)]
    ids = [claim.id for claim in claims]
    for place, claim in enumerate(claims):
        where = f"{file.name}: claim '{claim.id}'"
        if claim.id in ids[:place]:
            raise InputError(f"{where}: id: '{claim.id}': another claim has it")
        for name in claim.recompute.of if claim.recompute else ():
            if name not in ids:
                raise InputError(f"{where}: recompute.of: '{name}': no claim has that id")
    return tuple(claims)


def _parse(entry, place: int, file: str) -> Claim:
    named = isinstance(entry, dict) and "id" in entry
    name = f"claim '{entry['id']}'" if named else f"claim number {place}"
    claim = validated(Claim, entry, f"{file}: {name}")
    for field, value, mend in _contradictions(claim):
        raise InputError(f"{file}: {name}: {field}: {value!r}: {mend}")
    return claim


def _contradictions(claim: Claim):
    """(field, value, how to mend it) of each field that doesn't go with the others."""
    measure, only_d = claim.measure, claim.source == ["D"]
    if claim.secondary != only_d:
        mend = f"must be {str(only_d).lower()}: the source is {' '.join(claim.source)}"
        yield "secondary", claim.secondary, mend
    if claim.rule in ("value", "count") and not claim.typed:
        yield "reported", claim.reported, f"the rule '{claim.rule}' needs a number"
    if claim.typed and claim.unit is None:
        yield "unit", None, "a reported number needs one"
    if claim.rule != "count" and (measure is None) == (claim.unmeasured is None):
        mend = "a claim has either this or 'unmeasured', which says why not"
        yield "measure", measure and measure.statistic, mend
    for field in sorted(measure.model_fields_set - {"arm", "statistic"}) if measure else ():
        if field not in TAKES[measure.statistic]:
            yield f"measure.{field}", getattr(measure, field), f"the statistic '{measure.statistic}' has none"
    if measure and measure.by and measure.depth:
        yield "measure.by", measure.by, "a measure has either this or a depth"


def numbers(claims: Iterable[Claim]) -> dict[str, Decimal]:
    """{name: a reported number}, which keeps its digits: a claim's id, `Lc.low` and `Lc.high` of a range,
    `gate.before` of another number of its row."""
    found: dict[str, Decimal] = {}
    for claim in claims:
        names = [claim.id] if len(claim.typed) == 1 else [f"{claim.id}.low", f"{claim.id}.high"]
        found |= {name: Decimal(text) for name, text in zip(names, claim.typed, strict=False)}
        found |= {f"{claim.id}.{name}": Decimal(text) for name, text in claim.also.items()}
    return found


def recomputed(claim: Claim, claims: Iterable[Claim]) -> float | None:
    """The claim's value from other reported values; of a range its middle. None: no formula."""
    if claim.recompute is None:
        return None
    function, numbers = claim.recompute.function, {other.id: other.numbers for other in claims}
    values = [numbers[name] for name in claim.recompute.of]
    if function != "spread":
        values = [sum(ends) / len(ends) for ends in values]
    return RECOMPUTE[function](*values)

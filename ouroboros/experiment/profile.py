"""A profile (`profiles/<name>.yaml`): at what scale things run, and the ordered plan of its runs."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..errors import InputError
from .arms import ARMS
from .checks import check
from .plan import Cell, RunSpec
from .protocol import COLUMNS, PROTOCOL_VERSION, SWITCHES
from .schema import (
    RATES,
    BaseConfig,
    CorpusConfig,
    Entry,
    Evaluation,
    Name,
    OwnArm,
    Part,
    Positive,
    Probes,
    Resources,
    Scanned,
    SplitConfig,
    Strict,
    Training,
    Widths,
)
from .yaml_files import read_yaml, validated

PROFILES = Path(__file__).parent / "profiles"
IDENTITY = ("corpus", "base", "split", "rank", "depth", "max_steps", "controller", "training", "evaluation", "probes")
SOURCE_FILE = "source.json"  # beside a base that was made of a GGUF file: what it was made from


class Profile(Strict):
    """A scale at which everything runs, and the plan of its runs; see the YAML files."""

    name: Name
    corpus: CorpusConfig
    base: BaseConfig
    base_of: Name | None = None  # the profile whose base this one has
    split: SplitConfig
    rank: Positive  # the base rank, 32 in the paper
    depth: Positive  # the base depth, 8 in the paper
    max_steps: Positive = 64
    controller: Widths
    training: Training
    evaluation: Evaluation
    probes: Probes
    plan: Annotated[tuple[Entry, ...], Field(min_length=1)]  # most important first: an unfinished plan is a smaller one
    keep_prelude: bool = False  # on disk, between runs, the states that they all meet; changes no result
    checkpoints: tuple[str, ...] = ()  # runs whose trained tensors are committed
    prompts: tuple[str, ...] = ()  # that their models continue, for a person to read
    own_arms: dict[Part, OwnArm] = {}  # arms beside those of the package
    scanned: Scanned | None = None
    siblings: dict[str, str] = {}  # {arm: the arm whose learning rates it takes}, of arms that aren't searched
    resources: Resources
    packages: dict[str, str] = {}  # versions that its logs were made with where they aren't the lock's

    def folder(self, root: Path) -> Path:
        return Path(root) / "results" / self.name

    def base_folder(self, root: Path) -> Path:
        """Where a base that is pretrained here lies, with its log, `base.jsonl`."""
        return Path(root) / "results" / (self.base_of or self.name) / "checkpoints" / "base"

    def run_path(self, run_id: str, root: Path) -> Path:
        """The raw log of a finished run."""
        return self.folder(root) / "runs" / f"{run_id}.jsonl"

    def unfinished(self, run_id: str, root: Path) -> Path:
        """The folder of a run that hasn't ended: what it has measured, and its checkpoint. Git ignores it."""
        return self.folder(root) / "unfinished" / run_id

    def fetched_base(self, root: Path) -> Path:
        """The folder that `fetch` makes of a GGUF file; git ignores it."""
        return Path(root) / ".cache" / "bases" / (self.base_of or self.name)

    def base_source(self, root: Path) -> Path:
        """The folder of the base: the one pretrained here, the one made of a GGUF file, a local one,
        or a hub model's files, fetched once.

        Raises InputError when a hub model can't be had, or when none is made yet of the GGUF file.
        """
        if self.base.source:
            record = self.fetched_base(root) / SOURCE_FILE
            if not record.exists() or json.loads(record.read_text(encoding="utf-8"))["source"] != self.base.source:
                raise InputError(f"{record.parent}: no base there, or one of another source; make "
                                 f"base PROFILE={self.base_of or self.name} makes it")
            return record.parent
        if self.base.path is None:
            return self.base_folder(root)
        if Path(self.base.path).exists():
            return Path(self.base.path)
        import huggingface_hub

        try:
            return Path(huggingface_hub.snapshot_download(self.base.path, revision=self.base.revision,
                                                          allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:  # no connection, no such model, no such folder
            raise InputError(f"profile '{self.name}': base.path '{self.base.path}' is no folder and can't be fetched "
                             f"({str(error).splitlines()[0]}); name a local folder or check the connection") from None

    def register_arms(self, file: str = "own_arms") -> None:
        """Add its own arms to `ARMS`; in a process that didn't read its file too."""
        for name, own in self.own_arms.items():
            own.add_to_arms(name, f"{file}: own_arms.{name}")

    @property
    def base_name(self) -> str:
        """What a checkpoint calls its base: a hub's name or a folder, seen from the checkout where it lies there."""
        if self.base.path and not self.base.source:
            return self.base.path
        return (self.fetched_base if self.base.source else self.base_folder)(Path()).as_posix()

    def tokenizer_path(self, root: Path) -> Path:
        return self.base_source(root) / "tokenizer.json"

    def split_of(self, arm: str) -> SplitConfig:
        ends = ARMS[arm].ends
        if ARMS[arm].other:
            return self.split.model_copy(update={"recurrent": self.scanned.kept})
        return self.split if ends is None else self.split.model_copy(update={"prelude": ends, "coda": ends})

    def rank_of(self, arm: str) -> int | None:
        return self.rank if ARMS[arm].modulated else None

    def cells(self) -> list[Cell]:
        """Every row of the plan's tables, each once, in the plan's order."""
        return list(dict.fromkeys(cell for entry in self.plan if entry.purpose == "matrix" for cell in self._of(entry)))

    def _of(self, entry: Entry) -> Iterator[Cell]:
        for seed, protocol, arm in itertools.product(entry.seeds, entry.protocols, entry.arms):
            depths = (entry.depths or (self.depth,)) if ARMS[arm].loops else (None,)
            ranks = (entry.ranks or (self.rank,)) if ARMS[arm].modulated else (None,)
            for depth, rank, level in itertools.product(depths, ranks, entry.levels or (None,)):
                updates = entry.updates if entry.updates != self.training.updates else None
                yield Cell(arm, depth, rank, protocol, seed, level, updates)

    def runs_of(self, entry: Entry) -> list[RunSpec]:
        """An entry's runs, each once; of a search, a run for each rate that is tried."""
        runs = [cell.run for cell in self._of(entry)]
        if entry.purpose == "rate":
            runs = [replace(run, **point) for run in runs for point in (
                *({"rate": rate} for rate in entry.rates),
                *({"factor": factor} for factor in entry.factors if ARMS[run.arm].elementwise))]
        elif entry.purpose != "matrix":
            runs = [replace(run, aim=entry.purpose) for run in runs]
        return list(dict.fromkeys(runs))

    def runs(self) -> list[RunSpec]:
        """Every run of the plan, searches too, each once, in the plan's order; without the steps outward that a search
        may take (`learning_rates.planned`)."""
        return list(dict.fromkeys(run for entry in self.plan for run in self.runs_of(entry)))

    def search_runs(self) -> list[RunSpec]:
        """The learning-rate searches' runs alone."""
        return list(dict.fromkeys(run for entry in self.plan if entry.purpose == "rate" for run in self.runs_of(entry)))

    def declared(self, spec: RunSpec) -> dict[str, str]:
        """What the plan says of a run of docs/hypotheses.md, for its manifest: `class` and `budget`."""
        entry = next((entry for entry in self.plan if entry.role and entry.purpose == spec.purpose and spec.arm in
                      entry.arms and spec.seed in entry.seeds and (entry.updates or self.training.updates) ==
                      (spec.updates or self.training.updates)), None)
        return {"class": entry.role, "budget": entry.budget} if entry else {}

    def at(self, spec: RunSpec) -> "Profile":
        """The profile as one of its runs sees it: with that run's updates."""
        return self.model_copy(update={"training": self.training.model_copy(
            update={"updates": spec.updates or self.training.updates})})

    def identity(self, spec: RunSpec) -> dict:
        """What a run's manifest must agree with for the run to count as made."""
        fields = (*IDENTITY, "own_arms") if spec.arm in self.own_arms else IDENTITY
        fields = (*fields, "scanned") if ARMS[spec.arm].scanned else fields
        config = self.at(spec).model_dump(mode="json", include=set(fields), exclude_none=True)
        return {"protocol_version": PROTOCOL_VERSION} | {f"config.{field}": config[field] for field in fields}

    def mismatch(self, manifest: dict, spec: RunSpec) -> str | None:
        """In one line, why a log isn't that of the run that the plan means; None if it is."""
        flat = manifest | {f"config.{field}": _without_none(value) for field, value in manifest["config"].items()}
        for field, wanted in self.identity(spec).items():
            if flat.get(field) != wanted:
                mend = "; give a changed arm another name" if field.endswith("own_arms") else ""
                return f"field '{field}': {_first_difference(flat.get(field), wanted)}{mend}"
        pinned = self.corpus.sha256
        if pinned and manifest["hashes"]["corpus"] != pinned:
            return f"field 'hashes.corpus': {manifest['hashes']['corpus'][:12]}, the profile pins {pinned[:12]}"
        return None

    def find(self, run_id: str) -> RunSpec:
        """The run of that id. Raises InputError when the profile declares none."""
        outward = (replace(spec, rate=rate) for spec in self.search_runs() if spec.rate for rate in RATES)
        for spec in itertools.chain(self.runs(), outward):
            if spec.id == run_id:
                return spec
        raise InputError(f"run '{run_id}': profile '{self.name}' declares no such run; finished ones are in results/"
                         f"{self.name}/runs, python -m ouroboros runs --profile {self.name} --dry-run lists the others")

    # ------------------------------------------------------------------------------- what tables ask of a plan

    @property
    def protocols(self) -> tuple[str, ...]:
        """The whole columns that the plan has, without flipped switches."""
        planned = {protocol for entry in self.plan if entry.purpose == "matrix" for protocol in entry.protocols}
        return tuple(column for column in COLUMNS if column in planned)

    def _plain(self) -> list[Cell]:
        """The rows of whole columns at the profile's own budget."""
        return [cell for cell in self.cells() if cell.protocol in COLUMNS and cell.updates is None]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.arm for cell in self._plain()))

    @property
    def instead(self) -> tuple[str, ...]:
        """The arms that train a network without a loop: what one would do instead."""
        return tuple(arm for arm in self.arms if ARMS[arm].fit not in ("none", "counts") and not ARMS[arm].loops)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({cell.seed for cell in self.cells()}))

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of updates at which whole columns are planned."""
        planned = {entry.updates for entry in self.plan if entry.purpose == "matrix" and entry.updates}
        return tuple(sorted(planned | {self.training.updates}))

    def depths_of(self, arm: str, protocols: tuple[str, ...] = COLUMNS) -> tuple[int, ...]:
        """The depths at which an arm that loops is planned, at the base rank and the chosen rate, in either column."""
        return tuple(sorted({cell.depth for cell in self._plain() if cell.arm == arm and cell.depth is not None
                             and cell.level is None and cell.rank in (None, self.rank) and cell.protocol in protocols}))

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths at which Controller and static are compared."""
        return self.depths_of("controller")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The other ranks at which Controller and static are compared."""
        return tuple(sorted({cell.rank for cell in self._plain() if cell.rank not in (None, self.rank)}))

    @property
    def levels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.level for cell in self._plain() if cell.level))

    @property
    def flipped(self) -> tuple[str, ...]:
        """The switches that the plan flips alone, in some column."""
        planned = {protocol for entry in self.plan for protocol in entry.protocols}
        return tuple(name for name in SWITCHES if any(f"{column}+{name}" in planned for column in COLUMNS))

    def flipped_depths(self, switch: str) -> tuple[int, ...]:
        """The depths at which a switch is flipped alone, at the base rank."""
        names = {f"{column}+{switch}" for column in COLUMNS}
        entries = (entry for entry in self.plan if entry.purpose == "matrix" and names.intersection(entry.protocols))
        return tuple(sorted({depth for entry in entries for arm in entry.arms if ARMS[arm].loops
                             and (not ARMS[arm].modulated or self.rank in (entry.ranks or (self.rank,)))
                             for depth in entry.depths or (self.depth,)}))

    @property
    def audit_depths(self) -> tuple[int, ...]:
        """The depths at which every switch is flipped; `alpha` is flipped at other ranks."""
        found = [set(self.flipped_depths(switch)) for switch in self.flipped if switch != "alpha"]
        return tuple(sorted(set.intersection(*found))) if found else ()


def _without_none(value):
    """A configuration without the fields that say nothing: one that came later is none in older logs."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return value


def _first_difference(found, wanted) -> str:
    """Where two values of a configuration part, in few words."""
    place = []
    while isinstance(found, dict) and isinstance(wanted, dict):
        place.append(next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name)))
        found, wanted = found.get(place[-1]), wanted.get(place[-1])
    where = f"'{'.'.join(place)}' " if place else ""
    return f"{where}is {found!r:.60}, the profile says {wanted!r:.60}"


def load_profile(name: str) -> Profile:
    """Read and validate `profiles/<name>.yaml`, or a YAML file of that path. Raises InputError, naming file, field and
    value."""
    path = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    packaged = sorted(file.stem for file in PROFILES.glob("*.yaml"))
    if not os.path.isfile(path):  # false where the name can't be one, too
        raise InputError(f"profile '{name:.80}': unknown; one of {', '.join(packaged)}, or the path of a YAML file")
    data = read_yaml(path)
    if path.parent.resolve() != PROFILES.resolve() and isinstance(data, dict) and data.get("name") in packaged:
        raise InputError(f"{path}: name: '{data['name']}': a profile of the package has it, and runs would be put "
                         "among its own; choose another")
    return parse_profile(data, path.name)


def parse_profile(data: dict, file: str) -> Profile:
    """Validate a profile given as plain data; `file` is named in the error. Its own arms are registered."""
    profile = validated(Profile, data, file)
    profile.register_arms(file)
    check(profile, file)
    return profile

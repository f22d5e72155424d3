"""What conversion and generation cost, as ratios against the alternative in the same run: `make bench`.

Calls that are compared take turns, so that both meet the same moods of the machine; medians and ranges are written to
results/bench with the hardware. Nothing heavy should run beside it.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from .experiment import Profile, load_profile
from .modeling import OuroborosForCausalLM
from .provenance import provenance
from .runlog import write_atomic
from .surgery import mean_residual, open_base, truncated_svd

PAPER_UP = (11008, 2048)  # up_proj of Qwen2.5-3B (SYSTEM section 2), of the largest shape of the seven
CHECKPOINT = dict(vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
                  num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True)  # 1.1 GB in float32
MEGABYTE = 1e6


def take_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, in turns; one turn before that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_convert, (str(folder), split, rank))


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
    for depth in (1, 4, 8, 16):
        model = OuroborosForCausalLM.from_base(base, split.prelude, split.recurrent, split.coda, rank=profile.rank,
                                               alpha=profile.rank / 2, depth=depth).eval()

        def write(use_cache: bool, model=model) -> None:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=256, min_new_tokens=256,
                           do_sample=False, use_cache=use_cache, pad_token_id=0)

        seconds = take_turns({"cached": lambda: write(True), "uncached": lambda: write(False)}, repeats=3)
        rows.append({"depth": depth} | _compared(seconds, "cached", "uncached"))
    return pd.DataFrame(rows)


BENCHES = {"svd": svd, "conversion": conversion, "generation": generation}


def bench(names: list[str], root: Path) -> None:
    """Run the named benches, each to a table of its own in results/bench, with a manifest of machine and commit."""
    profile, folder = load_profile("tiny"), root / "results" / "bench"
    for name in names:
        table = BENCHES[name](profile, root)
        text = table.to_markdown(index=False, floatfmt=".3g")
        write_atomic(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        write_atomic(folder / f"{name}.md", text + "\n")
        manifest = provenance(root) | {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
        write_atomic(folder / f"{name}.json", json.dumps(manifest, indent=1) + "\n")
        print(f"{name}\n{text}\n")

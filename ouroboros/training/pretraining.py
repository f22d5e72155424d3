"""Pretrain the base model of a profile whose base can't be fetched: a Qwen2 model on the profile's own corpus."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from ..errors import InputError
from ..experiment.profile import Profile
from ..experiment.protocol import PROTOCOL_VERSION
from ..experiment.schema import Pretraining
from ..log import WorkingLog
from ..provenance import provenance
from .corpus import Corpus, content_sha256, prepare
from .status import hold
from .trainer import plain_loss

EVALUATION_BLOCKS = 64


def pretrain(profile: Profile, root: Path, force: bool = False) -> Path:
    """Pretrain and save the base under results/<profile>/base; a finished one is left alone.

    Raises InputError when the profile names a pretrained base instead, Busy when another process makes it.
    """
    if profile.base.pretraining is None:
        raise InputError(f"profile '{profile.name}': its base is {profile.base.path}, nothing is to be pretrained")
    if profile.base_of:
        raise InputError(f"profile '{profile.name}': its base is that of profile '{profile.base_of}': make base "
                         f"PROFILE={profile.base_of}")
    folder = profile.base_folder(root)
    with hold(profile.name, "base", root):
        if force or not (folder / "base.jsonl").exists():
            _pretrain(profile, root, folder)
    return folder


def _pretrain(profile: Profile, root: Path, folder: Path) -> None:
    (folder / "base.jsonl").unlink(missing_ok=True)
    corpus = prepare(profile, root)
    recipe, started = profile.base.pretraining, time.strftime("%Y-%m-%dT%H:%M:%S%z")
    environment, clock = provenance(root), time.perf_counter()
    log = WorkingLog(profile.unfinished("base", root))
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(Qwen2Config(**profile.base.model, eos_token_id=corpus.end_of_text,
                                         bos_token_id=corpus.end_of_text)).to(PartialState().device)
    _train(model, recipe, corpus, log)
    model.eval().save_pretrained(folder)
    log.finish(folder / "base.jsonl", {
        "run": "base", "profile": profile.name, "purpose": "base", "seed": recipe.seed,
        "protocol_version": PROTOCOL_VERSION,
        "config": profile.model_dump(mode="json", exclude={"plan", "siblings"}), **environment,
        "hashes": {"corpus": corpus.manifest["sha256"], "tokenizer": corpus.manifest["tokenizer_sha256"],
                   "base": content_sha256((folder / "model.safetensors").read_bytes())},
        "corpus": corpus.manifest, "trainable": sum(p.numel() for p in model.parameters()),
        "status": "finished", "started": started, "wall_seconds": time.perf_counter() - clock,
    })


def _schedule(update: int, updates: int) -> float:
    """The share of the peak rate: warm-up over 2 % of the updates, then a cosine to a tenth."""
    warm_up = max(1, updates // 50)
    if update < warm_up:
        return (update + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (update - warm_up) / max(1, updates - warm_up)))


def _optimizers(model, recipe: Pretraining) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    A base of a few million tokens has few updates, and Muon needs fewer than AdamW; `match_rms_adamw` (Liu et al.
    2025, arXiv 2502.16982) puts its rate on AdamW's scale.
    """
    layers = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in layers]
    others = [p for p in model.parameters() if id(p) not in layers]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=recipe.betas, weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _batches(corpus: Corpus, recipe: Pretraining):
    """(batch, block) inputs and targets, epoch after epoch, each in its own order."""
    epoch = 0
    while True:
        lengths = corpus.lengths("train")
        count = int((lengths.sum() + len(lengths) - 2) // recipe.block)
        if count < recipe.batch:
            raise InputError(f"corpus: split 'train' has {count} blocks of {recipe.block} tokens, "
                             f"base.pretraining.batch is {recipe.batch}; add text or lower it")
        blocks = corpus.blocks("train", recipe.block, count, "separated", seed=recipe.seed + epoch)
        for start in range(0, count - recipe.batch + 1, recipe.batch):
            chunk = torch.from_numpy(blocks[start:start + recipe.batch]).long()
            yield chunk[:, :-2], chunk[:, 1:-1]
        epoch += 1


def _train(model, recipe: Pretraining, corpus: Corpus, log: WorkingLog) -> None:
    optimizers = _optimizers(model, recipe)
    most = {split: int(corpus.lengths(split).sum()) // recipe.block - 1 for split in ("dev", "heldout")}
    evaluation = {split: corpus.blocks(split, recipe.block, max(1, min(EVALUATION_BLOCKS, count)), "separated")
                  for split, count in most.items()}
    points = set(np.linspace(0, recipe.updates, recipe.points + 1).round().astype(int).tolist())
    batches = _batches(corpus, recipe)
    for update in tqdm(range(recipe.updates + 1), desc="base", mininterval=5):
        if update in points:
            for split, blocks in evaluation.items():
                log.row(update, split, "curve/loss_t+1", plain_loss(model.eval(), blocks))
        if update == recipe.updates:
            break
        inputs, targets = next(batches)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(update, recipe.updates)
        model.train()
        logits = model(inputs.to(model.device), use_cache=False).logits  # (batch, block, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(model.device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.row(update + 1, "train", "loss", loss.item())

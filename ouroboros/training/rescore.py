"""The committed checkpoints of a profile: scored anew against their logs, and read by a person."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from ..experiment.profile import Profile
from ..log import read_run, write_atomic
from . import evaluation, trained
from .build import cut_layers, load_base
from .corpus import prepare
from .trainer import as_hidden

TOLERANCE = 1e-3  # nats per token of a block: other kernels round otherwise, other weights differ by far more
NEW_TOKENS = 40
PAGE = "continuations.md"


def rescore(profile: Profile, root: Path) -> int:
    """Score each committed checkpoint on held-out text and compare its block losses with the run's log; write what it
    and the models without training make of the profile's prompts. Returns 1 where a loss differs, else 0.

    Raises InputError where none is committed.
    """
    committed = [run_id for run_id in profile.checkpoints if trained.folder_of(profile, run_id, root).is_dir()]
    if not committed:
        raise InputError(f"{trained.folder_of(profile, '', root)}: no checkpoint there; one is written when a run that "
                         "the profile lists under 'checkpoints' is made, or made again (make rerun)")
    torch.set_num_threads(1)
    corpus, base = prepare(profile, root), load_base(profile, root)
    blocks = corpus.blocks("heldout", profile.training.block, profile.evaluation.final_blocks, "separated")
    models, status = {"full": base, "cut": cut_layers(base, profile.split)}, 0
    for run_id in committed:
        spec = profile.find(run_id)
        model = trained.load(trained.folder_of(profile, run_id, root), spec, profile, base).eval()
        log, models[run_id] = read_run(profile.run_path(run_id, root)), model
        found = evaluation.block_losses(as_hidden(model), blocks, evaluation.Depths(spec.depth, spec.seed),
                                        profile.training.micro_batch)
        gap = max(np.abs(np.array(found[target]) - log.last("heldout", f"block_losses_{target}")).max()
                  for target in evaluation.TARGETS)
        status |= int(not gap <= TOLERANCE)
        print(f"{run_id}: {np.mean(found['t+1']):.4f} nats per token on held-out text; a block's loss differs from the "
              f"log by {gap:.2g} at most: {'agrees' if gap <= TOLERANCE else 'DIFFERS'}")
    if profile.prompts:
        write_atomic(profile.folder(root) / PAGE, _page(models, profile, root).encode())
    return status


def _page(models: dict[str, nn.Module], profile: Profile, root: Path) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(profile.tokenizer_path(root)))
    parts = [f"# What the models of `{profile.name}` write",
             f"The same {len(profile.prompts)} prompts, continued greedily by {NEW_TOKENS} tokens: the full base, the "
             "cut one (prelude, one layer, coda), and the trained arms whose checkpoints lie in `checkpoints/`. "
             f"`make checkpoints PROFILE={profile.name}` wrote this page; nothing was picked."]
    for prompt in profile.prompts:
        parts.append(f"## {' '.join(prompt.split())}")
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for name, model in models.items():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                                     do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
            parts.append(f"`{name}`\n\n" + "\n".join(f"    {line}" for line in tokenizer.decode(written).split("\n")))
    return "\n\n".join(parts) + "\n"

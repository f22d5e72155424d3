"""One run, from its identity to its sealed log: what is trained, scored, described; and a run made again."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ..errors import InputError, Preempted
from ..experiment.arms import ARMS
from ..experiment.learning_rates import Rates, rates_of, read_searches
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..experiment.protocol import PROTOCOL_VERSION, switches, travel
from ..log import STEP_TABLES, NoLog, WorkingLog, read_run, write_atomic
from ..provenance import code_sha256, provenance
from . import evaluation, measure, probes, trainer
from .build import FIT_BATCH, build, fit_maps, load_base, part_of
from .corpus import LOOK_AHEAD, Corpus, content_sha256, prepare
from .ngram import Counts
from .own_arm import load_own
from .prelude_states import kept
from .resume import Checkpoints, asked_to_stop
from .scan import scan
from .status import hold, made
from .trained import folder_of
from .trained import save as save_checkpoint

STREAM_BLOCKS = 4  # of training text, on which the stream's size is measured
LATER = ("plan", "siblings", "packages", "checkpoints", "prompts", "keep_prelude")  # of a profile: they change no run
RERUN_TOLERANCE = 0.01  # nats per token: what other BLAS kernels may add up to over a run


def score_run(model, base: nn.Module, spec: RunSpec, profile: Profile, corpus: Corpus, sets: dict[str, np.ndarray],
              log: WorkingLog, update: int) -> None:
    """The last evaluation: both targets on every token set either column reads; of the seeds that the profile probes,
    what else it asks of a loop."""
    if ARMS[spec.arm].scans:
        for name, losses in scan(base.to(model.device), profile, sets["dev"]):
            log.row(update, "dev", f"loss_t+1/{name}", losses)
        return
    watch = trainer.score(model, sets, spec, profile, log, update, evaluation.TARGETS, curve=False)
    if spec.fit == "none":  # once for all arms: they are scored on the same blocks
        for split in ("heldout", *profile.corpus.unseen):
            lengths = corpus.packed(split, sets[split].shape[0] * profile.training.block)
            log.row(update, split, "document_lengths", lengths)
    if watch is None or watch.loop is None:
        return
    model.eval()
    if watch.largest:
        log.row(update, "model", "max_modulation", watch.largest)
    if spec.seed in (profile.probes.seeds or (spec.seed,)):
        few = evaluation.spaced(sets["heldout"][:profile.probes.blocks])
        for name, losses in _probed(model, spec, profile, few, watch):
            trainer.check_finite(losses)
            log.row(update, "heldout", f"loss_t+1/{name}", float(np.mean(losses)))


def _probed(model, spec: RunSpec, profile: Profile, blocks: np.ndarray, watch: probes.Watch) -> Iterator:
    """The block losses, each with its name, of held-out text at other depths, for a run of the base depth; and with
    interventions on what it sees, for one with a Controller."""
    def again(depth: int | str) -> list[float]:
        return evaluation.block_losses(trainer.as_hidden(model), blocks, evaluation.Depths(depth, spec.seed),
                                       evaluation.GIVEN_DEPTH_BATCH, ("t+1",))["t+1"]

    for depth in profile.probes.depths if spec.depth in (profile.depth, "mixed") else ():
        yield f"depth_{depth}", again(depth)
    if ARMS[spec.arm].modulation != "controller":
        return
    with probes.reading(model) as read:
        yield "as_trained", again(spec.depth)
    means = {"other_sequence": None, "corpus_mean": read(), "step_mean": watch.mean_modulation()}
    for kind, mean in means.items():
        with probes.intervened(model, kind, mean):
            yield kind, again(spec.depth)
    for name, other in (("first_half", False), ("first_half/other_future", True)):
        yield name, evaluation.first_half_losses(trainer.as_hidden(model), blocks,
                                                 evaluation.Depths(spec.depth, spec.seed), other)


def base_sha256(profile: Profile, root: Path) -> str:
    """The hash of the base's weight files."""
    files = sorted(profile.base_source(root).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def execute(profile: Profile, run_id: str, root: Path, path: Path | None = None, progress: bool = True) -> Path:
    """Make one run, unless it is made; returns its log, results/<profile>/runs/<run id>.jsonl, or `path`.

    Of several processes (`accelerate launch`) the first one writes. Raises Busy when the run is being made elsewhere,
    InputError when something doesn't fit, Preempted when asked to stop.
    """
    spec, root, main = profile.find(run_id), Path(root), trainer.processes().is_main_process
    with hold(profile.name, run_id, root) if main else nullcontext(lambda update: None) as began, \
            asked_to_stop() as stop:
        if path or not made(spec, profile, root):
            _make(spec, profile, root, path or profile.run_path(run_id, root), progress, began, stop)
        if stop():  # while it was scored: the run is finished, what comes after it isn't
            raise Preempted(f"{run_id}: asked to stop, it is finished; run the same command again", stop())
    return path or profile.run_path(run_id, root)


def _make(spec: RunSpec, profile: Profile, root: Path, path: Path, progress: bool, began: Callable[[int], None],
          stop: Callable[[], int]) -> None:
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter()
    fit, protocol = spec.fit, switches(spec.protocol) if spec.fit != "none" else None
    rates = rates_of(spec, profile, read_searches(profile, root)) if fit == "gradient" else None
    profile = profile.at(spec)
    accelerator, environment = trainer.make_accelerator(profile), provenance(root)
    config = profile.model_dump(mode="json", exclude=set(LATER))  # they change no run
    with accelerator.main_process_first():  # the first one fetches and builds, the others find it there
        corpus, base = prepare(profile, root), load_base(profile, root)
    sets = evaluation.final(profile, corpus, spec)  # too little text is said before anything is trained
    hashes = {"corpus": corpus.manifest["sha256"], "tokenizer": corpus.manifest["tokenizer_sha256"],
              "base": base_sha256(profile, root)}
    model = _build(spec, profile, base, corpus, root, accelerator.device)
    flops = None if isinstance(model, Counts) else measure.flops(model, spec, profile)
    folder = profile.unfinished(spec.id, root) if path == profile.run_path(spec.id, root) else path.parent / spec.id
    log = WorkingLog(folder, fresh=rates is None) if accelerator.is_main_process else NoLog()
    stream = _measure_streams(model, base, spec, profile, corpus, sets, log)
    learns = fit in ("gradient", "least squares")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if learns else {}
    before = {name: p.detach().clone() for name, p in trained.items()}
    if protocol and protocol["precision"] == "bfloat16":
        trainer.round_to_bfloat16(before.values())
    # a checkpoint of other code, text, base or configuration is another run's; where it is made doesn't matter
    identity = {"id": spec.id, **_rate_fields(rates), "code": code_sha256(), "lock": environment["lock"],
                "packages": environment["packages"], **hashes, **profile.identity(spec)}
    # what a closed form reads is as many tokens as a run's updates
    status, update = "finished", profile.training.updates if fit != "none" else 0
    prelude_from_disk = spec.trained and ARMS[spec.arm].middle in ("loop", "affine")
    try:
        with kept(model, profile, root, hashes["base"]) if prelude_from_disk else nullcontext():
            if fit == "least squares":
                blocks = trainer.training_blocks(spec, profile, corpus)
                fit_maps(model, base.to(accelerator.device), profile.split,
                         (blocks[i:i + FIT_BATCH] for i in range(0, len(blocks), FIT_BATCH)))
            if fit == "gradient":
                trainer.train(model, spec, profile, corpus, rates, log, progress and accelerator.is_main_process,
                              Checkpoints(folder / "checkpoint.safetensors", identity, stop, began))
            score_run(model, base, spec, profile, corpus, sets, log, update)
    except trainer.Diverged:
        status = "diverged"
    if not accelerator.is_main_process:
        return
    if status == "finished" and (learns or stream):
        _describe(model, spec, before, stream, log, update)
    log.finish(path, {
        "run": spec.id, "profile": profile.name, "purpose": spec.purpose, **profile.declared(spec), "arm": spec.arm,
        "depth": spec.depth, "rank": spec.rank, **_rate_fields(rates), "protocol": spec.protocol,
        "switches": protocol, "seed": spec.seed, "level": spec.level, "protocol_version": PROTOCOL_VERSION,
        "config": config, **environment, "processes": accelerator.num_processes,
        "hashes": hashes | {"trained": _save_trained(trained, path)},
        "travel": {kind: travel(rate, profile.training.updates, protocol["schedule"])
                   for kind, rate in vars(rates).items()} if rates else None, "stream": evaluation.stream_kind(profile),
        "trainable": sum(p.numel() for p in trained.values()), "trainable_parts": _parts(trained), "flops": flops,
        "status": status, "started": started, "wall_seconds": time.perf_counter() - clock,
    })
    if status == "finished" and spec.id in profile.checkpoints:  # after the log, which a failure here must not cost
        save_checkpoint(model, spec, profile, path.parents[1] / "checkpoints" / spec.id)


def _build(spec: RunSpec, profile: Profile, base, corpus: Corpus, root: Path,
           device: torch.device) -> nn.Module | Counts:
    """The run's model, on its device."""
    if ARMS[spec.arm].middle == "counts":
        if spec.fit == "counts":
            text = trainer.training_blocks(spec, profile, corpus)[:, :-LOOK_AHEAD].ravel()  # blocks follow each other
        else:
            text = np.concatenate([np.append(document, corpus.end_of_text) for document in corpus.documents("train")])
        return Counts(text, base.config.vocab_size, pairs=ARMS[spec.arm].pairs)
    load_own(spec.arm, profile, base.config, root)
    return build(spec, profile, base).to(device)


def _measure_streams(model, base, spec: RunSpec, profile: Profile, corpus: Corpus, sets: dict[str, np.ndarray],
                     log: WorkingLog) -> list[float] | None:
    """Log the intact model's stream at each layer; return a loop's at each step, which step norms are set by."""
    if ARMS[spec.arm].middle == "intact":
        for name, rms in probes.layer_rms(base, sets["heldout"][:STREAM_BLOCKS]).items():
            log.row(0, "model", name, rms)
    if not ARMS[spec.arm].step_norm:
        return None
    stream = probes.stream_rms(model, trainer.training_blocks(spec, profile, corpus)[:STREAM_BLOCKS], _steps(spec))
    if not ARMS[spec.arm].matched:  # its norms stay at 1
        nn.init.ones_(model.recurrence.step_norm.weight)
    return stream


def _rate_fields(rates: Rates | None) -> dict[str, float | None]:
    """A run's rates as a manifest's fields."""
    return {"rate": rates and rates.matrix, "elementwise_rate": rates and rates.elementwise}


def _steps(spec: RunSpec) -> int | None:
    """How many recurrence steps a run ever takes; None without a loop."""
    return max(evaluation.DRAWN_DEPTHS) if spec.depth == "mixed" else spec.depth


def _describe(model, spec: RunSpec, before: dict[str, torch.Tensor], stream: list[float] | None, log: WorkingLog,
              update: int) -> None:
    """Log how much of each trained tensor moved, how far norms and table went, how far the gate's bias opens it."""
    parameters, ran = dict(model.named_parameters()), _steps(spec)
    recurrence = getattr(model, "recurrence", None)
    if stream:
        log.row(update, "model", "stream_rms", stream)
        log.row(update, "model", "step_norm", recurrence.step_norm.weight[:ran].detach().mean(-1).tolist())
    if ARMS[spec.arm].modulation == "static":
        log.row(update, "model", "table", recurrence.modulation.table[:ran].detach().abs().max().item())
    for name, start in before.items():
        of_steps = ran if name.removeprefix("recurrence.") in STEP_TABLES else None  # the rest only decays
        moved = (parameters[name].detach()[:of_steps] != start[:of_steps]).double().mean().item()
        log.row(update, "model", f"moved/{name}", moved)
    if getattr(recurrence, "gate", None) is not None:
        opening = torch.sigmoid(recurrence.gate.linear.bias).mean().item()
        log.row(update, "model", "gate_open", opening)


def _parts(trained: dict[str, torch.Tensor]) -> dict[str, int]:
    """Trained parameters of each part of an arm."""
    counts: dict[str, int] = {}
    for name, parameter in trained.items():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    return counts


def _save_trained(trained: dict[str, torch.Tensor], path: Path) -> str | None:
    """Save the trained tensors beside the folder of logs (ignored by git); returns the file's hash."""
    if not trained:
        return None
    content = safetensors.torch.save({name: p.detach().cpu().contiguous() for name, p in trained.items()})
    write_atomic(path.parents[1] / "trained" / f"{path.stem}.safetensors", content)
    return content_sha256(content)


def rerun(profile: Profile, run_id: str, root: Path) -> int:
    """Make a committed run again in a temporary folder and compare the logs; 0 if they agree, 1 if not.

    Where the profile lists it under `checkpoints` and the trained tensors are the committed run's to the last bit,
    its checkpoint is written too.
    """
    if not made(profile.find(run_id), profile, root):
        raise InputError(f"{profile.run_path(run_id, root)}: no such log; make runs PROFILE={profile.name} makes it")
    old = read_run(profile.run_path(run_id, root))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        new = read_run(execute(profile, run_id, root, Path(temporary) / "runs" / f"{run_id}.jsonl"))
        same = old.manifest["hashes"]["trained"] == new.manifest["hashes"]["trained"]
        if same and run_id in profile.checkpoints:
            shutil.copytree(Path(temporary) / "checkpoints" / run_id, folder_of(profile, run_id, root),
                            dirs_exist_ok=True)
    if {name: found.updates for name, found in old.series.items()} != \
            {name: found.updates for name, found in new.series.items()}:
        print(f"rerun {run_id}: the series differ: {len(old.series)} committed, {len(new.series)} made again")
        return 1
    gaps = {name: float(np.max(np.abs(np.hstack(found.values) - np.hstack(new.series[name].values))))
            for name, found in old.series.items() if "loss" in name[1]}
    worst = max(gaps, key=gaps.get)
    agrees = gaps[worst] <= RERUN_TOLERANCE  # a log holds finite numbers only
    print(f"rerun {run_id}: {'agrees' if agrees else 'DIFFERS'}: largest difference {gaps[worst]:.3g} nats per token "
          f"({' '.join(worst)}); tolerance {RERUN_TOLERANCE}; trained tensors {'the same' if same else 'differ'}")
    return int(not agrees)

"""The loop that trains what of a model has gradients, and logs it.

Shapes: B batch, T positions, d width, V vocabulary.
"""

import math
import os

import numpy as np
import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, reduce
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ..errors import InputError
from ..experiment.arms import ARMS, Arm
from ..experiment.learning_rates import Rates
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from ..experiment.protocol import schedule, switches
from ..log import WorkingLog
from ..provenance import check_environment
from . import evaluation, probes
from .corpus import Corpus
from .extra_passes import Teacher
from .ngram import Counts
from .resume import Checkpoints

NO_LOGITS = torch.tensor([], dtype=torch.long)  # of a forward pass: the positions whose logits are wanted
DIGITS = 6  # of a block's loss in the log
EXPLODED = 3.0  # times the loss of a uniform guess, ln V: no run that later learned something was ever seen there
PAPER_RATE = 3e-4  # system.md 7


def as_hidden(model: nn.Module) -> evaluation.Hidden:
    """One call for both kinds of model: (B, T) ids and a depth -> last hidden states and the head's weight."""
    def hidden(ids: torch.Tensor, depth: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids, head = ids.to(model.device), model.get_output_embeddings().weight
        if hasattr(model, "hidden"):  # ours
            return model.hidden(ids, depth=depth)[-1], head
        return model.model(ids, use_cache=False).last_hidden_state, head

    return hidden


def plain_loss(model: nn.Module, blocks: np.ndarray) -> float:
    """The mean next-token loss of a model without a loop on (n, T + 2) tokens, nats per token."""
    losses = evaluation.block_losses(as_hidden(model), blocks, evaluation.Depths(None, 0), 1, ("t+1",))
    return float(np.mean(losses["t+1"]))


@torch.no_grad()
def round_to_bfloat16(parameters) -> None:
    """Trained tensors as if kept in bf16, computed in float32 (protocol.md `precision`)."""
    for parameter in parameters:
        parameter.copy_(parameter.bfloat16().float())


@torch.no_grad()
def add_in_bfloat16(parameter: torch.Tensor, before: torch.Tensor, rate: float) -> None:
    """What an optimizer's step did to a tensor, as if it were kept in bf16 (protocol.md `precision`, scaled form).

    The update, decay included, is applied in ceil(rate / 3e-4) equal parts, each rounded: the ratio of a part to the
    rounding step is that of an update at the paper's rate, whatever the peak `rate` is here.
    """
    parts = math.ceil(rate / PAPER_RATE - 1e-9)  # 3e-4 / 3e-4 may come out above 1
    part, value = (parameter - before) / parts, before.clone()
    for _ in range(parts):
        value = (value + part).bfloat16().float()
    parameter.copy_(value)


def is_elementwise(name: str, arm: Arm) -> bool:
    """Whether a trained tensor's travel is about rate times updates: a step norm, a table, an affine, a pass's gate
    (docs/protocol.md)."""
    return name == "recurrence.step_norm.weight" or ".affine." in name or ".passes." in name or \
        any(name.endswith(f".modulation.{table}") for table in arm.tables)


def parameter_groups(named: dict[str, nn.Parameter], rates: Rates, arm: Arm) -> list[dict]:
    """An arm's trained tensors as an optimizer's groups, each with its peak rate."""
    kinds = ((rates.matrix, False), (rates.elementwise, True))
    groups = [{"params": [p for name, p in named.items() if is_elementwise(name, arm) == kind], "peak": rate}
              for rate, kind in kinds]
    return [group for group in groups if group["params"]]


def _step(optimizer, rounded: bool) -> None:
    """An optimizer's step, where an update is complete; `rounded`: as if the tensors were kept in bf16."""
    peaks = {p: group["peak"] for group in optimizer.param_groups for p in group["params"]} if rounded else {}
    before = {parameter: parameter.detach().clone() for parameter in peaks}
    optimizer.step()
    for parameter, value in before.items():
        add_in_bfloat16(parameter, value, peaks[parameter])
    optimizer.zero_grad()


class Diverged(Exception):
    """The loss is no longer a number, or far above that of a guess."""


def processes() -> PartialState:
    """The processes that make a run together: one, or those of `accelerate launch`.

    Raises InputError for a setting of the environment that would change numbers.
    """
    check_environment()
    # accelerate must be told that processes without a GPU compute on the CPU
    return PartialState(cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available())


def make_accelerator(profile: Profile) -> Accelerator:
    """The engine of a run. Under `accelerate launch` the micro-batches of an update are shared by its processes.

    Raises InputError when they can't be shared evenly.
    """
    accumulation, count = profile.training.accumulation, processes().num_processes
    if accumulation % count:
        raise InputError(f"profile '{profile.name}': field 'training.accumulation': {accumulation} micro-batches can't "
                         f"be shared by {count} processes; launch a number of processes that divides it")
    # a run's numbers don't depend on how many run beside it, nor on what the user's environment asks for
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    # the frozen bases are buffers: they never change, so they needn't be sent at every step
    return Accelerator(mixed_precision="no", dynamo_backend="no",
                       gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation // count),
                       kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])


def _over_processes(*values: float) -> list[float]:
    """The mean of each value over the processes of a run."""
    state = processes()
    return list(values) if state.num_processes == 1 else reduce(torch.tensor(values, device=state.device)).tolist()


def training_loss(model: nn.Module, head: torch.Tensor, chunk: torch.Tensor, depth: int | None,
                  target: str, teacher: Teacher | None = None) -> torch.Tensor:
    """Mean loss of (B, T + 2) tokens, nats per token, or what a teacher makes of it; no logits are held beyond a chunk
    of tokens."""
    # through forward, where data parallelism hooks in
    loop = {} if depth is None else {"depth": depth}
    states = model(chunk[:, :-evaluation.LOOK_AHEAD], **loop, logits_to_keep=NO_LOGITS,
                   output_hidden_states=True).hidden_states
    loss = evaluation.mean_loss(states[-1], head, evaluation.targets(chunk, target))
    return loss if teacher is None else teacher.loss(model, loss, states[-1], chunk)


def training_blocks(spec: RunSpec, profile: Profile, corpus: Corpus) -> np.ndarray:
    """(N, T + 2) tokens that a run trains on, in their order."""
    settings, untrained = profile.training, spec.protocol == "any"
    blocks = corpus.blocks("train", settings.block, settings.updates * settings.accumulation * settings.micro_batch,
                           switches("corrected" if untrained else spec.protocol)["packing"], spec.seed)
    return evaluation.spaced(blocks, settings.micro_batch) if _reads_others(spec) else blocks


def _reads_others(spec: RunSpec) -> bool:
    """Whether a sequence's neighbours in its batch must be of other documents, or they would tell of it."""
    return ARMS[spec.arm].modulation == "controller_other"


def train(model: nn.Module, spec: RunSpec, profile: Profile, corpus: Corpus, rates: Rates, log: WorkingLog,
          progress: bool, checkpoints: Checkpoints | None = None) -> None:
    """Train what of a model has gradients and log it, from the start or from a checkpoint.

    Raises Diverged at a loss that isn't finite or above EXPLODED ln V, Preempted when asked to stop.
    """
    settings, protocol = profile.training, switches(spec.protocol)
    accelerator = make_accelerator(profile)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = list(named.values())
    if protocol["precision"] == "bfloat16":
        round_to_bfloat16(trained)
    optimizer = torch.optim.AdamW(parameter_groups(named, rates, ARMS[spec.arm]), lr=rates.matrix, betas=settings.betas,
                                  weight_decay=settings.weight_decay)
    blocks = training_blocks(spec, profile, corpus)
    # a generator of its own: an iterator draws a number when it begins, and a run that goes on begins twice
    loader = DataLoader(TensorDataset(torch.from_numpy(blocks)), settings.micro_batch, generator=torch.Generator())
    head, teacher = model.get_output_embeddings().weight, getattr(model, "teacher", None)
    limit = EXPLODED * math.log(head.shape[0])
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    depths = evaluation.Depths(spec.depth, spec.seed)
    points = set(np.linspace(0, settings.updates, profile.evaluation.points).round().astype(int).tolist())
    sets = evaluation.during(profile, corpus, spec)

    def evaluate(update: int) -> None:
        if update in points:
            score(model, sets, spec, profile, log, update, ("t+1",), curve=True)

    state = None
    with accelerator.main_process_first():  # it removes a checkpoint that isn't this run's
        if checkpoints:
            state = checkpoints.restore(named, optimizer, log)
    if state is None:
        evaluate(0)
    else:
        depths.generator.bit_generator.state = state["depths"]
    update, losses = state["update"] if state else 0, []
    stop = checkpoints.stop if checkpoints else lambda: 0
    prepared.train()
    bar = tqdm(total=settings.updates, initial=update, desc=spec.id, disable=not progress)
    for (chunk,) in skip_first_batches(loader, update * accelerator.gradient_accumulation_steps):
        chunk = chunk.long()  # (B, T + 2)
        # a depth for each process's micro-batch, so that the draws don't depend on how many processes there are
        depth = [depths.next() for _ in range(accelerator.num_processes)][accelerator.process_index]
        with accelerator.accumulate(prepared):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(update, settings.updates, protocol["schedule"])
            loss = training_loss(prepared, head, chunk, depth, protocol["target"], teacher)
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                mean, asked = _over_processes(float(np.mean([loss.item() for loss in losses])), stop())
                losses = []
                if not mean <= limit:  # nor is nan
                    raise Diverged
                accelerator.clip_grad_norm_(trained, settings.clip)
            _step(optimizer, accelerator.sync_gradients and protocol["precision"] == "bfloat16")
        if accelerator.sync_gradients:
            update += 1
            log.row(update, "train", "loss", mean)
            evaluate(update)
            bar.update()
            if checkpoints and accelerator.is_main_process and (asked or checkpoints.due()):
                checkpoints.save(named, optimizer, log, update=update, depths=depths.generator.bit_generator.state)
            if asked:
                raise checkpoints.preempted()
    bar.close()


def check_finite(losses) -> None:
    """Raises Diverged, in all processes of a run, if a loss isn't finite: the last update may be what broke it."""
    broken, = _over_processes(float(not np.isfinite(losses).all()))
    if broken:
        raise Diverged


def score(model, sets: dict[str, np.ndarray], spec: RunSpec, profile: Profile, log: WorkingLog, update: int,
          scored: tuple[str, ...], curve: bool) -> probes.Watch:
    """Log the model's losses on token sets and, of held-out text, what happens at each recurrence step.

    At the end (not a point of a `curve`) each block's loss too, and of held-out and foreign text the modulation.
    Returns the watch over the loop on the last of the sets that is held-out. Raises Diverged if a loss isn't finite.
    """
    if not isinstance(model, Counts):
        model.eval()
    found, prefix = None, "curve/" if curve else ""
    for split, tokens_of_split in sets.items():
        with probes.Watch(model) as watch:
            depths = evaluation.Depths(spec.depth, spec.seed)
            if _reads_others(spec):
                batch = profile.training.micro_batch if depths.drawn else evaluation.GIVEN_DEPTH_BATCH
                tokens_of_split = evaluation.spaced(tokens_of_split, batch)
            if isinstance(model, Counts):
                losses = {target: model.block_losses(tokens_of_split, 1 + evaluation.TARGETS.index(target),
                                                     evaluation.LOOK_AHEAD) for target in scored}
            else:
                losses = evaluation.block_losses(as_hidden(model), tokens_of_split, depths,
                                                 profile.training.micro_batch, scored)
        check_finite([losses[target] for target in scored])
        for target in scored:
            log.row(update, split, f"{prefix}loss_{target}", float(np.mean(losses[target])))
            if not curve:
                log.row(update, split, f"block_losses_{target}", np.round(losses[target], DIGITS).tolist())
        if split == "heldout":
            found = watch
            for name, values in watch.steps().items():
                log.row(update, split, f"{prefix}steps/{name}", values)
        if not curve and split in ("heldout", "foreign"):
            for name, values in watch.modulation().items():
                log.row(update, split, f"modulation/{name}", values)
    if not isinstance(model, Counts):
        model.train()
    return found

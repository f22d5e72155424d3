"""What passes through the loop, and what the Controller is shown instead: hooks on a trained model.

Shapes: B batch, T positions, d width, K = 7 projections, r rank.
"""

from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from ..model.configuration import PROJECTIONS, SINKS
from .corpus import LOOK_AHEAD


class Watch:
    """What passes through the loop while this is entered; of a model without a loop, nothing.

    Of each recurrence step: how far the gate opens, the norm of the state after it, and how much it changed the state,
    relative to the state before; means over tokens. Of the modulation: the moments of m over tokens.
    """

    def __init__(self, model):
        self.loop = getattr(model, "recurrence", None)
        self.projections = [] if self.loop is None else model.projections
        self.largest = 0.0  # |m|
        self._steps: dict[str, dict[int, list[float]]] = {}
        self._moments: dict[int, list] = {}  # step: tokens, sum of m, sum of m^2, both (K, r)

    def __enter__(self) -> "Watch":
        self._hooks = ExitStack()
        if self.loop is not None:
            self._hooks.enter_context(self.loop.register_forward_pre_hook(self._before))
            self._hooks.enter_context(self.loop.register_forward_hook(self._after))
            if self.loop.gate is not None:
                self._hooks.enter_context(self.loop.gate.linear.register_forward_hook(
                    lambda module, inputs, out: self._add("gate_open", torch.sigmoid(out))))
            if self.loop.modulation is not None:
                self._hooks.enter_context(self.loop.modulation.register_forward_hook(self._modulated))
        return self

    def __exit__(self, *_) -> None:
        self._hooks.close()

    def _before(self, module, inputs) -> None:
        self._step = inputs[1]

    def _after(self, module, inputs, out) -> None:
        norm, before = out.float().norm(dim=-1), inputs[0].float()
        self._add("state_norm", norm)
        self._add("change", (out - before).float().norm(dim=-1) / before.norm(dim=-1))

    def _add(self, name: str, values: torch.Tensor) -> None:
        sums = self._steps.setdefault(name, {}).setdefault(self._step, [0.0, 0])
        sums[0] += values.sum().item()
        sums[1] += values.numel()

    def _modulated(self, module, inputs, m: torch.Tensor) -> None:
        m = m.detach().cpu().double().flatten(0, 1)  # (N, K, r)
        self.largest = max(self.largest, m.abs().max().item())
        moments = self._moments.setdefault(self._step, [0, 0.0, 0.0])
        for place, value in enumerate((len(m), m.sum(0), m.square().sum(0))):
            moments[place] = moments[place] + value

    def steps(self) -> dict[str, list[float]]:
        """{`gate_open`, `state_norm`, `change`: a mean a step}."""
        return {name: [total / count for _, (total, count) in sorted(by_step.items())]
                for name, by_step in self._steps.items()}

    def mean_modulation(self) -> torch.Tensor:
        """The mean m of each step, (steps, K, r) float64."""
        return torch.stack([total / count for _, (count, total, _) in sorted(self._moments.items())])

    @torch.no_grad()
    def modulation(self) -> dict[str, list[float]]:
        """Of each projection, by its name: `size/` the root mean square of m at each step; `over_inputs/` that of its
        standard deviation over tokens; `over_steps/` that of the mean vector's deviation from its mean over steps;
        `update/` the norm of the mean update relative to that of W, at each step."""
        if not self._moments:
            return {}
        mean = self.mean_modulation()
        square = torch.stack([total / count for _, (count, _, total) in sorted(self._moments.items())])
        found = {}
        for index, (name, projection) in enumerate(zip(PROJECTIONS, self.projections, strict=True)):
            m, deviation = mean[:, index], (square[:, index] - mean[:, index].square()).clamp(min=0)
            found[f"size/{name}"] = square[:, index].mean(-1).sqrt().tolist()
            found[f"over_inputs/{name}"] = deviation.mean(-1).sqrt().tolist()
            found[f"over_steps/{name}"] = [(m - m.mean(0)).square().mean().sqrt().item()]
            weight = projection.weight.detach().cpu().double()
            found[f"update/{name}"] = [(projection.update(step).norm() / weight.norm()).item() for step in m]
        return found


def stream_rms(model, blocks: np.ndarray, depth: int) -> list[float]:
    """The root mean square of what each step norm reads in the untrained loop, (depth,), on training text, (n, T + 2).

    The step norms are matched to it (`StepNorm.match`) and stay so.
    """
    ids = torch.from_numpy(blocks)[:, :-LOOK_AHEAD].long().to(model.device)
    return model.recurrence.step_norm.match(lambda: model.hidden(ids, depth=depth))


@torch.no_grad()
def layer_rms(model, blocks: np.ndarray) -> dict[str, list[float]]:
    """The residual stream's root mean square per channel, as the embedding gives it and after each layer of a base, on
    (n, T + 2) tokens: `layer_rms`, the median over tokens without each block's first SINKS, and `sink_rms`, the median
    of each block's first."""
    ids, found = torch.from_numpy(blocks)[:, :-LOOK_AHEAD].long().to(model.device), []

    def note(module, inputs, out) -> None:
        found.append(out.float().square().mean(-1).sqrt())  # (n, T)

    with ExitStack() as hooks:
        for module in (model.model.embed_tokens, *model.model.layers):
            hooks.enter_context(module.register_forward_hook(note))
        model.model(ids, use_cache=False)
    return {"layer_rms": [rms[:, SINKS:].median().item() for rms in found],
            "sink_rms": [rms[:, 0].median().item() for rms in found]}


@contextmanager
def intervened(model, kind: str, means: torch.Tensor):
    """The Controller sees something else while this is entered (system.md 4).

    kind `other_sequence`: the states of another sequence of its batch (see `apart`); `corpus_mean`: at every token and
    step the mean of what it reads, `means` (steps, d); `step_mean`: it is replaced by its own mean m, `means`
    (steps, K, r).
    """
    controller, step = model.recurrence.modulation, [0]

    def note(module, inputs):
        step[0] = inputs[1]
        return (inputs[0].roll(1, dims=0), *inputs[1:]) if kind == "other_sequence" else None

    with ExitStack() as hooks:
        hooks.enter_context(controller.register_forward_pre_hook(note))
        if kind == "corpus_mean":
            hooks.enter_context(controller.state.register_forward_pre_hook(
                lambda module, inputs: (means[step[0]].to(inputs[0]).expand_as(inputs[0]),)))
        if kind == "step_mean":
            hooks.enter_context(controller.register_forward_hook(
                lambda module, inputs, m: means[step[0]].to(m).expand_as(m)))
        yield


@contextmanager
def reading(model):
    """Yields a function: the mean of what the Controller read since, (steps, d) float64."""
    controller, sums = model.recurrence.modulation, {}

    def note(module, inputs):
        step[0] = inputs[1]

    def add(module, inputs):
        read = inputs[0].detach().cpu().double().flatten(0, 1)  # (N, d)
        count, total = sums.get(step[0], (0, 0.0))
        sums[step[0]] = count + len(read), total + read.sum(0)

    step = [0]
    with controller.register_forward_pre_hook(note), controller.state.register_forward_pre_hook(add):
        yield lambda: torch.stack([total / count for _, (count, total) in sorted(sums.items())])

"""What a model costs, counted from its shape: parameters, FLOPs, bytes.

Never imports torch. A FLOP is a multiplication or an addition in a matrix product; the rest is below 2 % at every
shape here (the tests count); of `refine` arms neither Controller nor branches are counted, so they have no test.
`context` is the number of tokens that a token attends to; in training, where a block is one product, the block's whole
length. Sources of the shapes: system.md 2 to 6, and each profile's YAML.
"""

import math
from dataclasses import dataclass, replace

import pandas as pd

from ..errors import InputError
from .arms import ARMS, LAST, Arm
from .profile import Profile
from .schema import SplitConfig, Widths

FLOAT32 = 4  # bytes
LOGIT_CHUNK = 512  # tokens whose logits are held at a time (evaluation.CHUNK)
BYTES = {"float32": 4, "bfloat16": 2}
SMALL = 4  # that the Controller's widths are divided by where it scales passes


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's shape, as its `config.json` says it."""

    width: int  # d
    intermediate: int
    queries: int  # width of all query heads together
    keys: int  # width of all key heads together, and of all value heads
    layers: int
    vocabulary: int
    tied: bool
    biased: bool = True  # biases of q, k and v, as in Qwen2

    @classmethod
    def of(cls, profile: Profile) -> "Shape":
        """The base of a profile. Raises InputError where the profile doesn't say its shape."""
        model = profile.base.model
        if model is None:
            raise InputError(f"{profile.name}.yaml: field 'base.model' is missing: costs are counted from the base's "
                             "shape; copy it from the base's config.json")
        head = model.get("head_dim", model["hidden_size"] // model["num_attention_heads"])
        return cls(width=model["hidden_size"], intermediate=model["intermediate_size"],
                   queries=head * model["num_attention_heads"], keys=head * model["num_key_value_heads"],
                   layers=model["num_hidden_layers"], vocabulary=model["vocab_size"],
                   tied=model.get("tie_word_embeddings", False), biased=model.get("model_type", "qwen2") == "qwen2")

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's seven projections."""
        d, q, k, f = self.width, self.queries, self.keys, self.intermediate
        return {"q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q), "gate_proj": (f, d),
                "up_proj": (f, d), "down_proj": (d, f)}

    @property
    def layer_parameters(self) -> int:
        """Of one layer: projections, biases of q, k and v, two norms."""
        biases = self.queries + 2 * self.keys if self.biased else 0
        return sum(o * i for o, i in self.projections.values()) + biases + 2 * self.width

    def parameters(self, layers: int) -> int:
        """Of the model with some of its layers, the embedding counted once if it is the head too."""
        embedding = self.vocabulary * self.width * (1 if self.tied else 2)
        return embedding + layers * self.layer_parameters + self.width

    def layer_flops(self, context: int) -> int:
        """Of one layer, forward, a token."""
        return 2 * sum(o * i for o, i in self.projections.values()) + 4 * context * self.queries

    @property
    def head_flops(self) -> int:
        return 2 * self.width * self.vocabulary


def small(widths: Widths) -> Widths:
    """Those of a Controller that scales passes."""
    return Widths(**{name: max(1, width // SMALL) for name, width in widths})


def _spread(units: int, count: int) -> tuple[int, ...]:
    """So many ranks over so many places, as even as can be; the first ones have what is over."""
    each, over = divmod(units, count)
    return (each + 1,) * over + (each,) * (count - over)


@dataclass(frozen=True)
class Cost:
    """What one arm costs on a base; `rank` is that of its modulation, or of LoRA in its coda."""

    shape: Shape
    split: SplitConfig
    arm: str
    rank: int
    widths: Widths
    max_steps: int

    @classmethod
    def of(cls, profile: Profile, arm: str, rank: int | None = None) -> "Cost":
        return cls(Shape.of(profile), profile.split_of(arm), arm, rank or profile.rank, profile.controller,
                   profile.max_steps)

    @property
    def parts(self) -> Arm:
        return ARMS[self.arm]

    @property
    def layers(self) -> int:
        """Layers whose weights are held."""
        kept = self.split.prelude + 1 + self.split.coda
        whole = dict.fromkeys(("all", "intact", "refine"), self.shape.layers)
        middle = whole | {"affine": kept - 1, "none": kept - 1, "counts": 0}
        return middle.get(self.parts.middle, kept + self.parts.more)

    def applications(self, depth: int) -> int:
        """How often a layer is applied to a token."""
        if self.parts.middle == "refine":
            return self.layers + depth
        return self.layers - 1 + depth if self.parts.loops else self.layers + self._again

    @property
    def _ends(self) -> int:
        """Inputs and outputs of a layer's projections, together: what one rank of LoRA on all of them trains."""
        return sum(o + i for o, i in self.shape.projections.values())

    @property
    def lora_ranks(self) -> tuple[int, ...]:
        """The rank of LoRA in each kept layer, 0 where there is none.

        At the Controller's trained count: as even as whole ranks that, with what else is trained, come to it; the first
        layers have what is over.
        """
        count = {"none": 0, "kept": self.layers, "kept_last": LAST}.get(self.parts.lora, self.split.coda)
        before = (0,) * (self.layers - count)
        if not self.parts.lora.startswith("kept"):
            return before + (self.rank,) * count
        budget = sum(replace(self, arm="controller").trainable().values()) + self._ends / 2
        units = range(int(budget / self._ends), 0, -1)
        return next(ranks for ranks in (before + _spread(n, count) for n in units)
                    if sum(ranks) * self._ends + self._passes_train(ranks) <= budget)

    # ---------------------------------------------------------------------------- further passes (arms.Passes)

    @property
    def _again(self) -> int:
        """Layers that are applied again."""
        passes = self.parts.passes
        if passes is None or passes.kind == "affine":
            return 0
        return (self.shape.layers - self.layers if passes.count is None else passes.count) * passes.layers

    @property
    def passes(self) -> int:
        """Passes that have a gate, factors or an affine of their own."""
        passes = self.parts.passes
        return passes.count or self._again + (passes.kind == "plain")

    @property
    def base_ranks(self) -> tuple[int, ...]:
        """The rank of each pass's low-rank factors: trained, as the Controller's count has it; frozen, so that together
        they hold no more than a layer."""
        if self.parts.passes.bases == "frozen":
            return (self.shape.layer_parameters // (self.passes * self._ends),) * self.passes
        budget = sum(replace(self, arm="controller").trainable().values())
        gates = 0 if self.parts.passes.kind == "plain" else self.passes * self.shape.width
        return _spread(round((budget - gates) / self._ends), self.passes)

    def looped(self, ranks: tuple[int, ...], place: int | None = None) -> int:
        """The rank that a modulation of passes scales: of the frozen factors, or of LoRA in the looped layer."""
        place = self.split.prelude if place is None else place
        return self.base_ranks[0] if self.parts.passes.bases == "frozen" else ranks[place]

    def _passes_train(self, ranks: tuple[int, ...]) -> int:
        """What further passes train beside LoRA of the given ranks."""
        passes, d = self.parts.passes, self.shape.width
        if passes is None:
            return 0
        gates = {"damped": d, "plain": 0, "affine": 2 * d}[passes.kind] * self.passes
        factors = sum(self.base_ranks) * self._ends if passes.bases == "trained" else 0
        if passes.modulation == "static":
            return gates + factors + self.passes * 7 * self.looped(ranks)
        return gates + factors + (self._small(ranks).modulation() if passes.modulation == "controller" else 0)

    def _small(self, ranks: tuple[int, ...]) -> "Cost":
        """The small Controller of the passes."""
        return replace(self, arm="controller", rank=self.looped(ranks), max_steps=self.passes,
                       widths=small(self.widths))

    # ------------------------------------------------------------------------------------------------- parameters

    def _controller(self) -> dict[str, int]:
        """Weights of the Controller's linear layers (system.md 4)."""
        w = self.widths
        return {"state": self.shape.width * w.state, "hidden": (w.state + w.step) * w.hidden,
                "output": w.hidden * w.output, "heads": w.output * 7 * self.rank}

    def modulation(self) -> int:
        """Trained parameters of the Controller (system.md 4)."""
        w = self.widths
        return sum(self._controller().values()) + w.state + w.hidden + w.output + self.max_steps * w.step

    def trainable(self) -> dict[str, int]:
        """Trained parameters of each part (system.md 6)."""
        arm, d, found = self.parts, self.shape.width, {}
        table, controller = self.max_steps * 7 * self.rank, self.modulation()
        wide = self.max_steps + 7 * self.rank  # a unit of width of the factored table
        if arm.modulated:
            found["modulation"] = {"static": table, "static_wide": round(controller / wide) * wide}.get(
                arm.modulation, controller)
        if arm.gate:
            found["gate"] = 2 * d * d + d
        if arm.step_norm:
            found["step_norm"] = self.max_steps * d
        if arm.lora != "none":
            found["lora"] = sum(self.lora_ranks) * self._ends
        if arm.passes:
            found["passes"] = self._passes_train(self.lora_ranks)
        if arm.middle == "maps":
            found["maps"] = 2 * (d * d + d)
        if arm.middle == "affine":
            found["affine"] = 2 * d
        return found

    def frozen(self) -> int:
        """Parameters of the kept layers, embedding, norm and head, and the entries of the SVD bases."""
        bases = self.rank * self._ends if self.parts.modulated else 0
        if self.parts.passes and self.parts.passes.bases == "frozen":
            bases = sum(self.base_ranks) * self._ends
        return self.shape.parameters(self.layers) + bases

    # ------------------------------------------------------------------------------------------------------ FLOPs

    def _step_flops(self) -> dict[str, int]:
        """What a recurrence step adds to its layer, forward, a token."""
        arm = self.parts
        return {"branches": 2 * self.rank * self._ends if arm.modulated else 0,
                # one that doesn't see the token is computed once a batch
                "controller": 2 * sum(self._controller().values()) if arm.reads else 0,
                "gate": 4 * self.shape.width**2 if arm.gate else 0}

    def _other_flops(self) -> dict[str, int]:
        """What LoRA, the two linear maps, and further passes, add, forward, a token."""
        trained = self.trainable()
        return {"lora": 2 * trained.get("lora", 0), "maps": 4 * self.shape.width**2 if "maps" in trained else 0,
                "passes": self._passes_flops() if self.parts.passes else 0}

    def _passes_flops(self) -> int:
        passes, ranks = self.parts.passes, self.lora_ranks
        factors = sum(self.base_ranks) if passes.bases != "none" else 0
        lora = self._again * ranks[self.split.prelude]  # where the scan's layer has a rank more it isn't counted
        reads = passes.modulation == "controller"
        controller = self.passes * sum(self._small(ranks)._controller().values()) if reads else 0
        return 2 * ((factors + lora) * self._ends + controller)

    def forward(self, depth: int, context: int) -> int:
        """FLOPs a token of a forward pass with logits."""
        steps = depth * sum(self._step_flops().values()) if self.parts.loops else 0
        return (self.applications(depth) * self.shape.layer_flops(context) + steps + sum(self._other_flops().values())
                + self.shape.head_flops)

    def training(self, depth: int, context: int) -> int:
        """FLOPs a token of a forward and backward pass. Raises InputError for an arm that isn't trained.

        No gradient is formed for frozen weights: a frozen layer costs as much backward as forward, but for attention,
        which costs twice as much; a trained one twice as much. Nothing before what is trained has a backward pass.
        """
        arm, shape = self.parts, self.shape
        if not arm.trained:
            raise InputError(f"arm '{self.arm}': isn't trained")
        layer = shape.layer_flops(context) + 4 * context * shape.queries
        backward = shape.head_flops + (0 if arm.middle == "refine" else self.split.coda * layer)
        # what reads a state that needs no gradient
        first = {name: shape.projections[name] for name in ("q_proj", "k_proj", "v_proj")}
        first_read = sum(2 * o * i for o, i in first.values())
        if arm.loops:
            backward += self._loop_backward(depth, layer, first_read, sum(i for _, i in first.values()))
        elif arm.middle == "maps":
            backward += layer - shape.width**2 * 2
        else:
            reached = self._reached()
            backward += (reached - self.split.coda) * layer
            if arm.lora != "none":  # a norm that is trained needs the gradient of what it puts out
                rank = self.lora_ranks[-min(reached, self.layers)]
                backward -= first_read + 2 * rank * sum(i for _, i in first.values())
        if arm.teacher != "none":
            backward += self.taught(context)
        return self.forward(depth, context) + backward + 2 * sum(self._other_flops().values())

    def taught(self, context: int) -> int:
        """FLOPs a token of learning from the full model: its states; for its logits five products with the head too,
        both models' forward, both again in the backward pass, the arm's gradient."""
        heads = 5 if self.parts.teacher == "logits" else 0
        return replace(self, arm="full").forward(1, context) + (heads - 1) * self.shape.head_flops

    def _reached(self) -> int:
        """Layers that a backward pass goes through, of an arm without a loop."""
        if self.parts.middle == "maps":
            return self.split.coda + 1
        if self.parts.lora == "kept_last":
            return LAST
        if self.parts.lora == "kept":
            return self.layers + self._again
        return self.split.coda + (1 + self._again if self.parts.passes else 0)

    def _loop_backward(self, depth: int, layer: int, first_read: int, read: int) -> int:
        """Of the recurrence steps. The first one's state comes from the prelude and needs no gradient: `first_read`
        FLOPs of its projections, which read `read` values, are saved."""
        arm, step = self.parts, self._step_flops()
        whole = depth * (layer + step["branches"] + 2 * step["controller"] + 2 * step["gate"])
        if not arm.modulated:
            return whole - layer - (0 if arm.step_norm else step["gate"])
        saved = first_read + 2 * self.rank * read
        return whole - saved - (2 * self._controller()["state"] if arm.reads else 0)

    # ------------------------------------------------------------------------------------------------------ bytes

    def cache(self, depth: int, dtype: str = "bfloat16") -> int:
        """Bytes a token in the key/value cache, a slot for each application of a layer."""
        return self.applications(depth) * 2 * self.shape.keys * BYTES[dtype]

    def activations(self, depth: int, dtype: str) -> int:
        """Bytes a token that a training step keeps for its backward pass, to some 10 %; without the logits."""
        shape, w, size, d, arm = self.shape, self.widths, BYTES[dtype], self.shape.width, self.parts
        cast = size != FLOAT32  # norms, gate and Controller compute in float32, and what they cast is kept twice
        layer = 2 * d * FLOAT32 + size * (2 * shape.queries + 2 * shape.keys + 3 * shape.intermediate)
        ends = d * FLOAT32 + self._read(dtype)
        if not arm.loops:
            return self._reached() * layer + ends + {"maps": 2, "affine": 1}.get(arm.middle, 0) * d * FLOAT32
        step = layer + 2 * d * FLOAT32 * arm.step_norm + d * (3 * FLOAT32 + (2 + cast) * size) * arm.gate
        if arm.modulated:
            step += 7 * self.rank * size
        if arm.reads:
            step += FLOAT32 * (d + 2 * (w.state + w.hidden + w.output) + w.step)
            step += 7 * self.rank * (FLOAT32 + size * cast)
        first = d * FLOAT32 if arm.modulated else layer  # what the first step needn't keep
        return depth * step - first + (0 if arm.middle == "refine" else self.split.coda * layer) + ends

    def _read(self, dtype: str) -> int:
        """Bytes a token of what projections read, which is kept where LoRA is trained."""
        shape, ranks = self.shape, [rank for rank in self.lora_ranks if rank]
        if dtype == "float32":
            read = 2 * shape.width + shape.queries + shape.intermediate
        else:  # each LoRA keeps its own copy in float32
            read = sum(i for _, i in shape.projections.values())
        return FLOAT32 * (len(ranks) * read + 7 * sum(ranks))

    def memory(self, depth: int, tokens: int, dtype: str) -> int:
        """Bytes that training holds at its peak: weights, trained tensors with gradients and moments, activations of
        a micro-batch of `tokens`, a chunk of logits with its gradient."""
        trained = sum(self.trainable().values())
        logits = 3 * min(tokens, LOGIT_CHUNK) * self.shape.vocabulary * FLOAT32
        return self.frozen() * BYTES[dtype] + 4 * trained * FLOAT32 + tokens * self.activations(depth, dtype) + logits


# --------------------------------------------------------------------------------------------------------- what it buys

def table(profile: Profile) -> pd.DataFrame:
    """What a user pays: the full model, the cut one, and the Controller's loop at each depth of the profile.

    GFLOPs a token forward (a prompt of a training block's length) and in training, bytes a token in a bfloat16 cache,
    held weights in millions, and each of them in percent of the full model's.
    """
    context, rows = profile.training.block, []
    full = Cost.of(profile, "full")
    for arm, depth in (("full", None), ("cut", None), *(("controller", depth) for depth in profile.depths)):
        cost = Cost.of(profile, arm)
        held = cost.frozen() + sum(cost.trainable().values())
        row = {"arm": arm, "depth": depth, "layers applied": cost.applications(depth or 1),
               "weights (million)": held / 1e6, "% of full's weights": 100 * held / full.frozen(),
               "trained (million)": sum(cost.trainable().values()) / 1e6}
        for name, value, whole in (
                ("forward (GFLOP a token)", cost.forward(depth or 1, context) / 1e9, full.forward(1, context) / 1e9),
                ("cache (bytes a token)", cost.cache(depth or 1), full.cache(1))):
            row |= {name: value, f"% of full's {name.split()[0]}": 100 * value / whole}
        row["training (GFLOP a token)"] = cost.training(depth, context) / 1e9 if depth else math.nan
        rows.append(row)
    return pd.DataFrame(rows).astype({"depth": "Int64"})


def found(profile: Profile) -> str:
    """One sentence: at which depth the loop stops being cheaper than the full model."""
    full, loop, context = Cost.of(profile, "full"), Cost.of(profile, "controller"), profile.training.block
    depths = range(1, full.shape.layers + 1)
    flops = max((d for d in depths if loop.forward(d, context) < full.forward(1, context)), default=0)
    cache = max((d for d in depths if loop.cache(d) < full.cache(1)), default=0)
    token = loop.forward(profile.depth, context)
    share = 100 * token / full.forward(1, context)
    modulation = 100 * (1 - Cost.of(profile, "none").forward(profile.depth, context) / token)
    return (f"Profile `{profile.name}`: {loop.layers} of {full.layers} layers held. At depth {profile.depth} a token "
            f"costs {share:.0f} % of the full model's FLOPs, {modulation:.1f} % of them in Controller and low-rank "
            f"branches. The loop computes less than the full model up to depth {flops}, and keeps a smaller cache up "
            f"to depth {cache}.")

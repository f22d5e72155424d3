"""What must fit together in a profile whose fields are each valid. Every refusal names file, field and value."""

from typing import TYPE_CHECKING

from ..errors import InputError
from .arms import ARMS
from .protocol import switches
from .schema import RATES, Entry

if TYPE_CHECKING:
    from .profile import Profile


def check(profile: "Profile", file: str) -> None:
    """Raises InputError at the first thing that doesn't fit; own arms are registered by then."""
    _check_base(profile, file)
    if profile.evaluation.points > profile.training.updates + 1:
        raise InputError(f"{file}: evaluation.points: {profile.evaluation.points}: a run has "
                         f"{profile.training.updates} updates; lower it")
    if profile.probes.blocks > profile.evaluation.final_blocks:
        raise InputError(f"{file}: probes.blocks: {profile.probes.blocks}: they are the first of "
                         f"evaluation.final_blocks, {profile.evaluation.final_blocks}; lower it")
    for number, entry in enumerate(profile.plan):
        _check_entry(entry, f"{file}: plan.{number}")
        if unknown := [arm for arm in entry.arms if ARMS[arm].scanned and profile.scanned is None]:
            raise InputError(f"{file}: plan.{number}.arms: '{unknown[0]}': loops or keeps layers that a scan chose; "
                             "make the run 'scan', and write what it says into 'scanned'")
    for run_id in profile.checkpoints:
        spec = profile.find(run_id)
        if not ARMS[spec.arm].loadable or spec.level:
            raise InputError(f"{file}: checkpoints: '{run_id}': no library loads what this arm trains, or its rate "
                             "isn't the chosen one; list loops whose coda is frozen, or arm 'lora'")
    if profile.keep_prelude and profile.base.dtype == "bfloat16":
        raise InputError(f"{file}: keep_prelude: true: states in bfloat16 can't be kept; leave it out")
    _check_rates(profile, file)


def _check_base(profile: "Profile", file: str) -> None:
    """What must fit the base, where its shape is known."""
    model, split = profile.base.model, profile.split
    if model is None:
        return
    layers = model["num_hidden_layers"]
    if not split.prelude <= split.recurrent < layers - split.coda or split.prelude + 1 + split.coda >= layers:
        name = f"{split.prelude}/{split.recurrent}/{split.coda} (prelude/recurrent layer/coda)"
        raise InputError(f"{file}: split: {name} "
                         f"of {layers} layers: the recurrent one lies between prelude and coda, and some are removed")
    head = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    most = min(model["hidden_size"], model["intermediate_size"], head * model["num_key_value_heads"])
    for place, rank in [("rank", profile.rank), *((f"plan.{n}.ranks", rank) for n, entry in enumerate(profile.plan)
                                                  for rank in entry.ranks)]:
        if rank > most:
            raise InputError(f"{file}: {place}: {rank}: the base's smallest projection has rank {most}; lower it")


def _check_entry(entry: Entry, where: str) -> None:
    for arm in entry.arms:
        if arm not in ARMS:
            raise InputError(f"{where}.arms: '{arm}': no such arm; one of {', '.join(ARMS)}")
    for protocol in entry.protocols:
        try:
            switches(protocol)
        except InputError as error:
            raise InputError(f"{where}.protocols: {error}") from None
    if rates := [rate for rate in entry.rates if rate not in RATES]:
        raise InputError(f"{where}.rates: {rates[0]:g}: rates are 1 or 3 times a power of ten, so that a search can go "
                         "one step outward")
    if entry.factors and entry.purpose != "rate":
        raise InputError(f"{where}.factors: {list(entry.factors)}: only an entry of purpose 'rate' has factors")
    if (entry.purpose == "rate") != bool(entry.rates):
        raise InputError(f"{where}.rates: {list(entry.rates)}: an entry of purpose 'rate' names the rates that it "
                         "tries, others name none")
    if entry.purpose == "rate" and (entry.protocols != ("corrected",) or len(entry.seeds) > 1 or entry.levels):
        raise InputError(f"{where}: a search is made under 'corrected' with one seed and no levels")
    if entry.purpose in ("screen", "pays") and None in (entry.role, entry.budget):
        raise InputError(f"{where}.class: {entry.role}: an entry of purpose '{entry.purpose}' names its class, "
                         "baseline or candidate, and its budget")


def _check_rates(profile: "Profile", file: str) -> None:
    """Every trained arm has a learning rate, chosen with a seed that no result has."""
    searches = [entry for entry in profile.plan if entry.purpose == "rate"]
    spare = {entry.seeds[0] for entry in searches}
    if used := spare & {seed for entry in profile.plan if entry.purpose in ("matrix", "pays") for seed in entry.seeds}:
        raise InputError(f"{file}: plan: seed {min(used)} is a search's and another entry's; rates are chosen with a "
                         "seed that no result has")
    searched = {arm for entry in searches for arm in entry.arms}
    screened = {arm for entry in profile.plan if entry.purpose == "screen" for arm in entry.arms}  # searched afterwards
    for arm, sibling in profile.siblings.items():
        if arm not in ARMS or sibling not in searched or arm in searched - screened:
            raise InputError(f"{file}: siblings.{arm}: '{sibling}': an arm that isn't searched takes the rates of one "
                             "that is")
    page = {arm for entry in searches if entry.role for arm in entry.arms}
    for number, entry in enumerate(profile.plan):
        for arm in entry.arms if (entry.purpose, entry.budget) == ("pays", "values") else ():
            if arm not in page and ARMS[arm].teacher != "logits":
                raise InputError(f"{file}: plan.{number}.arms: '{arm}': would be confirmed at a sibling's rates; "
                                 "search it first, in an entry of purpose 'rate' with its class (docs/hypotheses.md)")
    for arm in (*profile.arms, *(arm for entry in profile.plan if entry.role for arm in entry.arms)):
        if ARMS[arm].trained and profile.siblings.get(arm, arm) not in searched:
            raise InputError(f"{file}: siblings: arm '{arm}' is trained and has no learning rate; search it, or name "
                             "the arm whose rates it takes")

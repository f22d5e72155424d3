"""An arm of one's own beside the paper's: a profile with both, and the logs that are there already.

Never imports torch. docs/own-arm.md shows the whole way.
"""

import difflib
import hashlib
import re
import shutil
from pathlib import Path

import yaml

from ..errors import InputError
from ..log import read_manifest, write_atomic
from .arms import ARMS
from .learning_rates import planned, read_searches
from .plan import RunSpec
from .profile import PROFILES, Profile, parse_profile
from .schema import Entry, OwnArm
from .yaml_files import read_yaml, validated

BASELINES = ("controller", "static", "lora")
SEEDS = 3


def beside(profile: Profile, arm: str, root: Path) -> tuple[Profile, str]:
    """The profile `<profile>-<arm>`: searches and runs of one arm and of the baselines, at the base depth, `corrected`;
    and the arm's name. Nothing is written.

    Args:
        arm: the name of an arm of the package, or the YAML file of an own one (`OwnArm`), whose stem is its name.

    Raises: InputError for an arm that doesn't exist, is no trained one or is a baseline itself, for a bad file, and
    where the package has a profile of that name.
    """
    name, own = _own(arm, root) if arm.endswith((".yaml", ".yml")) else (arm, None)
    if name not in ARMS or not ARMS[name].trained or name in BASELINES:
        known = [n for n, a in ARMS.items() if a.trained and n not in BASELINES]
        files = [str(path.relative_to(root)) for path in Path(root).glob("arms/*.yaml")]
        near = difflib.get_close_matches(arm, files + known, 5, 0.3)
        raise InputError(f"arm '{arm}': name a YAML file, or a trained arm of the package other than "
                         f"{', '.join(BASELINES)}{', as ' * bool(near)}{', '.join(near)}")
    if (PROFILES / f"{profile.name}-{name}.yaml").exists():
        raise InputError(f"arm '{name}': its runs would lie among those of the package's profile "
                         f"'{profile.name}-{name}'; choose another name")
    data = profile.model_dump(mode="json", exclude_none=True) | {
        "name": f"{profile.name}-{name}", "base_of": profile.base_of or profile.name, "checkpoints": [], "prompts": [],
        "own_arms": {name: own.model_dump()} if own else {}, "plan": _plan(profile, name, own),
        "siblings": {a: s for a, s in profile.siblings.items() if a in (name, *BASELINES)}}
    return parse_profile(data, f"{data['name']}/profile.yaml"), name


def _own(file: str, root: Path) -> tuple[str, OwnArm]:
    """An own arm's name and entry, registered; its class's file seen from the checkout, with its hash."""
    path = Path(file)
    own, name = validated(OwnArm, read_yaml(path), file), path.stem
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"{file}: '{name}': the file's name is the arm's, so a letter a to z, then letters, digits "
                         "and _ only")
    module, _, kind = own.modulation.rpartition(":")
    code = (path.parent / module).resolve()
    if not code.is_file():
        raise InputError(f"{file}: modulation: '{own.modulation}': no file {code}")
    inside = code.is_relative_to(Path(root).resolve())
    shown = code.relative_to(Path(root).resolve()) if inside else code
    own = own.model_copy(update={"modulation": f"{shown.as_posix()}:{kind}",
                                 "sha256": hashlib.sha256(code.read_bytes()).hexdigest()})
    own.add_to_arms(name, file)
    return name, own


def _plan(profile: Profile, name: str, own: OwnArm | None) -> list[dict]:
    """The baselines' searches, the arm's own over the same rates, then three seeds of each, all at the base depth."""
    depth = profile.depth
    searches, budgets = [entry for entry in profile.plan if entry.purpose == "rate"], {}
    for entry in searches:
        budgets |= {arm: entry.updates for arm in entry.arms if arm not in budgets}
    # a later search of another budget chooses no rates (`learning_rates.search_of`)
    searches = [entry for entry in searches if any(budgets[arm] == entry.updates for arm in entry.arms)]
    plan = [_only(entry, BASELINES, depth) for entry in searches if not entry.role]  # docs/hypotheses.md has its own
    searched = {arm for entry in searches for arm in entry.arms}
    if own or (name not in profile.siblings and name not in searched):
        like = own.like if own else "controller"
        like = profile.siblings.get(like, like)
        plan += [_only(entry, (like,), depth) | {"arms": [name]} for entry in searches if like in entry.arms]
    elif name in searched:
        plan += [_only(entry, (name,), depth) for entry in searches]
    elif profile.siblings[name] not in BASELINES:
        plan += [_only(entry, (profile.siblings[name],), depth) for entry in searches]
    plan += [{"arms": ["full", "cut", *BASELINES, name], "depths": [depth], "seeds": list(profile.seeds[:SEEDS])}]
    return [entry for entry in plan if entry["arms"]]


def _only(entry: Entry, arms: tuple[str, ...], depth: int) -> dict:
    """An entry of a plan with some of its arms, at one depth where it has that one."""
    data = entry.model_dump(mode="json", exclude_defaults=True)
    data["arms"] = [arm for arm in entry.arms if arm in arms]
    if depth in entry.depths:
        data["depths"] = [depth]
    return data


def write(profile: Profile, made: Profile, root: Path, to: Path) -> None:
    """Write what `beside` made of a profile to <to>/results/<profile>-<arm>/profile.yaml, and copy the logs there that
    lie below `root` already, the profile's and those of earlier comparisons, until none is left: a search that is there
    may plan one more."""
    data = made.model_dump(mode="json", exclude_none=True)
    write_atomic(made.folder(to) / "profile.yaml", yaml.safe_dump(data, sort_keys=False))
    before, there = -1, 0
    while before < there:
        runs = planned(made, read_searches(made, to))
        before, there = there, sum(_copied(spec, profile, made, root, to) for spec in runs)


def _copied(spec: RunSpec, profile: Profile, made: Profile, root: Path, to: Path) -> bool:
    """Whether a run's log is there, copied if need be."""
    target, results = made.run_path(spec.id, to), profile.folder(root).parent
    others = [page.parent / "runs" / target.name for page in sorted(results.glob(f"{profile.name}-*/profile.yaml"))]
    for source in (profile.run_path(spec.id, root), *others):
        if not target.exists() and source.exists() and made.mismatch(read_manifest(source), spec) is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return target.exists()

"""Raw logs -> notebooks, tables, figures and verdicts, and the check that what is committed follows from them.

Everything is derived into a folder of its own and then compared with what is committed: values to 6 significant
digits, figures by the arrays plotted (their pixels may differ between machines). Never imports torch.
"""

import html
import json
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .analysis import claims, figures, inventory, overview, pages, tables, text
from .analysis.results import Results, base_run, load_results
from .errors import InputError
from .experiment.plan import RunSpec
from .experiment.profile import PROFILES, Profile
from .experiment.rates import planned, rates_of
from .log import Run, write_atomic
from .provenance import no_old_commits, note, unknown_commits
from .training.corpus import content_sha256

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
DIGITS = 1e-6  # relative: 6 significant digits
NOISE = 1e-9  # nats: a difference that is 0 but for rounding has no digits to compare
TOUR = "00_model.ipynb"  # trains a model, so it derives nothing from raw logs
LOGS = "results/README.md"  # which logs are committed
JOBS = 2  # notebooks that execute side by side
README_PROFILES = ("smollm2", "tiny-first")  # whose verdicts open the README
BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"


# -------------------------------------------------------------------------------------------- what notebooks call

@dataclass(frozen=True)
class Shown:
    """A table in a notebook; with a title it is folded behind it, beside a link to its CSV."""

    frame: pd.DataFrame
    title: str = ""
    link: str = ""

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            table = self.frame.to_html(index=False, na_rep="", border=0)
        if not self.title:
            return table
        rows = f"{len(self.frame)} row{'s' * (len(self.frame) != 1)}"
        return (f"<details><summary>{html.escape(self.title)} ({rows}, <a href=\"{self.link}\">CSV</a>)</summary>\n"
                f"{table}\n</details>")

    def __repr__(self) -> str:
        return f"{self.title}: {self.link}" if self.title else self.frame.to_string(index=False)


@dataclass(frozen=True)
class Output:
    """Where a notebook's tables and figures go: below `root`, in results/<profile>/tables and figures/<profile>."""

    results: Results
    root: Path

    def table(self, frame: pd.DataFrame, name: str, title: str = "") -> "Shown | None":
        """Write a table as CSV (10 digits) and Markdown (4 digits); returns it folded behind its title, if it has rows.
        """
        folder = self.root / "results" / self.results.profile.name / "tables"
        write_atomic(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.10g"))
        mark = pages.SMOKE + "\n\n" if self.results.profile.name == "smoke" else ""
        write_atomic(folder / f"{name}.md", mark + frame.to_markdown(index=False, floatfmt=".4g") + "\n")
        rounded = frame.map(lambda value: float(f"{value:.4g}") if isinstance(value, float) else value)
        return Shown(rounded, title or name, f"../tables/{name}.csv") if len(rounded) else None

    def say(self, lines: Iterable[str], *arms: str):
        """Generated sentences as a list; last, how many runs of some arms are planned and not run."""
        from IPython.display import Markdown

        lines = [line for line in [*lines, text.planned(self.results, *arms) if arms else ""] if line]
        lines = lines or [f"{text.NOT_RUN}, or not planned at this profile.".capitalize()]
        return Markdown("\n".join(f"- {line}" for line in lines))

    def brief(self, frame: pd.DataFrame, headings: Mapping[str, str]) -> "Shown | None":
        """Some columns of a table, to be read (`tables.brief`), if a row of it was run."""
        shown = tables.brief(frame, headings)
        return Shown(shown) if len(shown) else None

    def figure(self, figure, name: str):
        """Write a figure with its sidecar; returns the picture to be shown, if it shows anything."""
        from IPython.display import Image

        if figures.empty(figure):
            return None
        folder = self.root / "figures" / self.results.profile.name
        finding = figures.save(figure, name, self.results, folder)
        return Image(data=(folder / f"{name}.png").read_bytes(), alt=finding)


def home() -> Path:
    """The checkout that holds results/ and notebooks/: `OUROBOROS_ROOT`, or the first parent with a pyproject.toml."""
    if root := os.environ.get("OUROBOROS_ROOT"):
        return Path(root)
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]):
        if (folder / "pyproject.toml").exists() and (folder / "notebooks").exists():
            return folder
    return Path.cwd()


def open_profile(profile: str) -> tuple[Results, Output]:
    """A notebook's first call: the profile's raw logs, and where its tables and figures go."""
    root = home()
    results = _handed_over.get(profile) or load_results(profile, root)
    return results, Output(results, Path(os.environ.get("OUROBOROS_OUT", root)))


_handed_over: dict[str, Results] = {}  # what `derive` read, in the processes that execute its notebooks


def _hand_over(profile: Profile, runs: Mapping[str, Run]) -> None:
    """All notebooks see the same runs, whatever lands meanwhile."""
    _handed_over[profile.name] = Results(profile, runs)


# -------------------------------------------------------------------------------------------------------- deriving

def execute_notebook(notebook: Path, target: Path, parameters: dict, environment: dict[str, str],
                     kernel: bool = False) -> None:
    """Run a notebook with papermill into `target`, without timestamps, durations or paths: in this process, or in a
    `kernel` of its own.

    Raises InputError for a parameter that its `parameters` cell doesn't have (papermill would only warn), and when a
    cell fails.
    """
    import nbformat  # here, since it takes a second and every notebook's kernel imports this module
    import papermill

    from .inprocess import ENGINE

    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in known:
            raise InputError(f"{notebook.name}: parameter '{name}' is unknown; it has {', '.join(known)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # the kernel is this Python and runs no startup file of the user's
    ipython = tempfile.TemporaryDirectory()
    environment = environment | {"PYTHONSTARTUP": "", "IPYTHONDIR": ipython.name, "JUPYTER_PATH": "",
                                 "JUPYTER_PREFER_ENV_PATH": "1"}
    saved = {name: os.environ.get(name) for name in environment}
    os.environ |= environment  # the kernel inherits them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(str(notebook), str(target), parameters, kernel_name="python3",
                                       engine_name=None if kernel else ENGINE, progress_bar=False, log_output=False,
                                       extra_arguments=["--IPKernelApp.log_level=50"])  # its ends aren't errors
    except papermill.PapermillExecutionError as error:
        raise InputError(f"{notebook.name}: a cell failed with {error.ename}: {error.evalue}; open the notebook to see "
                         "where") from None
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        ipython.cleanup()
    write_atomic(target, nbformat.writes(_clean(nbformat.read(target, 4))) + "\n")


def _clean(notebook):
    """Drop what differs from run to run or machine to machine: times, generated ids, the Python version."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    return notebook


def derive(results: Results, root: Path, out: Path) -> None:
    """Derive everything of a profile below `out`: notebooks, tables, figures, claims.md."""
    profile = results.profile.name
    folder = out / "results" / profile
    notebooks = set((root / "notebooks").glob("*.ipynb")) - {root / "notebooks" / TOUR}
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn"), _hand_over, (results.profile, results.runs)) \
            as pool:
        environment = {"OUROBOROS_ROOT": str(root), "OUROBOROS_OUT": str(out)}
        running = [pool.submit(execute_notebook, notebook, folder / "notebooks" / notebook.name, {"profile": profile},
                               environment)  # the longest first
                   for notebook in sorted(notebooks, key=lambda path: path.stat().st_size, reverse=True)]
        write_atomic(folder / "claims.md", pages.markdown(results))
        write_atomic(folder / "tables" / "claims.csv", claims.with_runs(results).to_csv(index=False))
        for notebook in running:
            notebook.result()  # what it raised


def _outputs(root: Path, profile: str) -> set[Path]:
    """The derived files below a root, relative to it."""
    places = (f"results/{profile}/notebooks/*.ipynb", f"results/{profile}/tables/*", f"results/{profile}/claims.md",
              f"figures/{profile}/*")
    return {path.relative_to(root) for place in places for path in root.glob(place) if path.name != TOUR}


# ------------------------------------------------------------------------------------------------------- comparing

def _same_text(old: str, new: str) -> str | None:
    """None if two texts agree, numbers to 6 significant digits; else the first line that doesn't."""
    for number, (a, b) in enumerate(zip(old.splitlines(), new.splitlines(), strict=False), 1):
        if a != b:
            numbers = list(zip(NUMBER.findall(a), NUMBER.findall(b), strict=False))
            close = all(math.isclose(float(x), float(y), rel_tol=DIGITS, abs_tol=NOISE) for x, y in numbers)
            if NUMBER.sub("#", a) != NUMBER.sub("#", b) or not close:
                start = max(0, len(os.path.commonprefix([a, b])) - 20)  # lines of tables are long
                return f"line {number}: committed '{a[start:start + 100]}', derived '{b[start:start + 100]}'"
    if len(old.splitlines()) != len(new.splitlines()):
        return f"{len(old.splitlines())} lines committed, {len(new.splitlines())} derived"
    return None


def _same_table(old: Path, new: Path) -> str | None:
    frames = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in (old, new)]
    if list(frames[0]) != list(frames[1]) or len(frames[0]) != len(frames[1]):
        return f"shape {frames[0].shape} committed, {frames[1].shape} derived"
    for column in frames[0]:
        for row, (a, b) in enumerate(zip(frames[0][column], frames[1][column], strict=True), 1):
            if difference := _same_text(a, b):
                return f"row {row}, column '{column}': {difference.split(': ', 1)[-1]}"
    return None


def _sidecar(path: Path) -> str:
    """A sidecar as text, without the hashes of its picture files: those are the machine's."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data.pop("files", None)
    return json.dumps(data, indent=1)


def _notebook(path: Path) -> str:
    """What a notebook says: sources and text outputs; its pictures are compared as figures."""
    import nbformat

    lines = []
    for cell in nbformat.read(path, 4).cells:
        lines.append(cell.source)
        for output in cell.get("outputs", ()):
            lines += [output.get("text", ""), output.get("data", {}).get("text/plain", ""),
                      output.get("data", {}).get("text/markdown", "")]
    return "\n".join(line for line in lines if "IPython.core.display.Image" not in line)


def _difference(old: Path, new: Path) -> str | None:
    """None if a committed output agrees with the derived one, else where it doesn't."""
    read = {".json": _sidecar, ".ipynb": _notebook}.get(old.suffix, lambda path: path.read_text(encoding="utf-8"))
    try:
        if old.suffix in (".png", ".pdf"):
            sidecar = old.with_suffix(".json")
            stated = json.loads(read(sidecar))["files"].get(old.suffix[1:]) if sidecar.exists() else None
            return None if stated == content_sha256(old.read_bytes()) else "isn't the picture that its sidecar names"
        if old.suffix == ".csv" and read(old).strip():  # a table of no rows has no columns, and so no text
            return _same_table(old, new)
        return _same_text(read(old), read(new))
    except (ValueError, KeyError) as error:  # a NotJSONError of nbformat's is a ValueError
        return f"can't be read ({str(error).splitlines()[0]})"


def _differences(profile: str, root: Path, out: Path) -> Iterator[tuple[Path, str]]:
    committed, derived = _outputs(root, profile), _outputs(out, profile)
    for path in sorted(committed | derived):
        if path not in derived:
            yield path, "committed, but nothing derives it"
        elif path not in committed:
            yield path, "derived, but not committed"
        elif found := _difference(root / path, out / path):
            yield path, found


def _provenance_faults(results: Results, root: Path) -> Iterator[str]:
    """Runs that may not be committed: not of the plan, of another identity or base, of an unclean or unknown commit, in
    packages that aren't the lock's, or at a rate that the search didn't choose. A run that isn't made is no fault."""
    profile, runs, base = results.profile, results.runs, base_run(results.profile, root)
    plan = {spec.id: spec for spec in planned(profile, runs)}
    if base and not base.manifest["clean"]:
        yield f"{profile.base_folder(root)}/base.jsonl: field 'clean': false; make base PROFILE={profile.name} FORCE=1"
    for name, run in runs.items():
        where, manifest = f"results/{profile.name}/runs/{name}.jsonl", run.manifest
        if name not in plan:
            yield f"{where}: no run of the profile's plan; remove it, or add it to the plan"
            continue
        for package, version in manifest["packages"].items():
            if profile.packages.get(package) != version:
                yield (f"{where}: field 'packages': '{package}' is {version}, neither the lock's version nor one that "
                       "the profile names; make the run again")
                break
        if base and manifest["hashes"]["base"] != base.manifest["hashes"]["base"]:
            yield f"{where}: field 'hashes.base': isn't the base of {profile.base_folder(Path())}; make the run again"
        if why := profile.mismatch(manifest, plan[name]):
            yield f"{where}: {why}; make the run again"
        if not manifest["clean"]:
            yield f"{where}: field 'clean': false; the run is of uncommitted code, make it again from a clean commit"
        if manifest["rate"] is not None and (why := _other_rate(plan[name], results)):
            yield f"{where}: field 'rate': {why}"
    yield from _unknown_commits(results, root)


def _other_rate(spec: RunSpec, results: Results) -> str | None:
    """Why a run's rates aren't what the finished searches chose; None if they are."""
    run = results.runs[spec.id]
    try:
        chosen = rates_of(spec, results.profile, results.runs)
    except InputError as error:
        return str(error).partition(": ")[2]
    found = run.manifest["rate"], run.manifest.get("elementwise_rate", chosen.elementwise)  # tiny-first's have one
    if found != (chosen.matrix, chosen.elementwise):
        return f"{found[0]:g} and {found[1]:g}, the search chose {chosen.matrix:g} and {chosen.elementwise:g}"
    return None


def _unknown_commits(results: Results, root: Path) -> Iterator[str]:
    """Runs of commits that this repository doesn't have; nothing where it has no whole history."""
    commits = {run.manifest["commit"]: name for name, run in results.runs.items()}
    if why := no_old_commits(root):
        note(f"whether the commits of the runs exist isn't checked: {why}")
        return
    for commit in sorted(unknown_commits(root, commits), key=commits.get):  # sets have no order
        yield (f"results/{results.profile.name}/runs/{commits[commit]}.jsonl: field 'commit': {commit} is unknown to "
               "this repository")


# -------------------------------------------------------------------------------------------------------- commands

def readme_block(*several: Results) -> str:
    """What stands between the verdict marks of README.md."""
    return f"{BEGIN}\n{overview.page(*several)}\n{END}"


def _shown(all_results: dict[str, Results], root: Path) -> list[Results]:
    """The profiles with committed logs whose verdicts open the README; those that weren't asked for are read."""
    return [all_results.get(profile) or load_results(profile, root)
            for profile in README_PROFILES if profile in committed(root)]


def _readme_with(block: str, text: str) -> str:
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block, text, flags=re.DOTALL)


def committed(root: Path) -> list[str]:
    """The profiles that have committed logs. Raises InputError when none has."""
    names = [path.stem for path in sorted(PROFILES.glob("*.yaml")) if path.stem not in inventory.UNCOMMITTED]
    found = [name for name in names if any((root / "results" / name / "runs").glob("*.jsonl"))]
    if not found:
        raise InputError(f"{root / 'results'}: no profile has logs there; make runs PROFILE=tiny makes some")
    return found


def reproduce(profiles: list[str], root: Path) -> None:
    """Derive everything and print the verdicts; a committed output is rewritten only where verify would fault it."""
    all_results = {profile: load_results(profile, root) for profile in profiles}
    for profile, results in all_results.items():
        with tempfile.TemporaryDirectory() as temporary:
            derive(results, root, Path(temporary))
            changed = _take_over(profile, root, Path(temporary))
        print(f"{pages.summary(results)}\n\n{changed} outputs written; all of them: results/{profile}/ and figures/"
              f"{profile}/")
    if set(profiles) - set(inventory.UNCOMMITTED):
        write_atomic(root / LOGS, inventory.markdown(root, all_results))
    if set(README_PROFILES) & set(profiles) and (readme := root / "README.md").exists():
        text = readme.read_text(encoding="utf-8")
        if (new := _readme_with(readme_block(*_shown(all_results, root)), text)) != text:
            write_atomic(readme, new)


def _take_over(profile: str, root: Path, out: Path) -> int:
    """Copy what was derived over what is committed, where the two differ; returns how many files those are."""
    changed = {path for path, _ in _differences(profile, root, out)}
    # a figure is three files that go together
    changed |= {path for path in _outputs(out, profile) if path.with_suffix(".json") in changed}
    changed |= {path.with_suffix(kind) for path in changed if path.parts[0] == "figures"
                for kind in (".png", ".pdf", ".json")}
    for path in sorted(changed):
        if (out / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / path, root / path)
        else:
            (root / path).unlink(missing_ok=True)
    return len(changed)


def tour(profile: str, root: Path) -> None:
    """Execute the notebook that converts, trains, generates and saves."""
    if not (root / "notebooks" / TOUR).exists():
        raise InputError(f"{root / 'notebooks' / TOUR}: not found; notebooks are run in a checkout of the repository")
    target = root / "results" / profile / "notebooks" / TOUR
    execute_notebook(root / "notebooks" / TOUR, target, {"profile": profile}, {"OUROBOROS_ROOT": str(root)},
                     kernel=True)


def verify(profiles: list[str], root: Path) -> list[str]:
    """Derive everything elsewhere and compare; returns each place where what is committed differs."""
    all_results, faults = {profile: load_results(profile, root) for profile in profiles}, []
    for profile, results in all_results.items():
        faults += _provenance_faults(results, root)
        with tempfile.TemporaryDirectory() as temporary:
            derive(results, root, Path(temporary))
            faults += [f"{path}: {found}" for path, found in _differences(profile, root, Path(temporary))]
    if set(profiles) - set(inventory.UNCOMMITTED):
        dated = (root / LOGS).read_text(encoding="utf-8") if (root / LOGS).exists() else ""
        if found := _same_text(dated, inventory.markdown(root, all_results)):
            faults.append(f"{LOGS}: {found}")
        faults += _readme_faults(all_results, root)
    return faults


def _readme_faults(all_results: dict[str, Results], root: Path) -> Iterator[str]:
    """Where README isn't what the logs say: all of it, whichever profiles were asked for."""
    readme = root / "README.md"
    if not readme.exists():
        return
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        yield f"README.md: the marks {BEGIN} and {END} must stand there, once each"
        return
    if found := _same_text(text, _readme_with(readme_block(*_shown(all_results, root)), text)):
        yield f"README.md: {found}"

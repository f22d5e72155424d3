"""Raw logs -> notebooks, tables, figures and verdicts, and the check that what is committed follows from them.

Everything is derived into a folder of its own and then compared with what is committed: values to 6 significant
digits, figures by the arrays plotted (their pixels may differ between machines). Never imports torch.
"""

import base64
import csv
import html
import io
import json
import math
import multiprocessing
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .analysis import cards, claims, figures, inventory, overview, pages, pays, scales, tables, text
from .analysis.results import Results, base_run, load_results, results_at_hand
from .errors import InputError
from .experiment.learning_rates import planned, rates_of
from .experiment.plan import RunSpec
from .experiment.profile import PROFILES, Profile
from .log import Run, write_atomic
from .provenance import no_old_commits, note, unknown_commits
from .training.corpus import content_sha256

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")  # not one within a name or a hash
DIGITS = 1e-6  # relative: 6 significant digits
NOISE = 1e-13  # nats: a difference that is 0 but for rounding has no digits to compare
PICTURE = re.compile(r'"image/png": "([^"]*)"|"(?:png|pdf)": "[0-9a-f]{64}"')  # in notebooks, in sidecars
TOUR = "00_model.ipynb"  # trains a model, so it derives nothing from raw logs
PAYS = "12_pays.ipynb"  # of profiles that plan docs/hypotheses.md
LOGS = "results/README.md"  # which logs are committed
SCALES = "results/scales.md"  # where the README's profiles agree
README = "README.md"
JOBS = 2  # notebooks that execute side by side
README_PROFILES = ("smollm2", "tiny")  # whose verdicts open the README
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
    pictures: bool = True  # whether figures are drawn

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

    def brief(self, frame: pd.DataFrame, headings: Mapping[str, str], across: str | None = None) -> "Shown | None":
        """Some columns of a table, to be read (`tables.brief`), if a row of it was run."""
        shown = tables.brief(frame, headings, across)
        return Shown(shown) if len(shown) else None

    def figure(self, figure, name: str):
        """Write a figure with its sidecar; returns the picture to be shown, if it shows anything."""
        from IPython.display import Image

        if figures.empty(figure):
            return None
        folder = self.root / "figures" / self.results.profile.name
        finding = figures.save(figure, name, self.results, folder, self.pictures)
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
    return results, Output(results, Path(os.environ.get("OUROBOROS_OUT", root)), "OUROBOROS_UNDRAWN" not in os.environ)


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
    from nbclient.exceptions import DeadKernelError

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
    except DeadKernelError:
        raise InputError(f"{notebook.name}: its kernel was killed, as when memory runs out; run the same command "
                         "again") from None
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


def derive(results: Results, root: Path, out: Path, pictures: bool = True) -> None:
    """Derive everything of a profile below `out`: notebooks, tables, figures, claims.md, checkpoints' cards. Figures
    are drawn only with `pictures`, which no comparison reads."""
    profile = results.profile.name
    folder = out / "results" / profile
    unasked = {TOUR} if any(entry.role for entry in results.profile.plan) else {TOUR, PAYS}
    notebooks = {path for path in (root / "notebooks").glob("*.ipynb") if path.name not in unasked}
    environment = {"OUROBOROS_ROOT": str(root), "OUROBOROS_OUT": str(out)}
    environment |= {} if pictures else {"OUROBOROS_UNDRAWN": "1"}
    try:
        with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn"), _hand_over, (results.profile, results.runs)
                                 ) as pool:
            running = [pool.submit(execute_notebook, notebook, folder / "notebooks" / notebook.name,
                                   {"profile": profile}, environment)  # the longest first
                       for notebook in sorted(notebooks, key=lambda path: path.stat().st_size, reverse=True)]
            write_atomic(folder / "claims.md", pages.markdown(results))
            if found := pays.as_json(results):
                write_atomic(folder / "pays.json", found)
            write_atomic(folder / "tables" / "claims.csv", claims.with_runs(results).to_csv(index=False))
            for path, card in cards.cards(results, root):
                write_atomic(out / path, card)
            for notebook in running:
                notebook.result()  # what it raised
    except (BrokenProcessPool, BrokenPipeError):  # a pool says in two ways that a process of it was killed
        raise InputError("a process that executes notebooks was killed, as when memory runs out; run the same command "
                         "again") from None


def _outputs(root: Path, profile: str) -> set[Path]:
    """The derived files below a root, relative to it."""
    places = (f"results/{profile}/notebooks/*.ipynb", f"results/{profile}/tables/*", f"results/{profile}/claims.md",
              f"results/{profile}/pays.json", f"results/{profile}/checkpoints/*/README.md", f"figures/{profile}/*")
    return {path.relative_to(root) for place in places for path in root.glob(place) if path.name != TOUR}


# ------------------------------------------------------------------------------------------------------- comparing

def _same_number(old: str, new: str) -> bool:
    """Whether two numbers agree: to 6 significant digits, integers in all of them."""
    if "." not in old + new and "e" not in (old + new).lower():
        return int(old) == int(new)
    return math.isfinite(float(old)) and math.isclose(float(old), float(new), rel_tol=DIGITS, abs_tol=NOISE)


def _same_text(old: str, new: str) -> str | None:
    """None if two texts agree, numbers to 6 significant digits; else the first line that doesn't."""
    if old == new:
        return None
    committed, derived = old.split("\n"), new.split("\n")
    for number, (a, b) in enumerate(zip(committed, derived, strict=False), 1):
        if a != b and not (NUMBER.sub("#", a) == NUMBER.sub("#", b)
                           and all(map(_same_number, NUMBER.findall(a), NUMBER.findall(b)))):
            start = max(0, len(os.path.commonprefix([a, b])) - 20)  # lines of tables are long
            return f"line {number}: committed '{a[start:start + 100]}', derived '{b[start:start + 100]}'"
    return None if len(committed) == len(derived) else f"{len(committed)} lines committed, {len(derived)} derived"


def _same_table(old: str, new: str) -> str | None:
    """The same for two tables in CSV, by row (0: their head) and column."""
    committed, derived = (list(csv.reader(io.StringIO(text))) for text in (old, new))
    if [*map(len, committed)] != [*map(len, derived)]:
        shapes = [(len(rows) - 1, max(map(len, rows))) for rows in (committed, derived)]
        return f"shape {shapes[0]} committed, {shapes[1]} derived"
    for row, (old_cells, new_cells) in enumerate(zip(committed, derived)):
        for column, a, b in zip(committed[0], old_cells, new_cells) if old_cells != new_cells else ():
            if difference := _same_text(a, b):
                return f"row {row}, column '{column}': {difference.partition(': ')[2]}"
    return None


def _difference(kind: str, old: str, new: str) -> str | None:
    """None if a committed text agrees with the derived one, else where it doesn't; `kind` is its file's suffix.

    Pictures are left out, and their hashes: both are the machine's.
    """
    if kind == ".csv" and old.strip() and new.strip():  # a table of no rows has no columns, and so no text
        return _same_table(old, new)
    return _same_text(*(PICTURE.sub("", text) for text in (old, new)))


def _picture_fault(picture: Path) -> str | None:
    """None if a picture is the one that its sidecar names."""
    try:
        named = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))["files"][picture.suffix[1:]]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    return None if named == content_sha256(picture.read_bytes()) else "isn't the picture that its sidecar names"


def _pictures(notebook: Path) -> set[str]:
    """Each picture that an executed notebook shows, in base64."""
    found = PICTURE.findall(notebook.read_text(encoding="utf-8"))
    return {encoded.replace("\\n", "") for encoded in found if encoded}


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def _differences(profile: str, root: Path, out: Path) -> Iterator[tuple[Path, str]]:
    committed, derived = _outputs(root, profile), _outputs(out, profile)
    figures = {_encoded(path) for path in root.glob(f"figures/{profile}/*.png")}
    for path in sorted(committed | derived):
        if path not in derived:
            yield path, "committed, but nothing derives it"
        elif path not in committed:
            yield path, "derived, but not committed"
        elif found := _file_difference(path, root, out):
            yield path, found
        elif path.suffix == ".ipynb" and _pictures(root / path) - figures:
            yield path, "shows a picture that is none of the profile's figures"


def _file_difference(path: Path, root: Path, out: Path) -> str | None:
    if path.suffix in (".png", ".pdf"):
        return _picture_fault(root / path)
    try:
        return _difference(path.suffix, *((folder / path).read_text(encoding="utf-8") for folder in (root, out)))
    except (UnicodeDecodeError, csv.Error) as error:
        return f"can't be read ({error})"


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
    found = run.manifest["rate"], run.manifest["elementwise_rate"]
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


def _of_readme(all_results: dict[str, Results], root: Path) -> list[Results]:
    """The profiles with committed logs whose verdicts open the README; those that weren't asked for are read."""
    return [all_results.get(profile) or load_results(profile, root)
            for profile in README_PROFILES if profile in committed(root)]


def shared_pages(shown: list[Results], all_results: dict[str, Results], root: Path) -> dict[str, str]:
    """The pages that speak of several profiles, {path: text, empty where there is none}; `shown` are README's."""
    texts = {LOGS: inventory.markdown(root), SCALES: ""}
    if len(shown) == len(README_PROFILES):
        names = [name for name in scales.variants(README_PROFILES[1]) if (PROFILES / f"{name}.yaml").exists()]
        texts[SCALES] = scales.markdown(*shown, [all_results.get(name) or results_at_hand(name, root)
                                                 for name in names])
    if shown and (root / README).exists():
        texts[README] = _readme_with(readme_block(*shown), (root / README).read_text(encoding="utf-8"))
    return texts


def _unmarked(readme: str) -> str | None:
    """None if README has both marks, else what is said of it."""
    marked = readme.count(BEGIN) == readme.count(END) == 1
    return None if marked else f"the marks {BEGIN} and {END} must stand there, once each"


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
    """Derive everything and print the verdicts; a committed output is rewritten only where verify would fault it.

    Raises InputError where README has no place for them.
    """
    if (root / README).exists() and (fault := _unmarked((root / README).read_text(encoding="utf-8"))):
        raise InputError(f"{root / README}: {fault}")
    all_results = {profile: load_results(profile, root) for profile in profiles}
    for profile, results in all_results.items():
        with tempfile.TemporaryDirectory() as temporary:
            derive(results, root, Path(temporary))
            changed = _take_over(profile, root, Path(temporary))
        print(f"{pages.summary(results)}\n\n{changed} outputs written; all of them: results/{profile}/ and figures/"
              f"{profile}/")
    if set(profiles) - set(inventory.UNCOMMITTED):
        for path, page in shared_pages(_of_readme(all_results, root), all_results, root).items():
            _rewrite(root / path, page)


def _rewrite(path: Path, text: str) -> None:
    if not text:
        if path.exists():  # a read-only folder refuses to lose even what isn't there
            path.unlink()
    elif not path.exists() or _same_text(path.read_text(encoding="utf-8"), text):
        write_atomic(path, text)


def _take_over(profile: str, root: Path, out: Path) -> int:
    """Copy what was derived over what is committed, where the two differ; returns how many files those are."""
    changed = {path for path, _ in _differences(profile, root, out)}
    for group in _groups(profile, out):
        if group & changed:
            changed |= group
    for path in sorted(changed):
        if (out / path).exists():
            write_atomic(root / path, (out / path).read_bytes())
        else:
            (root / path).unlink(missing_ok=True)
    return len(changed)


def _groups(profile: str, out: Path) -> Iterator[set[Path]]:
    """Derived files that go together: a figure's three, then a notebook with the figures that it shows."""
    figures = {}
    for path in out.glob(f"figures/{profile}/*.png"):
        figures[_encoded(path)] = {path.relative_to(out).with_suffix(kind) for kind in (".png", ".pdf", ".json")}
    yield from figures.values()
    for notebook in out.glob(f"results/{profile}/notebooks/*.ipynb"):
        yield {notebook.relative_to(out)}.union(*(figures.get(shown, ()) for shown in _pictures(notebook)))


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
            derive(results, root, Path(temporary), pictures=False)
            faults += [f"{path}: {found}" for path, found in _differences(profile, root, Path(temporary))]
    if set(profiles) - set(inventory.UNCOMMITTED):
        for path, page in shared_pages(_of_readme(all_results, root), all_results, root).items():
            found = (root / path).read_text(encoding="utf-8") if (root / path).exists() else ""
            fault = _unmarked(found) if path == README else None
            if fault := fault or _same_text(found, page):
                faults.append(f"{path}: {fault}")
    return faults

"""Raw logs -> notebooks, tables, figures and verdicts, and the check that what is committed follows from them.

Everything is derived into a folder of its own and then compared with what is committed: values to 6 significant
digits, figures by the arrays plotted (their pixels may differ between machines). Never imports torch.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd

from . import claims, figures, findings, inventory, metrics, rates
from .corpus import sha256
from .errors import InputError
from .experiment import load_profile
from .metrics import Results
from .provenance import has_commit, no_old_commits, note
from .runlog import write_atomic

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
DIGITS = 1e-6  # relative: 6 significant digits
NOISE = 1e-9  # nats: a difference that is 0 but for rounding has no digits to compare
TOUR = "00_model.ipynb"  # trains a model, so it derives nothing from raw logs
LOGS = "results/README.md"  # which logs are committed
README_PROFILE = "tiny"  # the profile whose verdicts open the README
BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"


# -------------------------------------------------------------------------------------------- what notebooks call

@dataclass(frozen=True)
class Output:
    """Where a notebook's tables and figures go: below `root`, in results/<profile>/tables and figures/<profile>."""

    results: Results
    root: Path

    def table(self, frame: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write a table as CSV (10 digits) and Markdown (4 digits); returns it to be shown."""
        folder = self.root / "results" / self.results.profile.name / "tables"
        write_atomic(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.10g"))
        mark = claims.SMOKE + "\n\n" if self.results.profile.name == "smoke" else ""
        write_atomic(folder / f"{name}.md", mark + frame.to_markdown(index=False, floatfmt=".4g") + "\n")
        return frame.map(lambda value: float(f"{value:.4g}") if isinstance(value, float) else value)

    def figure(self, figure, name: str, runs: dict | None = None):
        """Write a figure with its sidecar; returns the picture to be shown. `runs`: see `figures.save`."""
        from IPython.display import Image

        folder = self.root / "figures" / self.results.profile.name
        figures.save(figure, name, self.results, folder, runs)
        return Image(data=(folder / f"{name}.png").read_bytes())


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
    results = metrics.load(profile, root)
    return results, Output(results, Path(os.environ.get("OUROBOROS_OUT", root)))


# -------------------------------------------------------------------------------------------------------- deriving

def execute(notebook: Path, target: Path, parameters: dict, root: Path, out: Path) -> None:
    """Run a notebook with papermill into `target`, without timestamps, durations or paths.

    Raises InputError for a parameter that its `parameters` cell doesn't have (papermill would only warn), and when a
    cell fails.
    """
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in known:
            raise InputError(f"{notebook.name}: parameter '{name}' is unknown; it has {', '.join(known)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # the kernel is this Python and runs no startup file of the user's
    ipython = tempfile.TemporaryDirectory()
    environment = {"OUROBOROS_ROOT": str(root), "OUROBOROS_OUT": str(out), "PYTHONSTARTUP": "",
                   "IPYTHONDIR": ipython.name, "JUPYTER_PATH": "", "JUPYTER_PREFER_ENV_PATH": "1"}
    saved = {name: os.environ.get(name) for name in environment}
    os.environ |= environment  # the kernel inherits them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(str(notebook), str(target), parameters, kernel_name="python3",
                                       progress_bar=False, log_output=False,
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


def derive(profile: str, root: Path, out: Path) -> None:
    """Derive everything of a profile below `out`: notebooks, tables, figures, claims.md."""
    results = metrics.load(profile, root)
    folder = out / "results" / profile
    notebooks = sorted(set((root / "notebooks").glob("*.ipynb")) - {root / "notebooks" / TOUR})
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(execute, notebook, folder / "notebooks" / notebook.name, {"profile": profile}, root, out)
                   for notebook in notebooks]
        for notebook in running:
            notebook.result()  # what it raised
    write_atomic(folder / "claims.md", claims.markdown(results))


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
            stated = json.loads(sidecar.read_text())["files"].get(old.suffix[1:]) if sidecar.exists() else None
            return None if stated == sha256(old.read_bytes()) else "isn't the picture that its sidecar names"
        if old.suffix == ".csv":
            return _same_table(old, new)
        return _same_text(read(old), read(new))
    except (ValueError, KeyError, nbformat.reader.NotJSONError) as error:
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


def _provenance_faults(profile: str, root: Path) -> Iterator[str]:
    """Runs that may not be committed: of an unclean or unknown commit, in packages that aren't the lock's, of another
    base or configuration than the profile's, or at a rate that the search didn't choose."""
    declared = load_profile(profile)
    if unknown := no_old_commits(root):
        note(f"whether the commits of the runs exist isn't checked: {unknown}")
    known: dict[str, bool] = {}
    runs, base = metrics.load(profile, root).runs, metrics.base_run(declared, root)
    config = declared.model_dump(mode="json")
    if base and not base.manifest["clean"]:
        yield f"results/{profile}/base/manifest.json: field 'clean': false; make base PROFILE={profile} FORCE=1"
    for name, run in runs.items():
        where, commit = f"results/{profile}/runs/{name}/manifest.json", run.manifest["commit"]
        if not run.manifest["locked"]:
            yield f"{where}: field 'locked': false; the run's packages aren't the lock's, make it again with make runs"
        if base and run.manifest["hashes"]["base"] != base.manifest["hashes"]["base"]:
            yield f"{where}: field 'hashes.base': isn't the base of results/{profile}/base; make the run again"
        for field in ("split", "max_steps", "controller", "training", "evaluation"):
            if run.manifest["config"][field] != config[field]:
                yield f"{where}: field 'config.{field}': isn't the profile's any more; make the run again"
        if not run.manifest["clean"]:
            yield f"{where}: field 'clean': false; the run is of uncommitted code, make it again from a clean commit"
        if not unknown and commit not in known:
            known[commit] = has_commit(root, commit)
        if not known.get(commit, True):
            yield f"{where}: field 'commit': {commit} is unknown to this repository"
        if run.manifest["rate"] is not None and rates.path(declared, root).exists():
            chosen = rates.rate_of(declared.find(name), declared, root)
            if run.manifest["rate"] != chosen:
                yield f"{where}: field 'rate': {run.manifest['rate']:g}, the search chose {chosen:g}"
    if rates.path(declared, root).exists():
        if json.loads(rates.path(declared, root).read_text()) != rates.choose(declared, root):
            yield f"results/{profile}/rates.json: isn't what the search's logs say; python -m ouroboros runs writes it"


# -------------------------------------------------------------------------------------------------------- commands

def readme_block(results: Results) -> str:
    """What stands between the verdict marks of README.md."""
    return f"{BEGIN}\n{claims.headline(results, findings.first_screen(results))}\n{END}"


def _readme_with(block: str, text: str) -> str:
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block, text, flags=re.DOTALL)


def reproduce(profile: str, root: Path) -> None:
    """Derive everything and print the verdicts; a committed output is rewritten only where verify would fault it."""
    results = metrics.load(profile, root)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        derive(profile, root, out)
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
    if profile not in inventory.UNCOMMITTED:
        write_atomic(root / LOGS, inventory.markdown(root))
    readme = root / "README.md"
    if profile == README_PROFILE and readme.exists():
        text = readme.read_text(encoding="utf-8")
        if (new := _readme_with(readme_block(results), text)) != text:
            write_atomic(readme, new)
    print(claims.summary(results))
    print(f"\n{len(changed)} outputs written; all of them: results/{profile}/ and figures/{profile}/")


def tour(profile: str, root: Path) -> None:
    """Execute the notebook that converts, trains, generates and saves."""
    target = root / "results" / profile / "notebooks" / TOUR
    execute(root / "notebooks" / TOUR, target, {"profile": profile}, root, root)


def verify(profile: str, root: Path) -> list[str]:
    """Derive everything elsewhere and compare; returns each place where what is committed differs."""
    faults = list(_provenance_faults(profile, root))
    with tempfile.TemporaryDirectory() as temporary:
        derive(profile, root, Path(temporary))
        faults += [f"{path}: {found}" for path, found in _differences(profile, root, Path(temporary))]
    if profile not in inventory.UNCOMMITTED:
        dated = (root / LOGS).read_text(encoding="utf-8") if (root / LOGS).exists() else ""
        if found := _same_text(dated, inventory.markdown(root)):
            faults.append(f"{LOGS}: {found}")
    readme = root / "README.md"
    if profile == README_PROFILE and readme.exists():
        text = readme.read_text(encoding="utf-8")
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            faults.append(f"README.md: the marks {BEGIN} and {END} must stand there, once each")
        elif found := _same_text(text, _readme_with(readme_block(metrics.load(profile, root)), text)):
            faults.append(f"README.md: {found}")
    return faults

"""The site: README, docs/, claims and executed notebooks as pages, the files that they link to beside them. `make site`

The repository's root is the source folder, so links between pages are those that work on GitHub. What only the site
needs (navigation, links from a claim to what shows it, folded code, texts of pictures) is added while pages are read.
"""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # `flowchart`, which lies beside this file

import flowchart  # noqa: E402

project = "Ouroboros, reproduced"
html_title = project
root_doc = "README"
extensions = ["myst_nb"]
smartquotes = False  # prompts and code in words keep their characters
include_patterns = ["README.md", "docs/*.md", "results/README.md", "results/scales.md", "results/*/claims.md",
                    "results/*/continuations.md", "results/*/last_word.md", "results/*/notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "ouroboros", "tests", "results/smoke", "results/*/runs", "results/*/checkpoints"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make reproduce` has executed them
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Code"
nb_code_prompt_hide = "Code"

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_use_index = False
html_show_search_summary = False  # it would fetch pages, which a browser refuses for files
html_copy_source = html_show_sourcelink = html_show_copyright = False

FILES = ("results/*/runs/*.jsonl", "results/*/tables/*.csv", "figures/*/*.*")


# ------------------------------------------------------------------------------------------- while a page is read

def read(app, page: str, content: list[str]) -> None:
    """What the site adds to a page's source."""
    if page == root_doc:
        content[0] += navigation()
    elif page.endswith("/claims") and page.startswith("results/"):
        content[0] = with_evidence(content[0], page.split("/")[1])
    elif "/notebooks/" in page:
        content[0] = as_page(content[0], page.split("/")[1])


def navigation() -> str:
    """Hidden lists of all pages: the documents in README's order, then each profile's claims, notebooks and texts."""
    readme = (ROOT / f"{root_doc}.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((docs/[\w-]+|results/README|results/scales)\.md", readme)
    others = (f"docs/{path.stem}" for path in sorted((ROOT / "docs").glob("*.md")))
    groups = {"Documents": list(dict.fromkeys([*linked, *others]))}
    for claims in sorted(ROOT.glob("results/*/claims.md")):
        if (profile := claims.parent.name) != "smoke":
            texts = (claims.parent / name for name in ("continuations.md", "last_word.md"))
            files = [claims, *sorted(claims.parent.glob("notebooks/*.ipynb")), *filter(Path.exists, texts)]
            pages = [path.relative_to(ROOT).with_suffix("").as_posix() for path in files]
            groups[profile] = [f"{titled(page)} <{page}>" if "/notebooks/" in page else page for page in pages]
    return "".join(f"\n\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n" + "\n".join(pages) + "\n```"
                   for name, pages in groups.items())


def titled(page: str) -> str:
    """A notebook's number and title."""
    [first, *_] = json.loads((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    return Path(page).name[:2] + " " + "".join(first["source"]).partition("\n")[0].removeprefix("# ")


def evidence() -> dict[str, list[list[str]]]:
    """Notebooks, tables and figures that show a claim, by the claim's id: the rows of docs/files.md."""
    found: dict[str, list[list[str]]] = {}
    for line in (ROOT / "docs/files.md").read_text(encoding="utf-8").splitlines():
        if len(cells := line.split("|")) == 7:
            _, _, ids, *shown, _ = cells
            for name in re.findall(r"`(\w+)`", ids):
                kinds = found.setdefault(name, [[], [], []])
                for names, cell in zip(kinds, shown):
                    names += [each for each in re.findall(r"`(\w+)`", cell) if each not in names]
    return found


def with_evidence(text: str, profile: str) -> str:
    """A profile's claims, each section with links to what shows it; the claims without a section in one list."""
    shown = {claim: evidence_links(profile, *names) for claim, names in evidence().items()}
    first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    ids = [section.partition("\n")[0] for section in sections]
    sections = [f"{section.rstrip()}\n\n" + (f"Where to look: {shown[name]}.\n\n" if shown.get(name) else "")
                for name, section in zip(ids, sections)]
    values = "".join(f"- `{name}`: {shown[name]}.\n  <details><summary>{len(runs)} runs</summary>\n\n  "
                     + ", ".join(f"[{run}](runs/{run}.jsonl)" for run in runs) + "\n\n  </details>\n"
                     for name, runs in measured_by(profile).items() if runs and shown.get(name) and name not in ids)
    fold = f"<details><summary>where each is measured</summary>\n\n{values}\n</details>\n" if values else ""
    return "## ".join([first, *sections]) + fold


def evidence_links(profile: str, notebooks: list[str], tables: list[str], figures: list[str]) -> str:
    """Links from a profile's claims to those of the files that it has."""
    kinds = [("notebook", "notebooks/{}.ipynb", notebooks), ("table", "tables/{}.csv", tables),
             ("figure", f"../../figures/{profile}/{{}}.png", figures)]
    found = []
    for kind, place, names in kinds:
        links = [f"[{name}]({place.format(name)})" for name in names
                 if (ROOT / "results" / profile / place.format(name)).exists()]
        if links:
            found.append(f"{kind}{'s' * (len(links) > 1)} {', '.join(links)}")
    return "; ".join(found)


def measured_by(profile: str) -> dict[str, list[str]]:
    """The runs behind each claim, by the claim's id, under any protocol."""
    runs: dict[str, list[str]] = {}
    with open(ROOT / f"results/{profile}/tables/claims.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            runs[row["id"]] = list(dict.fromkeys([*runs.get(row["id"], []), *row["runs"].split()]))
    return runs


def as_page(text: str, profile: str) -> str:
    """A notebook whose code is folded, whose pictures have texts, and that says its profile."""
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if "parameters" not in cell["metadata"].get("tags", [])]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["metadata"].setdefault("tags", []).append("hide-input")
            if pictures := [output for output in cell["outputs"] if "image/png" in output.get("data", {})]:
                alt = pictures[0]["metadata"]["image/png"]["alt"]  # as `IPython.display.Image` keeps it
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
    title, _, rest = "".join(cells[0]["source"]).partition("\n")
    cells[0]["source"] = f"{title} ({profile})\n\n[The claims at this profile](../claims.md)\n{rest}"
    return json.dumps(notebook | {"cells": cells})


def resolve(app, tree: nodes.document) -> None:
    """Draw flowcharts; a link to a file that is no page keeps its path, and the file comes along."""
    for block in list(tree.findall(nodes.literal_block)):
        if block.get("language") == "mermaid":
            drawing = flowchart.svg(flowchart.parse(block.astext()))
            block.replace_self(nodes.raw("", drawing, format="html"))
        elif app.env.docname.endswith("/continuations"):
            block["classes"].append("prose")
    for link in list(tree.findall(addnodes.download_reference)):
        name, _ = app.env.relfn2path(link["reftarget"])
        reference = nodes.reference("", "", *link.children, refuri=link["reftarget"], internal=True)
        link.replace_self(reference)
        copy(app, Path(name))


# ------------------------------------------------------------------------------------------------ beside the pages

def copy(app, name: Path) -> None:
    """Copy a file of the repository to the same place in the site."""
    target = Path(app.outdir) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name, target)


def finish(app, failure: Exception | None) -> None:
    """Add the raw logs, tables and figures, and the page that a folder opens with."""
    if failure:
        return
    for path in (path.relative_to(ROOT) for pattern in FILES for path in ROOT.glob(pattern)):
        if path.parts[1] != "smoke":
            copy(app, path)
    shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("doctree-read", resolve, priority=100)  # before Sphinx collects downloads
    app.connect("build-finished", finish)

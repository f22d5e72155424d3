"""The README holds what it says: its numbers, drawing, commands and snippets against the code."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import torch
import yaml
from models import small_base

from ouroboros import OuroborosForCausalLM
from ouroboros.cli import main
from ouroboros.log import read_run
from ouroboros.model.configuration import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_plain_python_reads_a_headline_number():
    """Six lines, with no package but the standard library, print a number of the claims' page."""
    code = textwrap.dedent(*re.findall(r"```python\n( *import json\n.*?)```", README, re.DOTALL))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch(r"-?\d\.\d{2}\n", done.stdout), done.stderr
    section = (ROOT / "results/smollm2/claims.md").read_text().partition("## heldout\n")[2]
    assert f"depth 8: -{done.stdout.strip()} [" in section.partition("- **`corrected`")[2]
    assert f"| Yes, by {done.stdout.strip()} [" in README
    assert len(code.splitlines()) == 6


def test_the_drawing_is_the_models_order():
    """The loop's nodes are its modules, in the order in which a forward pass of depth 2 calls them."""
    drawn = README.partition("```mermaid")[2].partition("```")[0]
    edges = re.findall(r"(\w+)(?:\[[^]]*\]|\(\([^)]*\)\))? *--(?: \"[^\"]*\" --)?>", drawn)
    loop = [name for name in dict.fromkeys(edges) if name in ("prelude", "modulation", "layer", "step_norm", "gate")]
    model = OuroborosForCausalLM.from_base(small_base(), 1, 3, 1, rank=4, depth=2)
    called, parts = [], {"modulation": model.recurrence.modulation, "layer": model.recurrent_layer,
                         "step_norm": model.recurrence.step_norm, "gate": model.recurrence.gate,
                         "prelude": model.base.model.layers[0], "coda": model.base.model.layers[-1]}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.arange(4)[None])
    assert called == [loop[0], *loop[1:] * 2, "coda"]
    assert drawn.count("frozen") == 3 and {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("recurrence.")}


def test_every_page_and_file_that_a_page_links_to_is_there():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_way_from_the_paper_to_files_is_whole():
    """docs/files.md, which the site links claims by: every claim has a row, every name is a file's."""
    rows = [line.split("|")[2:6] for line in (ROOT / "docs/files.md").read_text().splitlines() if line.count("|") == 6]
    ids, *kinds = (set(re.findall(r"`([\w*]+)`", " ".join(cells))) for cells in zip(*rows))
    assert ids == {claim["id"] for claim in yaml.safe_load((ROOT / "ouroboros/analysis/claims.yaml").read_text())}
    for names, place in zip(kinds, ("results/*/notebooks/{}.ipynb", "results/*/tables/{}.csv", "figures/*/{}.png")):
        assert names
        for name in names:
            assert list(ROOT.glob(place.format(name))), place.format(name)


def test_every_command_of_the_pages_is_one(capsys):
    """`make` targets and the command line's commands, by name."""
    text = "\n".join(page.read_text() for page in PAGES)
    called = re.findall(r"-m ouroboros (\w+)(?: (\w+))?", " ".join(text.split()))  # wherever the line breaks
    claims = {claim["id"] for claim in yaml.safe_load((ROOT / "ouroboros/analysis/claims.yaml").read_text())}
    assert {claim for command, claim in called if command == "claims" and claim} == {"helps"} <= claims
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |`)make ([\w-]+)", text, re.M)) <= targets
    for command, _ in called:
        try:
            main([command, "--help"])
        except SystemExit as end:
            assert end.code == 0
        assert "usage" in capsys.readouterr().out, command


def test_the_snippet_generates_with_committed_weights(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(from transformers.*?)```", README, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("The function returns ")


def test_where_the_second_scale_disagrees_the_readme_says_so():
    lines = (ROOT / "results/scales.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    [[_, question, _, _, _, cause, *_]] = [row for row in rows if row[4] == "no"]
    assert question == "Do passes after the first help?" and cause == "the budget (4 x the tokens)"
    assert "[says the same](results/scales.md), but of eight passes against one only with four times the tokens." in \
        README.replace("\n", " ")


def test_newer_text_says_the_same_as_the_readme_says():
    notebook = (ROOT / "results/smollm2/notebooks/08_generalisation.ipynb").read_text()
    [(same, judged)] = re.findall(r"`corrected`: (\d+) of (\d+) verdicts on held-out text are the same on", notebook)
    assert same == judged and "the verdicts are the same" in README


def test_what_other_text_gives_back_is_in_the_notebooks_tables_and_its_passages_are_the_logs():
    shares = pd.read_csv(ROOT / "results/smollm2/tables/splits.csv").set_index(["protocol", "arm", "depth", "text"])
    loop, lora = (-shares.loc[("corrected", arm, 8, "foreign"), "% of gap"] for arm in ("controller", "lora"))
    assert f"on text of packages that no run saw, {loop:.0f} and {lora:.0f} %" in README

    def reference(*runs: str) -> float:
        logs = [read_run(ROOT / f"results/smollm2/runs/{run}.jsonl") for run in runs]
        return sum(log.last("reference", "loss_t+1") for log in logs) / len(logs)

    full, cut = reference("full-any-s0"), reference("cut-any-s0")
    loop = reference(*(f"controller-d8-r32-corrected-s{seed}" for seed in range(3)))
    notebook = (ROOT / "results/smollm2/notebooks/08_generalisation.ipynb").read_text()
    assert (f"next-token loss {full:.2f} of the full model, {cut:.2f} of the cut one; {loop:.2f} of the Controller's "
            f"loop under `corrected` (wins back {100 * (cut - loop) / (cut - full):.0f} %, n = 3)") in notebook


def test_every_page_that_a_page_links_to_is_one_of_the_sites_with_a_title():
    """Sphinx refuses others; this needs no Sphinx."""
    patterns = re.search(r"^include_patterns = (\[.*?\])$", (ROOT / "docs/site/conf.py").read_text(), re.M | re.S)[1]
    pages = {path.resolve() for pattern in ast.literal_eval(patterns) for path in ROOT.glob(pattern)}
    for page in PAGES:
        for name in re.findall(r"\]\(([^)#:]+\.(?:md|ipynb))(?:#[^)]*)?\)", page.read_text()):
            linked = (page.parent / name).resolve()
            assert linked in pages, f"{page}: {name}"
            assert linked.suffix == ".ipynb" or linked.read_text().startswith("# "), name


def test_the_readme_counts_the_families():
    assert f"{len(FAMILIES)} families" in " ".join(README.split())  # wherever the line breaks

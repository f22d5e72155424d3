"""An arm of one's own beside the paper's: docs/own-arm.md, done as it is written there."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import profile_data
from synthetic import write_run

from ouroboros.analysis import own_arm
from ouroboros.cli import main
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.own_arm import beside
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.log import read_run
from ouroboros.training import measure, sweep

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own-arm.md").read_text()
CLASS, ENTRY = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.S).group(1) for kind in ("python", "yaml"))


@pytest.fixture(autouse=True)
def registered():
    """An own arm is known to the process until the test ends."""
    yield
    for name in ("per_token", "plain", "vectors"):
        ARMS.pop(name, None)


def with_page(folder: Path, text) -> Path:
    """A folder `arms` with the page's two files beside a profile, `test.yaml`, in a checkout."""
    data = profile_data(text, plan=[{"purpose": "rate", "arms": ["controller", "static", "lora"], "depths": [2],
                                     "seeds": [9], "rates": [1e-3]},
                                    {"arms": ["full", "cut", "controller", "static", "lora"], "depths": [2],
                                     "seeds": [0, 1]}], siblings={})
    (folder / "test.yaml").write_text(yaml.safe_dump(data))
    arms = folder / "arms"
    arms.mkdir()
    (arms / "per_token.py").write_text(CLASS)
    (arms / "per_token.yaml").write_text(ENTRY)
    return arms


def test_a_later_search_of_another_budget_is_not_made_again(root, text):
    """It chooses no rates, so a comparison has no use for it."""
    data = profile_data(text, plan=[{"purpose": "rate", "arms": ["controller", "static", "lora"], "depths": [2],
                                     "seeds": [9], "rates": [1e-3]},
                                    {"purpose": "rate", "arms": ["static"], "depths": [2], "seeds": [9], "updates": 2,
                                     "rates": [1e-2]},
                                    {"arms": ["full", "cut", "static_wide"], "depths": [2], "seeds": [0, 1]}],
                        siblings={"static_wide": "static"})
    made, _ = beside(parse_profile(data, "test.yaml"), "static_wide", root)
    assert {(spec.updates, spec.rate) for spec in made.search_runs()} == {(None, 1e-3)}


@pytest.fixture
def arms(root, text, monkeypatch):
    monkeypatch.chdir(root)
    return with_page(root, text)


@pytest.fixture(scope="module")
def followed(text, root_of, tmp_path_factory):
    """A checkout in which the page was followed, a baseline's log before that, and what was printed: no test changes
    it."""
    folder = shutil.copytree(root_of(parse_profile(profile_data(text), "t")), tmp_path_factory.mktemp("followed"),
                             dirs_exist_ok=True)
    with_page(folder, text)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        assert main(["runs", "--profile", "test.yaml", "--jobs", "1"], folder) == 0
        before = (folder / "results/test/runs/controller-d2-r4-corrected-s0.jsonl").read_bytes()
        assert compare(folder) == 0
    return folder, before, said.getvalue()


class Job:
    """A sweep's job done in this process: test_sweep.py has those in processes of their own."""

    def __init__(self, worker):
        self.ended = worker()

    def done(self) -> bool:
        return True

    def result(self) -> str | None:
        return self.ended


@pytest.fixture(autouse=True, scope="module")
def here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_submit", lambda executor, worker, count, gpus: [Job(worker)])
        yield


def compare(root, arm="arms/per_token.yaml") -> int:
    return main(["compare", arm, "--profile", "test.yaml", "--jobs", "1"], root)


def test_the_page_is_followed(followed, monkeypatch):
    """The class and entry of the page: searched, trained, set beside the three; runs that are there are kept."""
    root, before, said = followed
    monkeypatch.chdir(root)
    page = (root / "results/test-per_token/comparison.md").read_text()
    assert page in said
    own = root / "results/test-per_token/runs"
    assert (own / "controller-d2-r4-corrected-s0.jsonl").read_bytes() == before
    manifest = read_run(own / "per_token-d2-r4-corrected-s1.jsonl").manifest
    assert manifest["trainable_parts"]["modulation"] == 16 * 8 + 8 + 8 * 8 + 8 * 7 * 4
    assert manifest["rate"] in {entry["rate"] for entry in (read_run(path).manifest for path in
                                                            own.glob("per_token*lr*.jsonl"))}
    assert manifest["flops"]["training"] > manifest["flops"]["forward"] > 0
    rows = [line for line in page.splitlines() if line.startswith("| Controller of each token")]
    assert len(rows) == 2 and f"{manifest['trainable']:,}" in rows[0] and "n = 2" in rows[0]
    for baseline in ("Controller", "static table", "LoRA on the cut model"):
        assert re.search(rf"^\| {baseline} +\| -?\d", page, re.M), baseline
    assert main(["status", "--profile", "results/test-per_token/profile.yaml"], root) == 0


@pytest.mark.parametrize("old, new, said", [
    ("self.heads(u)", "self.heads(u.flip(1))", "depends on later ones"),
    ("(7, self.rank)", "(self.rank, 7)", "(B or 1, T or 1, 7, rank)"),
    ("class PerToken", "class Other", "can't be loaded"),
    ("u = F.silu", "u = 0 * F.silu", "reads: true"),
    ("import torch\n", "import torch, no_such_package\n", "no_such_package"),
    ("        u = F.silu", "        h.add_(1.0)\n        u = F.silu", "changes the hidden states"),
    ("        u = F.silu", "        h = h.flip(1) if t else h\n        u = F.silu", "depends on later ones"),
    ("t, mask, past)", "t, mask)", "forward(h, t, mask, past)"),
    ("        u = F.silu", "        assert False\n        u = F.silu", "AssertionError"),
    ("nn.init.zeros_(self.heads.weight)", "self.requires_grad_(False)", "nothing of it would be trained"),
    ("import torch\n", "import torch\nraise SystemExit(0)\n", "can't be loaded (SystemExit"),
    ("        u = F.silu", "        pairs = h[:, 1:].unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1)\n"
     "        h = torch.cat([h[:, :1], pairs], 1)\n        u = F.silu", "depends on later ones"),
    ("        u = F.silu", "        h = h.flip(1) if t == 2 else h\n        u = F.silu", "depends on later ones"),
    ("        u = F.silu", "        h = h - h.mean(0)\n        u = F.silu", "depends on the others of its batch"),
    ("        u = F.silu", "        h.clamp_(-1e3, 1e3)\n        u = F.silu", "changes the hidden states"),
    ("(7, self.rank))", "(7, self.rank))[0, 0]", "(B or 1, T or 1, 7, rank)"),
    ("(7, self.rank))", "(7, self.rank)).detach()", "nothing of it would be trained"),
    ("self.rank = config.rank", "self.rank, self.idle = config.rank, nn.Linear(1, 1)", "'idle.weight' has no"),
    ("(7, self.rank))", "(7, self.rank)) * self.scales[0]", "isn't among its parameters"),
    ("config.hidden_size, config.state_width)", "config.hidden_size, config.state_width).bfloat16()",
     "'state.weight' is torch.bfloat16; train in float32"),
    ("def __init__(self, config)", "def __init__(self)", "in __init__(config)"),
    ("self.heads(u)", "self.heads(F.dropout(u))", "differs from call to call"),
    ("(7, self.rank))", "(7, self.rank)) / 0", "isn't finite"),
])
def test_a_class_that_would_mislead_is_refused(arms, root, capfd, old, new, said):
    assert old in CLASS
    (arms / "per_token.py").write_text(CLASS.replace(old, new).replace("        self.state =", """\
        self.scales = [torch.ones(1, requires_grad=True)]  # no parameters: a list hides them
        self.state ="""))
    assert compare(root) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: arm 'per_token'") and said in error, error
    assert not (root / "results/test-per_token").exists()  # nothing is half-written


@pytest.mark.parametrize("scale, name", [("tiny", "deep"), ("smollm2", "gpu"), ("tiny", "other")])
def test_an_arm_whose_runs_would_lie_among_a_profiles_is_refused(arms, root, capfd, scale, name):
    (arms / f"{name}.yaml").write_text(ENTRY)
    try:
        assert main(["compare", f"arms/{name}.yaml", "--profile", scale, "--dry-run"], root) == 2
    finally:
        ARMS.pop(name, None)
    assert f"the package's profile '{scale}-{name}'; choose another" in capfd.readouterr().err
    assert not (root / f"results/{scale}-{name}").exists()


def test_a_file_with_a_dataclass_is_loaded(arms, root, capfd):
    """Which looks its own file up among the modules."""
    (arms / "per_token.py").write_text(CLASS.replace("import torch\n", """import torch
from dataclasses import dataclass

@dataclass
class Widths:
    state: "int" = 4
""", 1))
    (arms / "per_token.yaml").write_text(ENTRY + "elementwise: [nothing.weight]\n")
    assert compare(root) == 2
    assert "'nothing.weight': no tensor of the class" in capfd.readouterr().err  # said after loading


@pytest.mark.parametrize("change, said", [
    ({"like": "lora"}, "like: 'lora': no arm with a modulation"),
    ({"modulation": "other.py:PerToken"}, "no file"),
    ({"modulation": "per_token"}, "must be the class's file and name"),
    ({"colour": "red"}, "no such field; there are label, like"),
    ({"elementwise": "state"}, "elementwise"),
    ({"label": "Controller"}, "the arm `controller` has it"),
    ({"label": "a | b"}, "label"),
])
def test_an_entry_that_says_something_wrong_is_refused(arms, root, capfd, change, said):
    (arms / "per_token.yaml").write_text(yaml.safe_dump(yaml.safe_load(ENTRY) | change))
    assert compare(root) == 2
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert said in error
    assert not (root / "results/test-per_token").exists()


@pytest.mark.parametrize("arm, said", [
    ("static", "other than"), ("nothing", "name a YAML file"), ("per_token", ", as arms/per_token.yaml"),
    ("static_wid", ", as static_wide"), ("full", "trained"), ("missing.yaml", "can't be read")])
def test_an_arm_that_cant_be_compared_is_refused(arms, root, capfd, arm, said):
    assert compare(root, arm) == 2
    assert said in capfd.readouterr().err


def test_an_own_arm_takes_no_name_of_the_package(arms, root, capfd):
    (arms / "static.yaml").write_text(ENTRY)
    assert compare(root, "arms/static.yaml") == 2
    assert "an arm of the package has that name" in capfd.readouterr().err


VECTORS = """import torch
from torch import nn


class Vectors(nn.Module):
    pools = False

    def __init__(self, config):
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(config.max_steps, 7, config.rank))

    def forward(self, h, t, mask, past):
        return self.steps[t][None, None]
"""


def test_a_table_is_one_by_what_the_entry_says_not_by_its_name(root, text, monkeypatch):
    """The static table again, its tensor by another name: the same searches, rates and losses. The second comparison
    makes no baseline anew."""
    monkeypatch.chdir(root)
    data = profile_data(text, plan=[{"purpose": "rate", "arms": ["controller", "static", "lora"], "depths": [2],
                                     "seeds": [9], "rates": [1e-3], "factors": [30]},
                                    {"arms": ["full", "cut", "controller", "static", "lora"], "depths": [2],
                                     "seeds": [0]}], siblings={})
    (root / "test.yaml").write_text(yaml.safe_dump(data))
    (root / "arms").mkdir()
    (root / "arms/vectors.py").write_text(VECTORS)
    entry = {"label": "vectors", "like": "static", "modulation": "vectors.py:Vectors", "reads": False}
    for name, elementwise in (("plain", []), ("vectors", ["steps"])):
        (root / f"arms/{name}.yaml").write_text(yaml.safe_dump(entry | {"elementwise": elementwise}))
        assert main(["compare", f"arms/{name}.yaml", "--profile", "test.yaml", "--jobs", "1"], root) == 0
    first, second = (root / f"results/test-{name}/runs" for name in ("plain", "vectors"))
    for run in ("static-d2-r4-corrected-s0", "lora-corrected-s0"):
        assert (first / f"{run}.jsonl").read_bytes() == (second / f"{run}.jsonl").read_bytes()

    def final(arm, folder=second) -> tuple:
        found = read_run(folder / f"{arm}-d2-r4-corrected-s9-x30.jsonl")
        return found.last("dev", "loss_t+1"), found.manifest["elementwise_rate"] / found.manifest["rate"]

    assert final("vectors") == final("static") and final("vectors")[1] == pytest.approx(30)
    assert final("plain", first)[0] != final("static")[0]
    page = (root / "results/test-vectors/comparison.md").read_text()
    assert "seeds 0;" in page and "Holm" in page
    assert re.search(r"\| vectors +\| +0.001 \| +0.03 \| 6 updates, depth 2 +\| yes", page), page


def test_a_sibling_takes_rates_and_the_page_says_whose(tmp_path, text):
    data = profile_data(text, plan=[{"purpose": "rate", "arms": ["controller", "static", "lora"], "depths": [2],
                                     "seeds": [9], "rates": [1e-3]},
                                    {"arms": ["full", "cut", "static_wide"], "depths": [2], "seeds": [0]}],
                        siblings={"static_wide": "static"})
    made, _ = beside(parse_profile(data, "test.yaml"), "static_wide", tmp_path)
    for spec in made.runs():
        write_run(tmp_path, made, spec, 5.0, elementwise_rate=1e-3)
    assert re.search(r"\| wide static table +\| .* \| static table: 6 updates, depth 2 ",
                     own_arm.page(made, "static_wide", tmp_path))


@pytest.mark.parametrize("scale", ["smoke", "tiny"])
def test_the_pages_numbers_of_runs_are_those_of_the_plan(scale, arms, root):
    made, name = beside(load_profile(scale), str(arms / "per_token.yaml"), root)
    runs = [spec.arm == name for spec in made.runs()]
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{scale}`"))
    assert [int(cell.split(",")[0]) for cell in row.split(" | ")[2:4]] == [sum(runs), len(runs) - sum(runs)]


def test_smollm2s_baselines_are_committed_as_the_page_says(arms, root):
    made, name = beside(load_profile("smollm2"), str(arms / "per_token.yaml"), root)
    row = next(line for line in PAGE.splitlines() if line.startswith("| `smollm2`")).split(" | ")
    runs = {spec.id: spec.arm for spec in made.runs()}
    assert row[2:4] == [str([*runs.values()].count(name)), "all are committed"]
    logs = Path(__file__).resolve().parents[1] / "results/smollm2/runs"
    assert not [run for run, arm in runs.items() if arm != name and not (logs / f"{run}.jsonl").exists()]


def test_a_dry_run_makes_nothing(arms, root, capsys):
    assert main(["compare", "arms/per_token.yaml", "--profile", "test.yaml", "--dry-run"], root) == 0
    assert "runs are missing, made in this order" in capsys.readouterr().out
    assert not list(root.glob("results/test-per_token"))


def test_a_process_that_measures_speed_knows_own_arms(arms, root):
    """A dry run measures in processes that have read no profile."""
    made, name = beside(load_profile("test.yaml"), "arms/per_token.yaml", root)
    del ARMS[name]
    made.__dict__.pop("depths", None)  # a cached property, as of a profile that another process was sent
    assert min(measure.speed(made)) > 0 and name in ARMS


def test_a_changed_class_needs_another_name(followed, tmp_path, monkeypatch, capfd):
    """Logs of one version of the file never stand for another."""
    root = shutil.copytree(followed[0], tmp_path / "changed")
    monkeypatch.chdir(root)
    logs = {path: path.read_bytes() for path in (root / "results/test-per_token/runs").iterdir()}
    before = (root / "results/test-per_token/profile.yaml").read_bytes()
    Path("arms/per_token.py").write_text(CLASS + "\n# changed\n")
    assert compare(root) == 2
    assert "'per_token.sha256' is" in (said := capfd.readouterr().err) and "give a changed arm another name" in said
    assert logs == {path: path.read_bytes() for path in (root / "results/test-per_token/runs").iterdir()}
    assert (root / "results/test-per_token/profile.yaml").read_bytes() == before  # so restoring the class restores all
    assert json.loads((root / "results/test-per_token/runs/per_token-d2-r4-corrected-s0.jsonl").read_text()
                      .splitlines()[0])["config"]["own_arms"]

"""The command line answers bad input with one line and exit code 2, and loads no more than it needs."""

import subprocess
import sys

import pytest

from ouroboros.cli import main

COMMANDS = {
    "corpus": [], "base": [], "runs": ["--dry-run"], "run": ["cut-any-s0"], "rerun": ["cut-any-s0"], "reproduce": [],
    "verify": [],
}


def refused(arguments, capsys, root) -> str:
    """The one line that `main` says when it refuses."""
    assert main(arguments, root) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_profile(command, capsys, tmp_path):
    err = refused([command, *COMMANDS[command], "--profile", "huge"], capsys, tmp_path)
    assert "huge" in err and "tiny" in err  # what is wrong, and what there is


@pytest.mark.parametrize("command", ["run", "rerun"])
@pytest.mark.parametrize("run", ["", "nonsense", "magic-d4-r8-corrected-s0", "controller-d0-r8-corrected-s0",
                                 "controller-d4-r8-improved-s0", "../base"])
def test_an_unknown_run(command, run, capsys, tmp_path):
    assert f"'{run}'" in refused([command, run], capsys, tmp_path)


@pytest.mark.parametrize("arguments, named", [
    ([], "COMMAND"),
    (["frobnicate"], "frobnicate"),
    (["rerun"], "RUN"),
    (["runs", "--jobs", "0"], "'0'"),
    (["runs", "--jobs", "two"], "'two'"),
    (["runs", "--purpose", "fun"], "fun"),
    (["verify", "--depth", "4"], "--depth"),
])
def test_bad_arguments(arguments, named, capsys, tmp_path):
    assert named in refused(arguments, capsys, tmp_path)


@pytest.mark.parametrize("command", ["verify", "reproduce"])
def test_where_no_profile_has_logs_there_is_nothing_to_derive(command, capsys, tmp_path):
    (tmp_path / "results/smoke/runs").mkdir(parents=True)  # whose logs aren't committed
    (tmp_path / "results/smoke/runs/cut-any-s0.jsonl").touch()
    assert "no profile has logs there; make runs" in refused([command], capsys, tmp_path)
    assert "tiny/runs: no finished run there" in refused([command, "--profile", "tiny"], capsys, tmp_path)


def test_help_says_which_profile_a_command_takes(capsys):
    for command, default in (("verify", "every one that has committed logs"), ("runs", "tiny")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"(default: {default})" in " ".join(capsys.readouterr().out.split())


def test_a_process_ends_with_the_same_line_and_code():
    done = subprocess.run([sys.executable, "-m", "ouroboros", "verify", "--profile", "huge"], capture_output=True,
                          text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_only_training_loads_torch_and_statistics_need_no_pandas():
    """In one process, as starting one takes long: after each import nothing of what it must not load is there."""
    steps = {"import ouroboros.cli, ouroboros.analysis.statistics": {"torch", "transformers", "pandas"},
             "import ouroboros.experiment as e; e.load_profile('tiny').runs()": {"torch", "transformers"},
             "import ouroboros.experiment.cost, ouroboros.training.status, ouroboros.log, ouroboros.analysis.claims, "
             "ouroboros.analysis.figures, ouroboros.reproduce": {"torch", "transformers"}}
    code = "import sys" + "".join(f"\n{step}\nassert not {banned} & set(sys.modules), {step!r}"
                                  for step, banned in steps.items())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_classes_load_when_asked_for():
    import ouroboros

    assert {"OuroborosConfig", "OuroborosForCausalLM"} <= set(dir(ouroboros))
    with pytest.raises(AttributeError, match="Anaconda"):
        ouroboros.Anaconda  # noqa: B018


def test_the_auto_classes_know_the_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    import ouroboros

    assert AutoConfig.for_model(ouroboros.OuroborosConfig.model_type).__class__ is ouroboros.OuroborosConfig
    assert AutoModelForCausalLM._model_mapping[ouroboros.OuroborosConfig] is ouroboros.OuroborosForCausalLM

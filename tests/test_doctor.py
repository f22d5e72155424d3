"""What `doctor` says of a machine: each difference with what it may change."""

from pathlib import Path

import pytest

from ouroboros import doctor
from ouroboros.cli import main

ROOT = Path(__file__).resolve().parents[1]


def test_a_machine_like_the_logs_differs_in_nothing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "processor", lambda: "AMD EPYC")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert main(["doctor"], ROOT) == 0
    assert "nothing differs" in capsys.readouterr().out


@pytest.mark.parametrize("lock, said", [
    ("torch==1.0\n", "torch 2.13.0, the lock has 1.0: may change the numbers of new runs"),
    ("numpy==1.0\n", "may change the numbers of new runs and derived tables, figures and notebooks"),
    ("sympy==1.0\n", "the text, which is then refused"),
    ("pluggy==0.1\n", "changes no number that we know of"),
    ("no-such-package==1.0\n", "no-such-package not installed, the lock has 1.0"),
    ("", "requirements.lock: not there"),
])
def test_a_version_that_isnt_the_locks(tmp_path, capsys, lock, said):
    if lock:
        (tmp_path / "requirements.lock").write_text(lock)
    assert main(["doctor"], tmp_path) == 0
    assert said in capsys.readouterr().out


def test_another_processor_and_a_setting_that_would_change_numbers(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "processor", lambda: "Abacus")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    main(["doctor"], ROOT)
    said = capsys.readouterr().out
    assert "processor Abacus, the committed logs were made on AMD EPYC and" in said
    assert "NVIDIA_TF32_OVERRIDE" in said

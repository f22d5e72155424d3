"""What the bench measures with: turns, spectra, errors, and the memory of a conversion."""

import copy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import last_word
import pytest
import torch
from bench import excess_error, gigabyte, scaled_residual, take_turns
from conftest import profile_data
from models import convert, ids, shake
from synthetic import write_run

from ouroboros.cli import main
from ouroboros.errors import InputError
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.model.surgery import FULL_SVD, truncated_svd


def test_calls_take_turns_and_the_first_turn_is_not_counted():
    calls = []

    def slow():
        calls.append("b")
        time.sleep(0.01)

    seconds = take_turns({"a": lambda: calls.append("a"), "b": slow}, repeats=9)
    turns = ["".join(calls[i:i + 2]) for i in range(0, 20, 2)]
    assert set(turns) == {"ab", "ba"}
    assert len(seconds["a"]) == len(seconds["b"]) == 9 and min(seconds["b"]) >= 0.01


def test_a_scaled_residual_has_the_spectrum_of_the_one_it_comes_from():
    small = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    values, scaled = torch.linalg.svdvals(small), torch.linalg.svdvals(scaled_residual(small, (60, 45)))
    assert len(scaled) == 45
    torch.testing.assert_close(scaled[[0, -1]], values[[0, -1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled[::4], values, rtol=1e-4, atol=1e-4)  # 44 / 11 new values to an old one


@pytest.mark.parametrize("rank", [4, 32, 64])
@pytest.mark.parametrize("shape", [(1300, 1030), (1030, 1300)])
def test_the_randomized_svd_is_within_a_percent_of_the_best_and_deterministic(shape, rank):
    assert min(shape) > FULL_SVD
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(2))  # no decay: the hardest spectrum
    assert 0 <= excess_error(residual, rank) < 1
    state = torch.get_rng_state()
    (a, b), (again, same) = truncated_svd(residual, rank), truncated_svd(residual, rank)
    assert torch.equal(a, again) and torch.equal(b, same) and torch.equal(torch.get_rng_state(), state)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_converting_a_gigabyte_holds_the_kept_layers_and_less_than_four_more():
    found = gigabyte("5GB")
    assert found["checkpoint MB"] > 1000
    assert found["kept MB"] < found["peak net of imports MB"] < found["kept + 4 layers MB"]


@pytest.fixture
def setting(text):
    return bench.setting_of(parse_profile(profile_data(text), "t"))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_plain_implementation_computes_the_same(setting, depth):
    _, model = setting.build()
    shake(model)
    ids = setting.tokens()[:, :-2]
    copied = bench.plain(model)
    logits = bench.plain_logits(copied, ids, depth)
    torch.testing.assert_close(logits, model(ids, depth=depth).logits, rtol=0, atol=1e-5)
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), setting.tokens()[:, 1:-1].flatten())
    ours = bench.training_loss(model, model.get_output_embeddings().weight, setting.tokens(), depth, "t+1")
    whole.backward()
    ours.backward()
    for (name, a), b in zip(model.recurrence.named_parameters(), copied.recurrence.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_every_call_of_an_update_moves_what_it_trains_and_nothing_else(setting, monkeypatch):
    trained = []
    stepping = bench._stepping
    monkeypatch.setattr(bench, "_stepping",
                        lambda loss, parameters: trained.append(list(parameters)) or stepping(loss, trained[-1]))
    calls = bench.update_calls(setting, 2, ("ours", "plain", "base", "without modulation", "prelude"))
    assert list(calls) == ["ours", "without modulation", "plain", "base", "prelude"]
    for parameters, name in zip(trained, list(calls), strict=False):
        before = [p.detach().clone() for p in parameters]
        calls[name]()
        calls[name]()
        moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
        assert any(moved) and not any(m for p, m in zip(parameters, moved, strict=True) if not p.requires_grad)


def test_a_row_of_the_update_bench_says_times_utilisation_and_memory(setting, text, monkeypatch):
    monkeypatch.setattr(bench, "SQUARE", 512)  # some milliseconds: a preemption is no multiple of it
    monkeypatch.setattr(bench, "peak_memory", lambda setting, depth, name: {"ours": 10.0, "plain": 30.0}[name])
    row, = bench.measured_updates(setting, parse_profile(profile_data(text), "t"), (2,), ("ours", "plain"), repeats=2)
    assert row["ours min s"] <= row["ours s"] <= row["ours max s"] and row["tokens/s"] == 64 / row["ours s"]
    assert row["plain / ours min"] <= row["plain / ours"] <= row["plain / ours max"]
    assert 0 < row["FLOP utilisation %"] < 200 and row["ours peak MB"] == 10


def test_where_the_vocabulary_is_large_no_logits_of_all_tokens_are_held(text):
    data = profile_data(text)
    data["base"]["model"] |= {"vocab_size": 50_000}
    data["training"] |= {"micro_batch": 4, "block": 512}
    setting = bench.setting_of(parse_profile(data, "t"))
    ours, plain = (bench.peak_memory(setting, 1, name) for name in ("ours", "plain"))
    logits = 4 * 512 * 50_000 * 4 / 1e6
    assert ours < logits < plain  # 410 MB


def test_drafts_are_counted_and_change_no_text():
    """Its own copy's drafts are all accepted, another model's aren't."""
    model, prompts = shake(convert()), [ids(1, 6), ids(1, 9, seed=4)]
    own, other, lookup = bench.drafted(model, prompts, 12, own={"assistant_model": copy.deepcopy(model)},
                                       other={"assistant_model": shake(convert(depth=1))},
                                       lookup={"prompt_lookup_num_tokens": 3})
    assert own["accepted %"] == 100 > other["accepted %"] >= 0
    assert all(row["same text"] == row["prompts"] == 2 for row in (own, other, lookup))
    assert all(row["low"] <= row["times faster"] <= row["high"] for row in (own, other, lookup))
    assert not model._forward_pre_hooks


def test_without_a_deep_loop_there_is_no_bench_of_drafts(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "deep_loops", lambda root: [])
    assert "drafts" not in bench.available()
    with pytest.raises(InputError, match="bench 'drafts': no checkpoint of a deep loop with its base; make base"):
        bench.drafts(None, tmp_path)


def test_last_words_are_asked_of_plain_sentences_each_once():
    plain = "The function returns the mean of all values along the given axis."
    texts = ["Too short to ask.", "Returns `x`, which is not a sentence of plain words for the most part here.",
             f"Summary\n-------\n{plain}\n\nMore.", f"{plain} Again.", "The last word of this text has a digit, as x1."]
    assert last_word.items(iter(texts), 9) == [{"asked": plain.removesuffix(" axis."), "answer": "axis"}]


def test_a_table_of_last_words_without_lm_eval_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(last_word.importlib.util, "find_spec", lambda name: None)
    assert last_word.main([]) == 2
    assert capsys.readouterr().err == "error: package 'lm_eval' isn't installed; pip install '.[neighbours]'\n"


def test_the_gpu_bench_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu"]) == 2 and "no CUDA GPU is at hand" in capsys.readouterr().err


def test_an_unknown_bench_is_refused_and_the_command_line_passes_names_and_exit_code_on(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("subprocess.run", lambda command: asked.append(command) or SimpleNamespace(returncode=2))
    assert main(["bench", "speed"]) == 2
    assert [*map(str, asked[0])] == [sys.executable, bench.__file__, "speed"]
    assert bench.main(["speed"]) == 2
    assert capsys.readouterr().err == ("error: bench 'speed': unknown; one of updates, vocabulary, checkpoints, svd, "
                                      "conversion, generation, drafts, gpu, instructions\n")


def test_two_makings_of_smoke_are_compared_by_arm(monkeypatch, tmp_path):
    smoke = load_profile("smoke")

    def made(command, check, env):
        """`lora` ends 0.02 elsewhere without the vector instructions, `static` takes another rate there."""
        bare = env.get("ATEN_CPU_CAPABILITY") == "default"
        write_run(Path(command[-1]), smoke, smoke.find("lora-corrected-s0"), 3.02 if bare else 3.0)
        write_run(Path(command[-1]), smoke, smoke.find("cut-any-s0"), 6.0)
        write_run(Path(command[-1]), smoke, smoke.find("static-d4-r4-corrected-s0"), 4.0, rate=2.0 if bare else 1.0)

    monkeypatch.setattr(bench.subprocess, "run", made)
    table = bench.instructions(smoke, tmp_path).set_index("arm")
    assert table.loc["lora", "largest"] == pytest.approx(0.02) and table.loc["lora", "beyond"] == 12
    assert table.loc["cut", "largest"] == 0 and table["losses"].eq(12).all()
    assert table["runs that end otherwise"].to_dict() == {"cut": 0, "lora": 0, "static": 1}

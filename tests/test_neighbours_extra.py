"""Libraries of the extra `neighbours`: TRL and lm-eval take the model as any causal LM. Skipped where not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import last_word
import pytest
import torch
from datasets import Dataset
from models import convert, ids, shake, small_base
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from words import word_tokenizer

SETTINGS = dict(max_steps=2, report_to=[], use_cpu=True, bf16=False, learning_rate=0.01, disable_tqdm=True,
                logging_steps=1, per_device_train_batch_size=3, save_strategy="no", gradient_checkpointing=False)


def written(row):
    return " ".join(f"w{token}" for token in row)


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def saved(tmp_path, request):
    model = convert(small_base(getattr(request, "param", "qwen2")))
    shake(model).save_pretrained(tmp_path / "model", self_contained=True)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


TEXTS = [row[:length].tolist() for row, length in zip(ids(3, 9).clamp(max=47), (9, 4, 6), strict=True)]


@pytest.mark.parametrize("saved, options", [
    ("qwen2", dict(loss_type="nll")), ("qwen2", dict(padding_free=True)),
    ("qwen2", dict(packing=True, packing_strategy="bfd")), *((family, dict(loss_type="chunked_nll")) for family in (
        "qwen2", "granite", "cohere", "gemma3_text"))], ids=str, indirect=["saved"])
def test_trl_sft_trains_on_the_models_own_loss(saved, tmp_path, options):
    """However TRL batches it: padded, from the decoder's states in chunks, or packed into one row."""
    trl = pytest.importorskip("trl")
    with torch.no_grad():
        texts = [torch.tensor([[*text, 49]]) for text in TEXTS]  # TRL ends each with the end of text
        found = [F.cross_entropy(saved(t).logits[0, :-1], t[0, 1:], reduction="sum").item() for t in texts]
    expected = sum(found) / sum(t.shape[1] - 1 for t in texts)
    config = trl.SFTConfig(str(tmp_path / "out"), max_length=32 if "packing" in options else None, **SETTINGS | options)
    trainer = trl.SFTTrainer(saved, config, processing_class=word_tokenizer(end="w49"),
                             train_dataset=Dataset.from_list([{"text": written(text)} for text in TEXTS]))
    first, second = losses(trainer)
    assert first == pytest.approx(expected, rel=0, abs=1e-4) and second < first


def test_trl_sft_takes_a_saved_models_path(saved, tmp_path):
    trl = pytest.importorskip("trl")
    word_tokenizer(end="w49").save_pretrained(tmp_path / "model")
    text = torch.tensor([[*TEXTS[0], 49]])
    config = trl.SFTConfig(str(tmp_path / "out"), **SETTINGS)
    trainer = trl.SFTTrainer(str(tmp_path / "model"), config,
                             train_dataset=Dataset.from_list([{"text": written(TEXTS[0])}]))
    first, second = losses(trainer)
    assert first == pytest.approx(saved(text, labels=text).loss.item(), rel=0, abs=1e-4) and second < first
    assert {name.partition(".")[0] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"recurrence"}


def test_trl_dpo_prefers_the_chosen_answer(saved, tmp_path):
    trl = pytest.importorskip("trl")
    pairs = Dataset.from_list([{"prompt": "w5 w6", "chosen": "w7 w8 w9", "rejected": "w9 w8"}] * 3)
    trainer = trl.DPOTrainer(saved, args=trl.DPOConfig(str(tmp_path / "out"), **SETTINGS), train_dataset=pairs,
                             processing_class=word_tokenizer(end="w49"))
    first, second = losses(trainer)
    assert first == pytest.approx(0.6931, rel=0, abs=1e-4) and second < first - 1e-3  # log 2: it is its own reference


def test_lm_eval_scores_with_the_models_likelihoods(saved):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=saved, tokenizer=word_tokenizer(end="w49"), batch_size=2, device="cpu")
    asked = [([3, 4, 5], [6, 7]), ([8], [9, 10, 11]), ([12, 13], [14])]
    requests = [Instance("loglikelihood", {}, (written(a), " " + written(b)), i) for i, (a, b) in enumerate(asked)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (context, answer), (score, _) in zip(asked, found, strict=True):
        logits = saved(torch.tensor([context + answer])).logits[0, len(context) - 1:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert score == pytest.approx(expected.item(), rel=0, abs=1e-4)
    prompts = [Instance("generate_until", {}, (written(a), {"until": ["w48"], "max_gen_toks": 4}), 0) for a, _ in asked]
    for (context, _), text in zip(asked, model.generate_until(prompts, disable_tqdm=True), strict=True):
        expected = saved.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=49)
        words = written(expected[0, len(context):].tolist())
        assert text.split() == words.partition("w49")[0].partition("w48")[0].split()


def test_the_table_of_last_words_is_lm_evals_and_the_models_own(saved, tmp_path, monkeypatch):
    lm_eval, seen = pytest.importorskip("lm_eval"), []
    evaluate = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *args, **kw: seen.append(evaluate(*args, **kw)) or seen[0])
    asked = [(TEXTS[0][:-1], TEXTS[0][-1]), ([5, 6, 7], 8), ([11, 12], 13)]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps({"asked": written(a), "answer": written([b])}) + "\n" for a, b in asked))
    row = last_word.score(saved, word_tokenizer(end="w49"), file)
    assert all(sample["arguments"][0][1][0] == " " for sample in seen[0]["samples"]["last_word"])  # a word of its own
    logits = [saved(torch.tensor([a])).logits[0, -1].log_softmax(-1) for a, _ in asked]
    nats = torch.tensor([-scores[b].item() for scores, (_, b) in zip(logits, asked)])
    assert row["nats a word"] == pytest.approx(nats.mean().item(), rel=0, abs=1e-4) and row["n"] == 3
    assert row["its s.e."] == pytest.approx(nats.std().item() / 3**0.5, rel=0, abs=1e-4)
    assert row["accuracy"] == sum(scores.argmax().item() == b for scores, (_, b) in zip(logits, asked)) / 3


def test_lm_evals_command_line_scores_a_saved_model(tmp_path):
    """It doesn't import this package: `trust_remote_code` finds the class by the file beside the weights."""
    pytest.importorskip("lm_eval")
    model = shake(convert())
    model.save_pretrained(tmp_path / "model", self_contained=True)
    word_tokenizer(end="w49").save_pretrained(tmp_path / "model")
    task = Path(__file__).parent / "helpers" / "lm_eval_task"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "cache"),
                                "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
                           f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32", "--tasks", "words",
                           "--include_path", str(task), "--device", "cpu", "--batch_size", "3", "--log_samples",
                           "--output_path", str(tmp_path / "out")],
                          cwd=task, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()]
    right = []
    for sample in samples:
        asked, answers = sample["doc"]["asked"], sample["doc"]["answers"]
        expected = []
        for answer in answers:
            tokens = torch.tensor([[int(word[1:]) for word in f"{asked} {answer}".split()]])
            scores = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
            expected.append(scores[-len(answer.split()):].sum().item())
        found = [float(answer[0][0]) for answer in sample["resps"]]
        assert found == pytest.approx(expected, rel=0, abs=1e-4)
        right.append(expected.index(max(expected)) == sample["doc"]["right"])
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert len(samples) == 5 and results["results"]["words"]["acc,none"] == sum(right) / 5

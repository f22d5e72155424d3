"""What works on a transformers causal LM works here: pipeline, peft, accelerate, checkpointing, torch.compile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import convert, ids, shake, small_base
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, pipeline
from words import word_tokenizer

from ouroboros import OuroborosForCausalLM

HELPERS = Path(__file__).parent / "helpers"


def test_the_text_generation_pipeline_loads_a_saved_model(tmp_path):
    model = shake(convert())
    model.save_pretrained(tmp_path, self_contained=True)
    word_tokenizer().save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path))
    texts = write(["w5 w6 w7", "w8"], max_new_tokens=5, do_sample=False, batch_size=2)  # left-padded
    for text, prompt in zip(texts, ([5, 6, 7], [8]), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0]
        assert re.findall(r"w\d+", text[0]["generated_text"]) == [f"w{i}" for i in expected]


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_peft_puts_lora_on_the_coda_and_both_learn():
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[2],
                      modules_to_save=["recurrence"])
    model = get_peft_model(shake(convert()), lora)
    loras = {name for name in trained(model) if "lora_" in name}
    assert len(loras) == 4 and all(".layers.2." in name for name in loras)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(model) and any("recurrence" in name for name in moved) and losses[-1] < losses[0]
    assert model.eval().generate(input_ids=ids(), max_new_tokens=3).shape == (2, 10)


@pytest.mark.parametrize("layer", [0, 1])
def test_peft_on_the_prelude_or_the_looped_layer_gets_gradients(layer):
    """The prelude runs without autograd only while nothing in it is trained."""
    plain = convert()
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[layer]))
    model(input_ids=ids(), labels=ids()).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 1 and gradients[0].abs().max() > 0
    assert len(plain.projections) == 7


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("modulation", ["controller", "static"])
def test_gradient_checkpointing_changes_no_gradient(modulation, reentrant):
    model = shake(convert(modulation=modulation)).train()

    def gradients():
        model.zero_grad()
        model(ids(), labels=ids(), depth=4).loss.backward()
        return {name: p.grad.clone() for name, p in model.recurrence.named_parameters()}

    plain = gradients()
    calls = []
    model.recurrence.modulation.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert len(calls) == 8  # four steps, each once more in the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())


def test_the_compiled_step_agrees_and_does_not_compile_at_every_step():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = shake(convert()).train()

    def run():
        model.zero_grad()
        out = model(ids(), labels=ids(), depth=8)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad.clone() for name, p in model.recurrence.named_parameters()}

    logits, gradients = run()
    model.recurrence.compile(backend=backend)
    again, same = run()
    assert 1 <= len(compiled) <= 3  # step 0, step 1, and any step
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6)
    assert model.state_dict().keys() == convert().state_dict().keys()  # a compiled model saves as before
    model.eval()
    count = len(compiled)
    text = model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert len(compiled) == count  # not anew at every token
    assert torch.equal(text, shake(convert()).generate(ids(), max_new_tokens=4, do_sample=False))


def test_hidden_states_show_every_recurrence_step():
    model = shake(convert())
    out = model(ids(), depth=5, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + 1 + 5 + 1 and all(h.shape == (2, 7, 16) for h in out.hidden_states)
    torch.testing.assert_close(model.base.lm_head(out.hidden_states[-1]), out.logits)
    shorter = model(ids(), depth=4, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:6], shorter[:6], strict=True))
    assert model(ids()).hidden_states is None


def test_the_trainer_trains_evaluates_and_saves(tmp_path):
    model, rows = shake(convert()), [{"input_ids": row, "labels": row} for row in ids(4, 9)]
    settings = TrainingArguments(str(tmp_path), max_steps=3, save_steps=3, eval_strategy="steps", eval_steps=1,
                                 report_to=[], use_cpu=True, learning_rate=0.01, disable_tqdm=True)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    loaded = OuroborosForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(loaded(ids()).logits, model.eval()(ids()).logits)


def trainer_of(model, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 9)]
    settings = TrainingArguments(str(folder), report_to=[], use_cpu=True, learning_rate=0.01, disable_tqdm=True,
                                 logging_steps=1, per_device_train_batch_size=4, **options)
    return Trainer(model, settings, train_dataset=rows, eval_dataset=rows)


def logged(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


def weights(model):
    return {name: p.detach().clone() for name, p in model.recurrence.named_parameters()}


@pytest.mark.parametrize("modulation", ["controller", "static"])
def test_the_trainer_in_bfloat16_follows_the_one_in_float32(tmp_path, modulation):
    losses = []
    for bf16 in (False, True):
        trainer = trainer_of(shake(convert(modulation=modulation)), tmp_path, num_train_epochs=3, bf16=bf16)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0, abs=2e-2)
    assert sum(losses[0][-2:]) < sum(losses[0][:2]) - 0.01  # an epoch is two updates


@pytest.mark.parametrize("adapted", [False, True])
def test_the_trainers_label_smoothing_is_on_the_next_token(tmp_path, adapted):
    model = shake(convert())
    rows = ids(8, 9)
    logits, labels = model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.3).item()
    assert abs(F.cross_entropy(model(rows).logits.flatten(0, 1), rows.flatten(), label_smoothing=0.3) - expected) > 0.01
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    trainer = trainer_of(model, tmp_path, max_steps=1, label_smoothing_factor=0.3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0, abs=1e-5)


def test_the_trainer_goes_on_from_a_checkpoint_and_loads_the_best(tmp_path):
    whole = trainer_of(shake(convert()), tmp_path / "whole", max_steps=4, save_steps=2)
    whole.train()
    resumed = trainer_of(shake(convert()), tmp_path / "resumed", max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, rtol=0, atol=0)



def test_prompt_tuning_trains_its_tokens_and_generates():
    plain = shake(convert())
    model = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert len(trained(model)) == 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=ids(), labels=ids()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    prompt = model.eval().get_prompt(batch_size=2)
    embedded = torch.cat([prompt, plain.get_input_embeddings()(ids())], dim=1)
    expected = plain.generate(inputs_embeds=embedded, max_new_tokens=3, do_sample=False)
    found = model.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=3, do_sample=False)
    assert torch.equal(found[:, 7:], expected)


def test_only_the_wanted_logits_are_computed():
    model = shake(convert())
    whole = model(ids()).logits
    torch.testing.assert_close(model(ids(), logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids(), logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    as_tuple = model(ids(), labels=ids(), return_dict=False)
    torch.testing.assert_close(as_tuple[1], whole)


def test_two_processes_give_the_losses_of_one(tmp_path):
    small_base().save_pretrained(tmp_path / "base")
    losses = {}
    for processes in (1, 2):
        environment = os.environ | {"PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        subprocess.run([sys.executable, *launcher, str(HELPERS / "two_processes.py"), str(tmp_path)], check=True,
                       env=environment, capture_output=True, timeout=900)
        losses[processes] = json.loads((tmp_path / f"{processes}.json").read_text())
    assert len(losses[1]) == 5 and losses[1][-1] < losses[1][0]
    assert losses[2] == pytest.approx(losses[1], rel=0, abs=1e-5)

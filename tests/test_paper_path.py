"""The profile `paper`, smaller only in text, base and length of training: the same path end to end, nothing stubbed."""

import json

import numpy as np
import pytest
import torch
from conftest import profile_data
from synthetic import write_run
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros.errors import InputError
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.log import read_run
from ouroboros.training import build
from ouroboros.training.corpus import prepare
from ouroboros.training.pretraining import pretrain
from ouroboros.training.run import base_sha256, execute

SETS = ("train", "heldout", "foreign", "stream", "reference")


def stream_folder(source, folder, subset):
    """A local data set with a named configuration, as FineWeb-edu has."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files: '*.jsonl'\n---\n")
    lines = [json.dumps({"text": file.read_text(), "id": file.stem}) for file in sorted(source.iterdir())]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    return f"{folder}:{subset}"


@pytest.fixture(scope="module")
def paper(text, tmp_path_factory):
    """(profile, root): the profile `paper` on a narrow random 36-layer Qwen2 checkpoint of several bf16 shards."""
    root = tmp_path_factory.mktemp("paper")
    base = root / "qwen"
    config = Qwen2Config(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=36,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(base, max_shard_size="500KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    own = parse_profile(profile_data(text), "test.yaml")
    prepare(own, root)  # for a tokenizer of 300 tokens
    own.tokenizer_path(root).rename(base / "tokenizer.json")
    profile = load_profile("paper")
    own_subset, foreign_subset = (names[0].split(":")[1] for names in (profile.corpus.packages, profile.corpus.foreign))
    corpus = profile.corpus.model_copy(update={
        "packages": (stream_folder(text / "own", root / "own", own_subset),),
        "foreign": (stream_folder(text / "foreign", root / "foreign", foreign_subset),),
        "dev_share": 0.15, "heldout_share": 0.3})
    small = profile.training.model_copy(update={"updates": 2, "micro_batch": 1, "accumulation": 2, "block": 32})
    profile = profile.model_copy(update={
        "corpus": corpus, "base": profile.base.model_copy(update={"path": str(base)}), "training": small,
        "evaluation": profile.evaluation.model_copy(update={"points": 2, "blocks": 1, "final_blocks": 2,
                                                            "stream_batches": 4})})
    write_rates(profile, root)
    return profile, root


def write_rates(profile, root) -> None:
    """Logs of the searches: a rate inside the grid is each arm's best."""
    best = sorted({spec.rate for spec in profile.search_runs()})[1]
    for spec in profile.search_runs():
        write_run(root, profile, spec, 1.0 if spec.rate == best else 2.0)


@pytest.mark.parametrize("run_id", ["full-any-s42", "cut-any-s42", "controller-dmixed-r32-released-s42",
                                    "controller-d4-r32-corrected-s42", "static-d4-r32-corrected-s42",
                                    "controller_nonorm-d8-r32-corrected-s42", "lora-corrected-s42",
                                    "linear_fit-corrected-s42"])
def test_a_run_of_the_papers_path_ends_with_a_whole_log(paper, run_id):
    profile, root = paper
    run = read_run(execute(profile, run_id, root, progress=False))
    assert run.manifest["status"] == "finished" and len(run.manifest["hashes"]["base"]) == 64
    last = run.log[run.log["update"] == run.log["update"].max()]
    for split in SETS:
        for target in ("t+1", "t+2"):
            rows = last[last["split"] == split].groupby("metric")["value"].last()
            blocks = rows[f"block_losses_{target}"]
            assert rows[f"loss_{target}"] == pytest.approx(np.mean(blocks))
            assert np.allclose(blocks, np.log(300), atol=1.5)  # a random base knows nothing yet
    untrained = run_id.startswith(("full", "cut"))
    assert (run.manifest["trainable"] == 0) == untrained
    by_gradient = not untrained and "fit" not in run_id
    assert (run.series["train", "loss"].updates if by_gradient else []) == ([1, 2] if by_gradient else [])
    assert (("train", "loss") in run.series) == by_gradient


def test_the_model_is_17_of_36_layers_in_bfloat16_with_float32_trained_tensors(paper):
    profile, root = paper
    base = build.load_base(profile, root)
    model = build.build(profile.find("controller-d4-r32-corrected-s42"), profile, base)
    layers = model.base.model.layers
    assert len(base.model.layers) == 36 and len(layers) == 17
    for place, source in enumerate([*range(8), 18, *range(28, 36)]):
        assert torch.equal(layers[place].mlp.up_proj.weight, base.model.layers[source].mlp.up_proj.weight)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert len(model.projections) == 7 and model.projections[0].scale == 0.5 and model.config.max_steps == 64


def test_a_base_that_is_not_there_is_refused_in_one_line(paper):
    profile, root = paper
    away = profile.model_copy(update={"base": profile.base.model_copy(update={"path": str(root / "nowhere")})})
    for refused in (lambda: build.load_base(away, root), lambda: prepare(away, root)):
        with pytest.raises(InputError, match="nowhere") as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_data_set_that_cannot_be_loaded_is_refused_in_one_line(paper, tmp_path):
    profile, root = paper
    for change in ({"packages": (str(tmp_path / "none"),)}, {"packages": (profile.corpus.packages[0] + "x",)}):
        away = profile.model_copy(update={"corpus": profile.corpus.model_copy(update=change)})
        with pytest.raises(InputError, match="corpus: data set '.*' can't be loaded") as error:
            prepare(away, tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text('{"words": "no text"}\n')
    rows = profile.corpus.model_copy(update={"packages": (str(tmp_path / "rows"),)})
    with pytest.raises(InputError, match="row 1 has no field 'text'"):
        prepare(profile.model_copy(update={"corpus": rows}), tmp_path)


def test_a_hub_base_is_fetched_once_into_a_folder(paper, monkeypatch):
    """`Qwen/Qwen2.5-3B` is a name, not a folder: tokenizer, weights and hash come from the files that the hub gives."""
    profile, root = paper
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return profile.base.path
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub = profile.model_copy(update={"base": load_profile("paper").base})
    assert hub.tokenizer_path(root).exists() and asked == [("Qwen/Qwen2.5-3B", None)]
    assert base_sha256(hub, root) == base_sha256(profile, root)
    assert build.load_base(hub, root).config.num_hidden_layers == 36


def test_the_small_profile_at_smoke_size(tmp_path):
    """Its 36 layers, split, text and matrix, narrower and shorter: base, then one run of each kind."""
    data = load_profile("small").model_dump(mode="json")
    data["corpus"] |= {"packages": ["accelerate"], "foreign": ["peft"], "sha256": None, "heldout_share": 0.2}
    data["base"]["model"] |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                              "num_key_value_heads": 1}
    data["base"]["pretraining"] |= {"updates": 2, "batch": 2, "block": 32, "points": 1}
    data["training"] |= {"updates": 2, "micro_batch": 2, "accumulation": 2, "block": 32}
    data["evaluation"] |= {"points": 2, "blocks": 2, "final_blocks": 2, "stream_batches": 2}
    data["probes"]["blocks"] = 2
    profile = parse_profile(data, "small.yaml")
    pretrain(profile, tmp_path)
    write_rates(profile, tmp_path)
    assert len(build.load_base(profile, tmp_path).model.layers) == 36
    for run_id in ("full-any-s0", "controller-d16-r8-corrected-s2", "static-d8-r16-corrected-s0",
                   "controller-dmixed-r8-released-s1", "lora_layer-corrected-s0"):
        assert read_run(execute(profile, run_id, tmp_path, progress=False)).manifest["status"] == "finished"

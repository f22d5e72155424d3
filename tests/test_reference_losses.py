"""What size a loss has before anything is trained, from logs with known numbers."""

import math

import pytest
from synthetic import loss, write

from ouroboros.analysis import reference_losses, text
from ouroboros.analysis.results import load_results
from ouroboros.experiment.profile import load_profile

UNTRAINED = ("full", "cut", "cut_2", "refine_base", "unigram", "bigram", "bare", *reference_losses.STARTS.values())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("levels")
    write(root, "smoke", keep=lambda spec: spec.arm in UNTRAINED and "+" not in spec.protocol, base=False)
    return load_results("smoke", root)


def test_the_cut_is_told_by_the_layers_kept_and_minus_the_full_model(results):
    table = reference_losses.damage_table(results)
    assert table["kept"].tolist() == ["1/1/1", "2/1/2"] and table["layers"].tolist() == [3, 5]
    wanted = [loss(arm, None, "any", 0) - loss("full", None, "any", 0) for arm in ("cut", "cut_2")]
    assert table["heldout - full"].tolist() == pytest.approx(wanted) == table["newer - full"].tolist()


def test_the_untrained_loop_stands_beside_cut_and_full_on_the_probes_blocks(results):
    table = reference_losses.untrained_table(results)
    profile = load_profile("smoke")
    assert table["depth"].tolist() == [*profile.probes.depths]
    assert table["norms at 1"].tolist() == pytest.approx([6.4 + 0.01 * abs(d - profile.depth) for d in table["depth"]])
    assert table["cut"].tolist() == pytest.approx([6.0] * len(table))  # the mean of the first four blocks: of all


def test_the_double_norm_is_the_released_intact_model_and_the_stream_its_logs(results):
    table = reference_losses.levels_table(results).set_index(["split", "target"])
    assert table.loc[("heldout", "t+1"), "double norm"] == pytest.approx(loss("refine_base", None, "released", 0))
    assert reference_losses.stream_table(results)["first token"].tolist() == [1.0, 20.0, 40.0]
    with results.reading() as read:
        reference_losses.stream_table(results)
    assert read == {"refine_base-released-s0"}


def test_sentences_follow_the_tables_and_none_is_of_what_was_not_run(results, tmp_path):
    assert "full model is better than word frequencies" in text.targets(results)[-1]
    write(tmp_path, "smoke", keep=lambda spec: spec.arm in ("full", "cut"), base=False)
    found = load_results("smoke", tmp_path)
    bare = text.targets(found)
    assert len(bare) == 2 and not any("nan" in sentence for sentence in bare)
    assert math.isnan(reference_losses.levels_table(load_results("smoke", tmp_path))["unigram"][0])

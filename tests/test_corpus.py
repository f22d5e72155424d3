"""Documents, disjoint splits, blocks."""

import json

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.errors import InputError
from ouroboros.experiment.schema import CorpusConfig
from ouroboros.training import corpus
from ouroboros.training.corpus import documents, prepare, split_of

TEXT = CorpusConfig(kind="text", packages=("a",), foreign=("b",), dev_share=0.2, heldout_share=0.3)


@given(st.text(min_size=1))
def test_a_text_has_one_split_that_depends_on_nothing_but_the_text(text):
    assert split_of(text, None, TEXT) == split_of(text, None, TEXT.model_copy(update={"kind": "hub"}))
    assert split_of(text, "foreign", TEXT) == "foreign" != split_of(text, None, TEXT)


def test_shares_are_about_what_is_asked_for():
    splits = [split_of(str(i), None, TEXT) for i in range(4000)]
    for split, share in (("heldout", 0.3), ("dev", 0.2), ("train", 0.5)):
        assert abs(splits.count(split) / 4000 - share) < 0.04


def test_no_document_stands_twice_even_if_a_source_repeats_it(text, profile, tmp_path):
    twice = profile.corpus.model_copy(update={"packages": profile.corpus.packages * 2})
    found = list(documents(twice))
    assert len(found) == len({text for _, text in found}) == 120
    assert {split for split, _ in found} == {"train", "dev", "heldout", "foreign", "newer"}


def test_repeated_paragraphs_are_kept_once():
    seen = set()
    texts = ["one paragraph\n\nshared  Words", "shared words\n\nanother one"]
    assert list(corpus._without_repeats(texts, seen, 1)) == ["one paragraph\n\nshared  Words", "another one"]


def test_docstrings_come_from_pure_python_wheels_only():
    config = CorpusConfig.model_construct(kind="docstrings", packages=("numpy",), foreign=())
    with pytest.raises(InputError, match="numpy.*compiled"):
        list(documents(config))
    with pytest.raises(InputError, match="'no-such-package' is not installed"):
        list(documents(config.model_copy(update={"packages": ("no-such-package",)})))
    found = [text for _, text in documents(config.model_copy(update={"packages": ("peft",)}))]
    assert len(found) > 100 and all(len(text) >= config.shortest for text in found)


def test_sources_are_whole_files_and_hold_the_docstrings():
    config = CorpusConfig.model_construct(kind="sources", packages=("accelerate",), foreign=())
    sources = [text for _, text in documents(config)]
    docstrings = [text for _, text in documents(config.model_copy(update={"kind": "docstrings"}))]
    assert sum(map(len, sources)) > 2 * sum(map(len, docstrings))
    whole = "\n".join(sources)
    assert any(text.startswith("import ") or "\nimport " in text for text in sources)
    assert sum(text.splitlines()[0] in whole for text in docstrings) > 0.9 * len(docstrings)


def test_text_jsonl_and_hub_give_the_same_corpus(text, profile, tmp_path):
    jsonl = {}
    for part in ("own", "foreign"):
        folder = tmp_path / part
        folder.mkdir()
        lines = [json.dumps({"text": file.read_text()}) for file in sorted((text / part).iterdir())]
        (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
        jsonl[part] = str(folder)
    as_text = sorted(documents(profile.corpus))
    for kind in ("text", "hub"):
        config = profile.corpus.model_copy(update={"kind": kind, "packages": (jsonl["own"],),
                                                   "foreign": (jsonl["foreign"],)})
        assert sorted(documents(config)) == as_text


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(InputError, match="a.jsonl can't be read"):
        list(documents(CorpusConfig.model_construct(kind="text", packages=(str(tmp_path),), foreign=())))
    with pytest.raises(InputError, match="no .txt or .jsonl"):
        list(documents(CorpusConfig.model_construct(kind="text", packages=(str(tmp_path / "none"),), foreign=())))


@pytest.mark.parametrize("line", ['["text"]', '{"text": 5}', '{"text": "\xff"}'])
def test_a_row_that_is_no_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "fine"}}\n{line}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="a.jsonl"):
        list(documents(CorpusConfig.model_construct(kind="text", packages=(str(tmp_path),), foreign=())))


@pytest.mark.parametrize("line", ['{"texts": "a"}', '{"text": null}'])
def test_a_row_without_a_text_is_skipped_and_counted(tmp_path, line, capsys):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "too"}}\n')
    found = documents(CorpusConfig.model_construct(kind="text", packages=(str(tmp_path),), foreign=()))
    assert sorted(text for _, text in found) == ["fine", "too"]
    assert "1 of 3 rows have no text" in capsys.readouterr().err


@pytest.mark.parametrize("breaks", [1, corpus.BREAKS, corpus.BREAKS + 1])
def test_a_stream_that_breaks_off_goes_on_at_the_same_document(tmp_path, monkeypatch, breaks):
    """Any number of times, if documents come in between; when none does, it is given up."""
    def rows():
        for row in range(8):
            if row in (3, 6) and left[row]:
                left[row] -= 1
                raise ConnectionError("reset by peer")
            yield {"text": f"document {row}"}

    left = {3: breaks, 6: 1}
    monkeypatch.setattr(corpus, "PAUSE", 0)
    monkeypatch.setattr("datasets.load_dataset",
                        lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    found = documents(CorpusConfig.model_construct(kind="hub", packages=("far/away",), foreign=(), documents=7))
    if breaks > corpus.BREAKS:
        with pytest.raises(InputError, match="'far/away' broke off 6 times after row 3 .reset by peer."):
            list(found)
    else:
        assert [text for _, text in found] == [f"document {row}" for row in range(7)]


def test_a_line_of_jsonl_ends_at_its_newline_only(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\u2029six"]  # str.splitlines would split here
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = documents(CorpusConfig.model_construct(kind="text", packages=(str(tmp_path),), foreign=()))
    assert sorted(text for _, text in found) == sorted(texts)


@given(st.lists(st.tuples(st.text(st.sampled_from("ab\n "), max_size=6), st.sampled_from([None, "foreign", "newer"])),
                max_size=30))
def test_every_content_has_exactly_one_split_whatever_the_sources_hold(sources):
    """A text that stands in several sources is kept once, where it stood first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpus.READERS, "text", lambda config: iter(sources))
        found = list(documents(TEXT))
    assert len(found) == len({text for _, text in found})
    assert {text for _, text in found} == {text for text, _ in sources if text}
    for split, text in found:
        own = next(own for other, own in sources if other == text)
        assert split == split_of(text, own, TEXT)


def test_another_configuration_or_tokenizer_builds_the_corpus_anew(profile, tmp_path):
    first = prepare(profile, tmp_path)
    config = profile.corpus.model_copy(update={"heldout_share": 0.6})
    other = prepare(profile.model_copy(update={"corpus": config}), tmp_path)
    assert other.manifest["sha256"] != first.manifest["sha256"]
    assert other.manifest["splits"]["heldout"]["documents"] > first.manifest["splits"]["heldout"]["documents"]
    profile.tokenizer_path(tmp_path).unlink()
    again = prepare(profile, tmp_path)
    assert again.manifest == prepare(profile, tmp_path / "fresh").manifest


def test_the_tokenizer_is_trained_on_train_alone_and_gives_the_text_back(profile, tmp_path):
    import tokenizers

    made = prepare(profile, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(profile.tokenizer_path(tmp_path)))
    texts = {split: {t for s, t in documents(profile.corpus) if s == split} for split in made.manifest["splits"]}
    for split in texts:
        assert {tokenizer.decode(document.tolist()) for document in made.documents(split)} == texts[split]
        assert made.manifest["splits"][split]["documents"] == len(texts[split])
    alone = corpus._train_tokenizer(sorted(texts["train"], key=corpus.content_sha256), profile.base.model["vocab_size"])
    assert alone.to_str() == tokenizer.to_str()


def test_the_same_text_makes_the_same_corpus_and_a_made_one_is_opened(profile, tmp_path, monkeypatch):
    first, second = prepare(profile, tmp_path / "a"), prepare(profile, tmp_path / "b")
    assert first.manifest == second.manifest
    for file in first.folder.iterdir():
        assert file.read_bytes() == (second.folder / file.name).read_bytes()
    monkeypatch.setattr(corpus, "_build", None)
    assert prepare(profile, tmp_path / "a").manifest == first.manifest


def test_another_corpus_than_the_pinned_one_is_refused(profile, tmp_path):
    pinned = profile.model_copy(update={"corpus": profile.corpus.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(InputError, match="the profile pins 000000000000.*requirements.lock"):
        prepare(pinned, tmp_path)


@pytest.mark.parametrize("packing", ["separated", "joined"])
def test_blocks_follow_one_another_and_look_ahead_two_tokens(profile, tmp_path, packing):
    made = prepare(profile, tmp_path)
    blocks = made.blocks("train", 16, 20, packing)
    assert blocks.shape == (20, 18)
    separator = [made.end_of_text] if packing == "separated" else []
    flat = np.concatenate([np.concatenate([d, separator]) for d in made.documents("train")])
    assert np.array_equal(blocks[:, :16].ravel(), flat[:320])
    assert np.array_equal(blocks[:-1, 16:], blocks[1:, :2])
    assert (made.end_of_text in blocks) == (packing == "separated")


def test_a_seed_orders_the_documents(profile, tmp_path):
    made = prepare(profile, tmp_path)
    one, again, other = (made.blocks("train", 16, 20, "joined", seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert sorted(map(bytes, made.documents("train", 1))) == sorted(map(bytes, made.documents("train")))


def test_too_little_text_is_refused(profile, tmp_path):
    with pytest.raises(InputError, match="split 'dev' has .* tokens, 1600002 are asked for"):
        prepare(profile, tmp_path).blocks("dev", 16, 100_000, "joined")


def test_the_reference_set_is_the_start_of_twelve_held_out_documents(profile, tmp_path):
    made = prepare(profile, tmp_path)
    reference = made.reference()
    assert reference.shape == (12, 32)
    assert np.array_equal(reference[3], list(made.documents("heldout"))[3][:32])


def test_too_few_held_out_documents_for_the_reference_set_are_refused(profile, tmp_path):
    few = profile.model_copy(update={"corpus": profile.corpus.model_copy(update={"heldout_share": 0.05})})
    made = prepare(few, tmp_path)
    assert made.manifest["splits"]["heldout"]["documents"] < 12
    with pytest.raises(InputError, match="documents of 32 tokens or more, 12 are asked for"):
        made.reference()

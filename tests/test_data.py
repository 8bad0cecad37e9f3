"""Calibration samples from everything that holds text or token ids."""

import json

import pytest
import torch
from tiny_tokenizer import byte_tokenizer

from hf_sparse_attention.calibration.bundled import KINDS, PARTS, bundled
from hf_sparse_attention.calibration.data import token_rows, token_samples

TEXTS = ["one two three ", "four five six seven ", "eight"]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def decoded(tokenizer, samples):
    return [tokenizer.decode(sample) for sample in samples]


def test_texts_are_packed_with_the_end_of_text_between(tokenizer):
    samples = list(token_samples(TEXTS, tokenizer, [16]))
    assert decoded(tokenizer, samples) == ["one two three <eo"[:14] + "<eos>f", "our five six sev"]
    assert all(sample.dtype == torch.int64 for sample in samples)


def test_every_length_that_a_pack_reaches_is_cut(tokenizer):
    samples = decoded(tokenizer, token_samples(["abcdefghij"], tokenizer, [6, 3, 3]))
    assert samples == ["abc", "abcdef", "ghi"]


def test_without_lengths_texts_stay_as_they_are(tokenizer):
    assert decoded(tokenizer, token_samples(TEXTS, tokenizer)) == TEXTS


def test_every_sample_begins_as_the_tokenizer_begins_texts():
    tokenizer = byte_tokenizer(bos=True)
    samples = decoded(tokenizer, token_samples(["abcdefgh"], tokenizer, [5]))
    assert samples == ["<bos>abcd", "<bos>efgh"]


def test_conversations_go_through_the_chat_template():
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": talk, "source": "somewhere"}]
    (sample,) = token_samples(rows, tokenizer)
    assert tokenizer.decode(sample) == "<bos>[user]hi[assistant]ho", "one <bos>, not two"
    with pytest.raises(ValueError, match="a tokenizer with a chat template for conversations"):
        list(token_samples(rows, byte_tokenizer()))


def test_a_file_and_a_folder(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("never read")
    for name, text in zip(("a.txt", "b.md", "sub/c.txt"), TEXTS, strict=True):
        (tmp_path / name).write_text(text)
    assert decoded(tokenizer, token_samples(tmp_path / "a.txt", tokenizer)) == [TEXTS[0]]
    read = decoded(tokenizer, token_samples(str(tmp_path), tokenizer))
    assert sorted(read) == sorted(TEXTS)
    assert decoded(tokenizer, token_samples(tmp_path, tokenizer, seed=0)) == read
    orders = {
        tuple(decoded(tokenizer, token_samples(tmp_path, tokenizer, seed=n))) for n in range(9)
    }
    assert len(orders) > 1, "the seed matters"
    (tmp_path / "d.bin").write_bytes(bytes([255, 254, 0]))
    with pytest.raises(ValueError, match=r"expected UTF-8 text, found other bytes in .*d\.bin"):
        list(token_samples(tmp_path, tokenizer))


def test_a_file_of_rows(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert decoded(tokenizer, token_samples(file, tokenizer)) == TEXTS


def test_datasets(tokenizer):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": [*TEXTS, ""], "id": [1, 2, 3, 4]})
    read = decoded(tokenizer, token_samples(dataset, tokenizer))
    assert sorted(read) == sorted(TEXTS), "an empty row says nothing"
    assert decoded(tokenizer, token_samples(dataset, tokenizer)) == read
    streaming = dataset.to_iterable_dataset()
    assert decoded(tokenizer, token_samples(streaming, tokenizer)) == TEXTS
    ids = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 0]]})
    assert [x.tolist() for x in token_samples(ids)] == [[5, 6]]
    only = datasets.Dataset.from_dict({"body": TEXTS, "id": [1, 2, 3]}).to_iterable_dataset()
    assert decoded(tokenizer, token_samples(only, tokenizer)) == TEXTS
    with pytest.raises(ValueError, match=r"one column of strings, got \['a', 'b'\]"):
        token_samples(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), tokenizer)
    with pytest.raises(ValueError, match=r"one split of \['test', 'train'\]"):
        token_samples(datasets.DatasetDict({"train": dataset, "test": dataset}), tokenizer)


def test_a_stream_is_read_no_further_than_needed(tokenizer):
    def endless():
        for n in range(10**6):
            assert n < 100, "read on"
            yield "ten bytes."

    samples = list(token_samples(endless(), tokenizer, [20, 40], samples=3))
    assert [len(x) for x in samples] == [20, 40] * 3


@pytest.mark.parametrize("part", PARTS)
def test_the_bundled_texts_take_turns(tokenizer, part):
    samples = list(token_samples(tokenizer=tokenizer, samples=4, lengths=[300], part=part))
    begins = [tokenizer.decode(x)[:100] for x in samples]
    assert begins[:3] == [bundled(kind, part)[:100] for kind in KINDS]
    assert begins[3] == bundled(KINDS[0], part)[300:400]


def test_more_than_a_kind_holds_is_packed_from_several(tokenizer):
    """Longer than the longest of the bundled texts, and nothing is lost."""
    total = sum(len(bundled(kind).encode()) for kind in KINDS) + 2
    (sample,) = token_samples(tokenizer=tokenizer, lengths=[total])
    assert len(sample) == total
    with pytest.raises(ValueError, match=f"at least {total + 1} tokens, .* found has {total}"):
        list(token_samples(tokenizer=tokenizer, lengths=[total + 1]))


def test_a_tokenizer_may_be_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (sample,) = token_samples(["abc"], tmp_path)
    assert tokenizer.decode(sample) == "abc"
    with pytest.raises(
        TypeError, match=r"text and a tokenizer; none could be loaded from .*nowhere"
    ):
        list(token_samples(["abc"], str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": ["text"]}, TypeError, "text and a tokenizer, got text alone"),
        ({"data": "no/such/folder"}, ValueError, r"found nothing at 'no/such/folder'; a text its"),
        ({"data": [[1, 2, 3]], "lengths": [4]}, ValueError, "at least 4 tokens, the longest .* 3$"),
        ({"data": [[1]], "lengths": [0]}, ValueError, r"expected positive integers, got \[0\]"),
        ({"data": [[1]], "lengths": []}, ValueError, r"expected positive integers, got \[\]"),
        ({"data": [[1]], "samples": 0}, ValueError, "a positive integer or None, got 0"),
        ({"data": [{"text": 1, "b": 2}]}, TypeError, "text and a tokenizer"),
        ({"data": {"text": ["a"]}}, TypeError, r"a mapping with input_ids, got \['text'\]"),
    ],
)
def test_bad_data(settings, error, message):
    with pytest.raises(error, match=message):
        list(token_samples(**settings))


def test_token_ids_in_all_their_forms():
    a, b = [5, 6, 7], [8, 9]
    padded = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    left = {"input_ids": [[5, 6, 7], [0, 8, 9]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    for data in (
        [a, b],
        [torch.tensor(x) for x in (a, b)],
        [{"input_ids": a}, {"input_ids": b}],
        {"input_ids": [a, b]},
        {"input_ids": padded, "attention_mask": mask},
        left,
    ):
        assert [row.tolist() for row in token_rows(data)] == [a, b]
        assert [row.tolist() for row in token_samples(data)] == [a, b]
    assert [row.tolist() for row in token_samples(iter([a, b]))] == [a, b]
    assert [row.tolist() for row in token_samples(a)] == [a]
    for text in ("some text", ["some text"], {"input_ids": "text"}):
        with pytest.raises(TypeError, match=r"expected token ids, got str; tokenize it first"):
            list(token_rows(text))

"""The tasks of RULER: the answer is where it must be, lengths hold, wrong answers score less."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_sparse_attention.calibration.bundled import KINDS, PARTS, bundled
from hf_sparse_attention.evaluation.samples import Sample, mean_and_standard_error
from hf_sparse_attention.evaluation.tasks import STRESS_TASKS, TASKS
from hf_sparse_attention.evaluation.tasks.base import largest
from hf_sparse_attention.evaluation.tasks.counting import different_words
from hf_sparse_attention.evaluation.tasks.depths import (
    DEPTH_GRID,
    needle_depth_samples,
    token_span,
)
from hf_sparse_attention.evaluation.tasks.documents import PoemQuestions, source_and_others
from hf_sparse_attention.evaluation.tasks.draws import Draws
from hf_sparse_attention.evaluation.tasks.haystacks import all_words
from hf_sparse_attention.evaluation.tasks.milton import QUESTIONS, Question


def word_tokenizer() -> Any:
    """A word is a token, and so is a punctuation mark: as unlike bytes as can be."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


TOKENIZERS = {"bytes": byte_tokenizer(bos=True), "words": word_tokenizer()}
LENGTHS = {"bytes": 12000, "words": 3000}
each_task = pytest.mark.parametrize("name", TASKS)
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
needle_tasks = pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])


@cache
def made(name: str, kind: str = "words", count: int = 3, seed: int = 0) -> list[Sample]:
    return TASKS[name].samples(TOKENIZERS[kind], LENGTHS[kind], count, seed)


def test_these_are_rulers_tasks_with_its_budgets() -> None:
    """Those of its synthetic.yaml, with the `tokens_to_generate` of its constants.py."""
    budgets = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    needles = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
    names = [f"niah_{name}" for name in (*needles, "multivalue", "multiquery")]
    assert list(TASKS) == [*names, "vt", "cwe", "fwe", "qa_1", "qa_2"]
    for name, task in TASKS.items():
        assert task.max_new_tokens == budgets[name.split("_")[0]]


@each_tokenizer
@each_task
def test_prompts_fill_the_length_and_leave_room_for_the_answer(name: str, kind: str) -> None:
    room = LENGTHS[kind] - TASKS[name].max_new_tokens
    for sample in made(name, kind):
        tokens = len(TOKENIZERS[kind](sample.prompt).input_ids)
        assert 0.9 * room < tokens <= room
        assert sample.prompt == sample.question + sample.answer_prefix
        assert len(sample.question) < len(sample.prompt)


@each_task
def test_same_seed_same_samples_and_another_seed_others(name: str) -> None:
    assert made(name) == made.__wrapped__(name)
    prompts = {sample.prompt for seed in (0, 1) for sample in made(name, seed=seed)}
    assert len(prompts) == 6


@each_task
def test_a_sample_does_not_depend_on_how_many_are_made(name: str) -> None:
    assert made(name, count=3)[:2] == made(name, count=2)


@each_task
def test_too_short_a_length_names_the_one_that_is_needed(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected a length of at least \d+ tokens"):
        TASKS[name].samples(TOKENIZERS["words"], 20, 1, 0)


@pytest.mark.parametrize("name", [*TASKS, *STRESS_TASKS])
def test_a_tokenizer_without_its_files_is_refused_where_prompts_would_grow_for_ever(
    name: str, tmp_path: Path
) -> None:
    """What transformers makes of a folder that holds a model and no tokenizer."""
    tiny_models.qwen3().config.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert not tokenizer("any text").input_ids
    with pytest.raises(ValueError, match="expected one that makes tokens of text, got Qwen2"):
        (TASKS | STRESS_TASKS)[name].samples(tokenizer, 2048, 1, 0)


@needle_tasks
def test_needles_are_in_the_context_once_and_at_the_depth_claimed(name: str) -> None:
    for sample in made(name, count=8):
        context = sample.question.split("\n", 1)[1].rsplit("\n", 1)[0]
        for answer in sample.answers:
            assert context.count(answer) == 1
            assert sample.prompt.count(answer) == 1, "the question gives nothing away"
        if len(sample.answers) == 1:
            needle = next(
                f"One of the special magic {what} for {key} is: {sample.answers[0]}."
                for what in ("numbers", "uuids")
                for key in [context.split(f" is: {sample.answers[0]}.")[0].rsplit(" for ", 1)[1]]
                if f"One of the special magic {what} for {key} is: " in context
            )
            before, after = context.split(needle)
            assert sample.depth == pytest.approx(len(before) / (len(before) + len(after)))
            key = needle.split(" for ")[1].split(" is: ")[0]
            assert key in sample.question.rsplit("\n", 1)[1], "the question is about this key"
        else:
            assert sample.depth is None


@pytest.mark.parametrize(
    ("name", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_so_many_needles_and_answers(name: str, needles: int, answers: int) -> None:
    for sample in made(name):
        assert sample.prompt.count("One of the special magic ") == needles
        assert len(set(sample.answers)) == answers


@pytest.mark.parametrize(("name", "keys"), [("niah_multivalue", 1), ("niah_multiquery", 4)])
def test_each_answer_belongs_to_a_key_that_is_asked_for(name: str, keys: int) -> None:
    for sample in made(name, count=8):
        needles = re.findall(r"magic numbers for (\S+) is: (\d{7})\.", sample.question)
        assert {value for _, value in needles} == set(sample.answers)
        named = {key for key, _ in needles}
        assert len(named) == keys
        asked = re.search(r"numbers for (.+) that the text", sample.question.rsplit("\n", 1)[1])
        assert asked
        assert set(re.split(r", and |, ", asked[1])) == named


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_is_nothing_else(name: str) -> None:
    for sample in made(name):
        lines = sample.question.split("\n")[1:-1]
        assert len(lines) > 50
        assert all(line.startswith("One of the special magic ") for line in lines)
        assert len({line.split(" for ")[1].split(" is: ")[0] for line in lines}) == len(lines)


def test_needles_lie_at_all_depths() -> None:
    depths = [sample.depth for sample in made("niah_single_1", count=40)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


@each_task
def test_the_scorer_is_right_and_wrong_where_it_should_be(name: str) -> None:
    task, (sample,) = TASKS[name], made(name, count=1)
    everything = " and ".join(sample.answers)
    assert task.score(f" I think: {everything.upper()}.", sample.answers) == 1
    assert task.score("", sample.answers) == 0
    (other,) = made(name, count=1, seed=1)
    wrong = set(other.answers) - set(sample.answers)
    assert task.score(" and ".join(sorted(wrong)), sample.answers) < 1 / len(sample.answers) + 1e-9


@each_task
def test_a_part_of_the_references_scores_its_fraction_and_all_of_it_in_qa(name: str) -> None:
    """RULER's `string_match_all` and `string_match_part`."""
    references = ("Alpha", "Beta 7", "gamma", "delta")
    for found in range(5):
        output = "they are: " + "; ".join(references[:found]).upper()
        expected = float(found > 0) if name.startswith("qa") else found / 4
        assert TASKS[name].score(output, references) == expected


@pytest.mark.parametrize("answer", [1, 2, 5, 64, 1000])
@pytest.mark.parametrize("guess", [0, 1, 4, 64, 5000])
def test_the_search_finds_the_largest_that_fits(answer: int, guess: int) -> None:
    assert largest(lambda n: n <= answer, 1, guess) == answer


def test_standard_error_of_the_mean() -> None:
    mean, error = mean_and_standard_error([1.0, 0.0, 1.0, 1.0])
    assert mean == 0.75
    assert error == pytest.approx(0.25)
    assert math.isnan(mean_and_standard_error([1.0])[1])
    with pytest.raises(ValueError, match="got none"):
        mean_and_standard_error([])


def test_variables_are_assigned_before_they_are_handed_on() -> None:
    for sample in made("vt"):
        _, _, text = sample.question.split("Follow the variable assignments")
        assignments = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)\.$", text, re.MULTILINE)
        assert [name for name, _ in assignments] == list(sample.answers)
        value = assignments[0][1]
        assert text.rstrip().endswith(f"hold the value {value}?")
        assert [source for _, source in assignments] == [value, *sample.answers[:-1]]
        assert len(sample.answers) == 5


@pytest.mark.parametrize(
    ("length", "often", "seldom"), [(3000, 6, 1), (4096 - 40, 30, 3), (6000, 30, 3)]
)
def test_common_words_are_the_commonest(length: int, often: int, seldom: int) -> None:
    for sample in TASKS["cwe"].samples(TOKENIZERS["words"], length, 2, 0):
        listed = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", sample.question.split("Here is")[-1])
        counts = Counter(listed)
        assert {word: counts[word] for word in sample.answers} == dict.fromkeys(
            sample.answers, often
        )
        assert {counts[word] for word in counts if word not in sample.answers} == {seldom}
        assert len(set(sample.answers)) == 10


def test_a_list_longer_than_the_dictionary_still_has_no_word_twice() -> None:
    words = different_words(len(all_words()) + 100, Draws("any"))
    assert len(set(words)) == len(words)


def test_frequent_words_follow_zipf_behind_the_noise() -> None:
    for sample in made("fwe"):
        text = sample.question.split("come most often. ")[1].split("\nQuestion")[0]
        counts = Counter(text.split()).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == sample.answers
        assert counts[3][1] > counts[4][1], "the third is no tie"
        assert counts[0][1] / counts[1][1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.anchor)
def test_one_passage_answers_each_question(question: Question) -> None:
    source, others = source_and_others(question)
    assert any(answer in source for answer in question.answers)
    assert not any(
        answer.lower() in other.lower() for answer in question.answers for other in others
    )
    assert len(others) > 400, "the answer is no common word"
    assert not any(answer.lower() in question.text.lower() for answer in question.answers)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_the_answer_is_in_one_document(name: str) -> None:
    for sample in made(name, count=6):
        documents = re.split(r"\n\nDocument \d+:\n", sample.question)[1:]
        assert len(documents) > 10
        having = [text for text in documents if TASKS[name].score(text, sample.answers) == 1]
        assert len(having) == 1


def test_linked_questions_take_both_documents() -> None:
    for sample in made("qa_2", count=6):
        person = re.search(r"in which (\w+ \w+) was born", sample.question)
        assert person
        documents = re.split(r"\n\nDocument \d+:\n", sample.question)[1:]
        (about,) = (text for text in documents if text.startswith(person[1]))
        town = re.search(r"born in (\w+) in", about)
        assert town
        assert not TASKS["qa_2"].score(about, sample.answers)
        (answering,) = (text for text in documents if TASKS["qa_2"].score(text, sample.answers))
        assert answering.startswith(f"{town[1]}\n")


def test_documents_longer_than_the_poem_come_again() -> None:
    task = TASKS["qa_1"]
    assert isinstance(task, PoemQuestions)
    _, _, documents = task.documents(1000, Draws("any"))
    assert len(documents) == 1000 > len(set(documents)) > 400


@each_task
def test_the_context_says_what_is_asked_for(name: str) -> None:
    for sample in made(name):
        assert TASKS[name].score(sample.question, sample.answers) == 1


@each_tokenizer
def test_the_stress_tests_needle_lies_in_one_block_at_each_depth_of_the_grid(kind: str) -> None:
    tokenizer, block = TOKENIZERS[kind], {"bytes": 128, "words": 64}[kind]
    length = {"bytes": 6000, "words": 1500}[kind]
    samples = needle_depth_samples(tokenizer, length, block=block)
    assert [sample.depth for sample in samples] == list(DEPTH_GRID)
    for sample in samples:
        value = sample.answers[0]
        needle = re.search(
            rf"One of the special magic numbers for (\S+) is: {value}\.", sample.prompt
        )
        assert needle
        first, last = token_span(tokenizer, sample.prompt, needle[0])
        assert first // block == last // block
        text, decoys = sample.question.split("\n")[1].split(f" Many have asked for {needle[1]}. ")
        before, after = text.split(needle[0])
        off = block / len(tokenizer(text).input_ids)
        assert len(before) / (len(before) + len(after)) == pytest.approx(sample.depth, abs=off)
        assert decoys.count(needle[1]) == 5
        assert value not in decoys
        assert 0.9 * (length - 32) < len(tokenizer(sample.prompt).input_ids) <= length - 32
        assert STRESS_TASKS["needle_depths"].score(f"It is {value}", sample.answers) == 1
        assert STRESS_TASKS["needle_depths"].score("It is 1234567", sample.answers) == 0


@cache
def calibrated() -> set[tuple[str, ...]]:
    return {eight for kind in KINDS for part in PARTS for eight in eights(bundled(kind, part))}


@each_task
def test_nothing_that_is_evaluated_on_is_calibrated_on(name: str) -> None:
    """Not eight words in a row."""
    for sample in made(name):
        assert calibrated().isdisjoint(eights(sample.prompt))


def eights(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[i:] for i in range(8)), strict=False))

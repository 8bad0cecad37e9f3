"""`generate()` gives eager's tokens, on every cache and in every way of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from comparisons import never_skipping
from tiny_models import build, padded, token_ids

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam_search": {"num_beams": 3},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "chunked_prefill": {"prefill_chunk_size": 32},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
}
FAMILIES = ["llama", "mistral", "gemma3", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_generates_eagers_tokens(name: str, mode: str) -> None:
    builder = tiny_models.DECODERS[name]
    if mode == "prompt_lookup":
        ids, mask = token_ids(1, 70), torch.ones(1, 70, dtype=torch.long)
    else:
        ids, mask = padded([70, 41, 58], "left")
    options = {**GREEDY, **MODES[mode], "attention_mask": mask, "disable_compile": True}
    expected = build(builder).generate(ids, **options)
    assert torch.equal(never_skipping(builder).generate(ids, **options), expected)


def test_assisted_decoding_gives_eagers_tokens() -> None:
    ids = token_ids(1, 60)
    options = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    expected = build(tiny_models.llama).generate(ids, **options)
    assistant = never_skipping(tiny_models.llama)
    with torch.no_grad():  # an assistant that is sometimes wrong
        assistant.lm_head.weight += 0.05 * torch.randn_like(assistant.lm_head.weight)
    ours = never_skipping(tiny_models.llama)
    assert torch.equal(ours.generate(ids, assistant_model=assistant, **options), expected)


def test_a_longer_conversation_on_one_cache() -> None:
    def talk(model: Any) -> list[torch.Tensor]:
        cache, ids, answers = None, token_ids(1, 40), []
        for turn in range(3):
            options = {**GREEDY, "attention_mask": torch.ones_like(ids)}
            output = model.generate(
                ids, past_key_values=cache, return_dict_in_generate=True, **options
            )
            cache, answers = output.past_key_values, [*answers, output.sequences]
            ids = torch.cat([output.sequences, token_ids(1, 9, seed=turn)], dim=1)
        return answers

    for ours, eager in zip(
        talk(never_skipping(tiny_models.mistral)), talk(build(tiny_models.mistral)), strict=True
    ):
        assert torch.equal(ours, eager)

"""A tokenizer of single bytes, made on the spot."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*, bos: bool = False) -> Any:
    """A byte is a token; `<eos>` is 0 and, with `bos`, every text starts with `<bos>`, 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<eos>", "<bos>"] if bos else ["<eos>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    names = {"eos_token": "<eos>", "pad_token": "<eos>"}
    if bos:
        names["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

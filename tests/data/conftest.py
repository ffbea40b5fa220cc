"""Tokenizers for the tests: words, a small byte-level BPE trained on the passage, and SmolLM2's where it is on disk."""

import functools
import zlib

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tokeff.data import sources
from tokeff.models.fetch import cache_dir
from tokeff.models.gguf_header import read_header
from tokeff.models.gguf_tokenizer import gguf_tokenizer
from tokeff.models.presets import PRESETS

SMOLLM2 = cache_dir() / PRESETS["smollm2-135m"].member


def words(text):
    """Return one id for each word: the simplest tokenizer there is."""
    return [zlib.crc32(word.encode()) % 50000 for word in text.split()]


@functools.cache
def bpe():
    """Return the encode function of a byte-level BPE of 2000 tokens, made like GPT-2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([sources.text()[:60000]], trainer)
    return lambda text: tokenizer.encode(text).ids


@functools.cache
def smollm2():
    """Return the encode function of SmolLM2's own tokenizer, from the file that `tokeff fetch` put into the cache."""
    header, _ = read_header(SMOLLM2)
    return functools.partial(gguf_tokenizer(header.metadata, SMOLLM2, V=49152).encode, special=False)


ENCODERS = {"words": lambda: words, "bpe": bpe, "smollm2": smollm2}


@pytest.fixture(params=[name for name in ENCODERS if name != "smollm2" or SMOLLM2.exists()])
def encode(request):
    """Return `encode(text) -> list[int]` of one of the tokenizers."""
    return ENCODERS[request.param]()

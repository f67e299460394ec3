"""A small T5 encoder with random weights, and a tokenizer of the data's own words, for runs without the published one.

Random weights keep what conditioning needs: equal words give equal features, different words different ones, and each
feature knows its neighbours.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from magicdrive_core.config import TextBuild

SPACE = "▁"  # T5's mark of a word's beginning
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
SPELLED = -20.0  # log-probability of a single character: words are spelled only where they are not known


def make_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the words and marks of ``captions``; other words are spelled in characters."""
    pieces: Counter[str] = Counter()
    for text in captions:
        for word in text.split():
            first, *rest = re.findall(r"\w+|[^\w\s]", word)
            pieces.update([SPACE + first, *rest])
    total = sum(pieces.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, math.log(count / total)) for piece, count in sorted(pieces.items())]
    vocabulary += [(character, SPELLED) for character in SPACE + CHARACTERS if character not in pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text(build: TextBuild, captions: list[str], folder: Path) -> None:
    """Writes a from_pretrained folder with the model and its tokenizer; the same seed gives the same bytes."""
    tokenizer = make_tokenizer(captions)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=build.width,
        d_kv=build.width // build.heads,
        d_ff=build.feed_forward,
        num_layers=build.layers,
        num_heads=build.heads,
        feed_forward_proj="gated-gelu",  # of t5-v1_1
        dropout_rate=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(build.seed)
        T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

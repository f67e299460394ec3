"""Captions to T5 features, and a small T5 for runs without the published one.

The small encoder has random weights and a tokenizer of the data's own words. Random weights keep what conditioning
needs: equal words give equal features, different words give different ones, and each feature depends on its neighbours.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from magicdrive_core.config.schema import TextBuild
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.bundle import verify_encoder

BUILD_HINT = "`dvc repro encoders` builds the demo's; or put t5-v1_1-xxl there and set text.build to null"
WORD_START = "▁"  # T5's mark of the start of a word
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
SPELLING_LOG_PROBABILITY = -20.0  # so low that only unknown words are spelled in characters


class TextEncoder:
    """A frozen ``T5EncoderModel`` with its tokenizer, in float32; see ``TextEncoder.load``.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.
        max_tokens: tokens to which captions are cut.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, folder: Path | str, max_tokens: int, device: torch.device | str = "cpu") -> TextEncoder:
        """Reads a from_pretrained folder with a model and its tokenizer.

        Args:
            folder: holds config.json, the weights and the tokenizer (spiece.model or tokenizer.json).
            max_tokens: tokens to which captions are cut.
            device: where the model runs.

        Returns:
            The frozen encoder in float32.

        Raises:
            MagicDriveError: the folder holds no readable T5 encoder, or differs from the bundle that it belongs to.
        """
        from transformers import AutoTokenizer, T5EncoderModel  # takes seconds to import

        verify_encoder(Path(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model: Any = T5EncoderModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise MagicDriveError(f"text.path: {folder} holds no readable T5 encoder: {reason}", BUILD_HINT) from None
        return cls(model.to(device), tokenizer, max_tokens)

    @property
    def width(self) -> int:
        """Width D of the features."""
        return int(self.model.config.d_model)

    def count_tokens(self, captions: list[str]) -> int:
        """Counts the tokens of all captions together, after the cut.

        Args:
            captions: texts; each is cut to ``max_tokens`` tokens.

        Returns:
            Number of tokens, end tokens included.
        """
        ids = self.tokenizer(captions, truncation=True, max_length=self.max_tokens).input_ids
        return sum(map(len, ids))

    @torch.no_grad()
    def encode(self, captions: list[str], batch: int = 8) -> list[Tensor]:
        """Encodes captions.

        Captions are cut to ``max_tokens`` tokens. T5 gets them padded on the right, with an attention mask.

        Args:
            captions: texts.
            batch: captions that are encoded at a time.

        Returns:
            Features (l, D) of each caption in float32 on the CPU; l counts the end token but no padding.
        """
        features: list[Tensor] = []
        for start in range(0, len(captions), batch):
            tokens = self.tokenizer(
                captions[start : start + batch],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                padding_side="right",
                return_tensors="pt",
            ).to(self.model.device)
            hidden = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            lengths = tokens.attention_mask.sum(dim=1).tolist()
            features += [row[:length].cpu() for row, length in zip(hidden, lengths, strict=True)]
        return features


def make_tokenizer(captions: list[str]) -> T5Tokenizer:
    """Builds a T5 tokenizer whose pieces are the words and marks of some captions; other words are spelled.

    Args:
        captions: texts whose words become pieces.

    Returns:
        The tokenizer, without T5's extra ids.
    """
    pieces: Counter[str] = Counter()
    for text in captions:
        for word in text.split():
            first, *rest = re.findall(r"\w+|[^\w\s]", word)
            pieces.update([WORD_START + first, *rest])
    total = sum(pieces.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, math.log(count / total)) for piece, count in sorted(pieces.items())]
    unseen = [character for character in WORD_START + CHARACTERS if character not in pieces]
    vocabulary += [(character, SPELLING_LOG_PROBABILITY) for character in unseen]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text_encoder(build: TextBuild, captions: list[str], folder: Path) -> None:
    """Writes a small T5 with random weights and its tokenizer; the same seed gives the same bytes.

    Args:
        build: sizes and seed.
        captions: texts whose words the tokenizer knows.
        folder: from_pretrained folder to write.
    """
    tokenizer = make_tokenizer(captions)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=build.width,
        d_kv=build.width // build.heads,
        d_ff=build.feed_forward,
        num_layers=build.layers,
        num_heads=build.heads,
        feed_forward_proj="gated-gelu",  # as in t5-v1_1
        dropout_rate=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(build.seed)
        T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

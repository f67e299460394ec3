"""T5 features, the small encoder, and that both kinds of folder load by the same call."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from magicdrive_core.config.schema import TextBuild
from magicdrive_core.data.records import CLASSES
from magicdrive_core.encoders.text import TextEncoder, build_text_encoder, make_tokenizer
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import sha256_folder

CAPTIONS = [
    "A driving scene image at singapore-onenorth. Parked truck, construction, turn left, following a van.",
    "A driving scene image at boston-seaport. Night, rain, many peds.",
]
BUILD = TextBuild(width=16, layers=2, heads=4, feed_forward=32, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    build_text_encoder(BUILD, [*CAPTIONS, *CLASSES], folder)
    return folder


def test_known_words_are_single_tokens_and_come_back(folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for caption in CAPTIONS:
        tokens = tokenizer(caption).input_ids
        assert tokenizer.decode(tokens, skip_special_tokens=True) == caption
        assert len(tokens) <= 2 * len(caption.split()) + 4
        assert tokens[-1] == tokenizer.eos_token_id
    assert len(tokenizer("traffic_cone").input_ids) == 2
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(string.ascii_letters + string.digits + string.punctuation, min_size=1), max_size=6))
def test_unknown_words_are_spelled(words) -> None:
    tokenizer = make_tokenizer(CAPTIONS)
    text = " ".join(words).replace("<pad>", "").replace("</s>", "").replace("<unk>", "")
    tokens = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens[:-1]).split() == text.split()


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path) -> None:
    build_text_encoder(BUILD, [*CAPTIONS, *CLASSES], tmp_path / "again")
    build_text_encoder(BUILD.model_copy(update={"seed": 4}), [*CAPTIONS, *CLASSES], tmp_path / "other")
    assert sha256_folder(tmp_path / "again") == sha256_folder(folder)
    assert sha256_folder(tmp_path / "other") != sha256_folder(folder)


def test_features_are_those_of_the_caption_alone(folder) -> None:
    encoder = TextEncoder.load(folder, max_tokens=64)
    together = encoder.encode([*CAPTIONS, "car", ""], batch=3)
    for caption, features in zip([*CAPTIONS, "car", ""], together, strict=True):
        tokens = encoder.tokenizer(caption, return_tensors="pt").input_ids
        expected = encoder.model(input_ids=tokens).last_hidden_state[0]
        assert features.shape == (tokens.shape[1], encoder.width)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_long_captions_are_cut(folder) -> None:
    (features,) = TextEncoder.load(folder, max_tokens=5).encode(CAPTIONS[:1])
    assert features.shape == (5, 16)


def test_a_published_kind_of_folder_loads_by_the_same_call(tmp_path) -> None:
    """t5-v1_1-xxl has a sentencepiece model and no tokenizer.json."""
    model = sentencepiece.SentencePieceTrainer
    model.train(
        sentence_iterator=iter(CAPTIONS * 8),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))
    T5EncoderModel(
        T5Config(vocab_size=200, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    ).save_pretrained(tmp_path)
    encoder = TextEncoder.load(tmp_path, max_tokens=300)
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    for caption, features in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        assert encoder.tokenizer(caption).input_ids == [*pieces.encode(caption), 1]
        assert features.shape == (len(pieces.encode(caption)) + 1, 8)


def test_a_folder_without_t5_is_explained(tmp_path) -> None:
    with pytest.raises(MagicDriveError, match=r"text\.path.*holds no readable T5 encoder") as caught:
        TextEncoder.load(tmp_path / "missing", 300)
    assert "t5-v1_1-xxl" in caught.value.hint

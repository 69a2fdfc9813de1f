"""The demo model's tokenizer: Qwen2's byte-level BPE with a vocabulary of some 600 entries.

Every byte is a token, so any Unicode text tokenises; merges make each word of the scenes, with its leading space, one
token. Pre-tokenisation, normalisation (NFC) and special tokens are Qwen2.5-VL's.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .scenes import COLOUR_WORDS, WORDS

SPECIAL_TOKENS = (  # Qwen2.5-VL's first fourteen added tokens, in its order
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2's split: contractions, words with one leading mark, single digits, punctuation, line ends, spaces.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACED = ("a", "an", "and", "the", "image", *COLOUR_WORDS, *WORDS)  # words after a space
_OPENING = ("user", "Query", "Describe")  # words that open a line of the template
_SPACE = "Ġ"  # how byte-level BPE writes a space


def build_tokenizer() -> Tokenizer:
    """The tokenizer, the same at every call."""
    merges = _merges()
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({entry: k for k, entry in enumerate(entries)}, merges, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def _merges() -> list[tuple[str, str]]:
    """Grow each word from its first character. No two words' merges compete: each starts at the same end."""
    words = [_SPACE + word for word in _SPACED] + list(_OPENING)
    grown = (pair for word in words for pair in pairwise(word[: k + 1] for k in range(len(word))))
    return list(dict.fromkeys((short, long[len(short) :]) for short, long in grown))


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json that makes Hugging Face open it as Qwen2's."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": True} for text in SPECIAL_TOKENS}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

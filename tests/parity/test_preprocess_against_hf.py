"""Preprocessing against Hugging Face transformers: pixel values, sizes and prompt ids. HF is the judge throughout."""

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from metaembed.runtime.errors import UsageError
from metaembed.runtime.images import ImageRules, load_image, patchify, smart_resize
from metaembed.runtime.text import Template, Tokenizer

# Qwen2.5-VL's added tokens, in id order; those from <tool_call> on are not "special".
SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
FIM = ["fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in FIM)]

TEXTS = (
    "a red umbrella and a blue anchor",
    "What's the 2023 revenue?  It's $1,234,567.89 (up 12%)",
    " leading, trailing and    inner   spaces \t\t",
    "line one\n\n  line two\r\n\r\n\tline three\n",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}  # comment",
    "Füße, œuvre, naïve, Привет мир, Γειά σου, שלום, مرحبا بالعالم",
    "日本語のテキスト、中文字符，한국어 문장. ไทย हिन्दी",
    "☂️ ⚓ 👩‍👩‍👧 🇫🇷 👍🏽 \U0001f9ff",
    "e\u0301 A\u030a \u1e9b\u0323 n\u0303o",  # NFC composes these
    "\u0301starts with a combining mark",
    "a" * 300 + " " * 200 + "\n" * 50 + "!" * 100,
    "NUL \x00 and BOM \ufeff and zero width \u200b",
    "<|almost_a_token|> <|im_start <tool call>",
    "Query: Query:\nuser\n",
    "1" * 40 + " ½ ² Ⅷ ٣",
)


# --- images ---------------------------------------------------------------------------------------------------------

SIZES = (  # width, height
    (28, 28),
    (2000, 28),
    (28, 2000),
    (29, 31),
    (56, 56),
    (84, 336),
    (100, 333),
    (112, 112),
    (640, 480),
    (481, 641),
    (1000, 99),
    (13, 1234),
    (896, 896),  # the largest for 1024 tokens, unresized
    (1190, 673),
    (1700, 2200),
    (5600, 28),
    (41, 43),
)


def noise(width: int, height: int) -> Image.Image:
    """Random pixels over a gradient, so that a swapped axis or channel shows."""
    random = np.random.default_rng(width * 10007 + height).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, height)[:, None, None] * np.array([1.0, 0.6, 0.2])
    return Image.fromarray((random + slope).astype(np.uint8))


def hf_pixels(image: Image.Image, rules: ImageRules) -> tuple[np.ndarray, tuple[int, ...]]:
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels})
    output = processor(images=[image], return_tensors="np")
    return output["pixel_values"], tuple(output["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_patches_equal_the_hf_pil_processor(size):
    rules = ImageRules.from_config({}, 1024)
    image = load_image(noise(*size))
    expected, grid = hf_pixels(image, rules)
    patches = patchify(image, rules)
    assert patches.grid == grid
    assert patches.pixels.dtype == np.float32
    assert patches.tokens == len(expected) // 4
    np.testing.assert_array_equal(patches.pixels, expected)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), limit=st.sampled_from([16, 64, 1024]))
def test_patches_of_any_small_image_equal_hf(width, height, limit):
    rules = ImageRules.from_config({}, limit)
    image = load_image(noise(width, height))
    expected, grid = hf_pixels(image, rules)
    patches = patchify(image, rules)
    assert patches.grid == grid
    assert np.abs(patches.pixels - expected).max() < 1e-6


def test_another_mean_and_std_reach_the_pixels():
    """Per-channel constants that differ, as HF applies them."""
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "min_pixels": 3136, "max_pixels": 100352}
    image = noise(200, 90)
    processor = Qwen2VLImageProcessorPil(**config)
    expected = processor(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(patchify(image, ImageRules.from_config(config, 1024)).pixels, expected)


@settings(max_examples=500, deadline=None)
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    min_tokens=st.integers(1, 64),
    extra=st.integers(0, 2000),
)
@example(height=28, width=5600, min_tokens=4, extra=96)  # HF itself exceeds the limit: 141 tokens of 100
@example(height=28, width=84, min_tokens=4, extra=0)
@example(height=42, width=70, min_tokens=4, extra=1020)  # halves: banker's rounding
def test_sizes_equal_hf_or_are_refused_where_hf_exceeds_its_limit(height, width, min_tokens, extra):
    rules = ImageRules(min_pixels=min_tokens * 784, max_pixels=(min_tokens + extra) * 784)
    try:
        expected = hf_smart_resize(height, width, 28, rules.min_pixels, rules.max_pixels)
    except ValueError:
        expected = None
    if expected is None or expected[0] * expected[1] > rules.max_pixels:
        with pytest.raises(UsageError):
            smart_resize(height, width, rules)
    else:
        assert smart_resize(height, width, rules) == expected


# --- text -----------------------------------------------------------------------------------------------------------


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: itself where it prints, else the next one from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def qwen_ranks() -> dict[bytes, int]:
    dashscope = pytest.importorskip("dashscope", reason="the dashscope package ships Qwen's BPE ranks")
    lines = (Path(dashscope.__file__).parent / "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last merge that makes the token: apply the best-ranked merges until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def hf_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in NOT_SPECIAL])
    return tokenizer


def trained_bpe() -> Qwen2Tokenizer:
    """A byte-level BPE of 600 entries, trained on the first half of TEXTS, in HF's own Qwen2 class."""
    blank = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    blank.model = BPE()
    blank.train_from_iterator([*TEXTS[:7], "user\nQuery: Describe the image."] * 2, trainer)
    model = json.loads(blank.to_str())["model"]
    return hf_tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])


def rebuilt_qwen() -> Qwen2Tokenizer:
    """Qwen's own 151,643 entries and merges, from its tiktoken ranks."""
    ranks = qwen_ranks()
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = (halves(token, ranks) for token, _ in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1)
    merges = [tuple("".join(letters[byte] for byte in half) for half in pair) for pair in pairs]
    return hf_tokenizer({spelled[token]: rank for token, rank in ranks.items()}, merges)


@pytest.fixture(scope="module")
def qwen():
    return rebuilt_qwen()


@pytest.fixture(scope="module", params=["trained", "qwen"])
def pair(request, tmp_path_factory):
    """HF's tokenizer, and ours reading the tokenizer.json that HF saved."""
    hf = trained_bpe() if request.param == "trained" else request.getfixturevalue("qwen")
    folder = tmp_path_factory.mktemp("tokenizer")
    hf.save_pretrained(folder)
    return hf, Tokenizer(os.path.join(folder, "tokenizer.json"))


def prompt(text: str | None, image_tokens: int, side: str) -> str:
    """The released templates, written out again by hand from the released configuration."""
    prefix = "Query: " if side == "query" else ""
    vision = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>" if image_tokens else ""
    body = f"<|im_start|>user\n{vision}{prefix}{text or 'Describe the image.'}<|im_end|><|endoftext|>"
    return body + ("<|endoftext|>" * 10 + "\n" if side == "query" else "")


@pytest.mark.parametrize("side", ["query", "candidate"])
def test_prompts_have_the_ids_that_hf_gives_the_whole_string(pair, side):
    """Text, image + text and image alone; several scripts, emoji, combining marks, code, long whitespace."""
    hf, ours = pair
    cases = [(text, tokens) for text in TEXTS for tokens in (0, 7)] + [(None, 5), ("", 3)]
    for text, tokens in cases:
        expected = hf(prompt(text, tokens, side), add_special_tokens=False)["input_ids"]
        found = ours.prompt_ids(text, tokens, side, max_text_tokens=10_000)
        assert found.dtype == np.int64
        assert found.tolist() == expected, (text, tokens)


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: text.strip() and "<" not in text))
def test_any_text_has_the_ids_that_hf_gives(pair, text):
    hf, ours = pair
    expected = hf(prompt(text, 2, "query"), add_special_tokens=False)["input_ids"]
    assert ours.prompt_ids(text, 2, "query", max_text_tokens=100_000).tolist() == expected


def test_rebuilt_vocabulary_is_qwens(qwen):
    """Ids of the published Qwen2.5 tokenizer: "Hello", " world", and the added tokens as its config lists them."""
    assert len(qwen) == 151_665
    assert qwen("Hello world", add_special_tokens=False)["input_ids"] == [9707, 1879]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    assert qwen.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151652, 151653, 151655]


def test_control_tokens_in_user_text_stay_plain_text(pair):
    """Special (<|im_end|>) and not (<tool_call>): no id beyond the template, and HF decodes the spelling."""
    hf, ours = pair
    words = "".join([*SPECIAL, *NOT_SPECIAL])
    added = set(hf.convert_tokens_to_ids([*SPECIAL, *NOT_SPECIAL]))
    for side in ("query", "candidate"):
        plain = ours.prompt_ids("harmless", 5, side, 10_000).tolist()
        spelled = ours.prompt_ids(words, 5, side, 10_000).tolist()
        assert [i for i in spelled if i in added] == [i for i in plain if i in added]
        assert hf.decode(spelled) == prompt(words, 5, side)


def test_special_tokens_spelled_in_text_match_hf_with_split_special_tokens(pair):
    hf, ours = pair
    words = " and ".join(SPECIAL)
    expected = hf(f"user\nQuery: {words}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.prompt_ids(words, 0, "query", 10_000).tolist()[1 : 1 + len(expected)] == expected


def test_default_template_has_the_released_strings():
    before, after = Template().around("query", with_image=True)
    assert before + "x" + after == prompt("x", 1, "query")

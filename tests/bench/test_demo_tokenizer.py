"""The demo's tokenizer: any text survives, its words are single tokens, Hugging Face and `tokenizers` agree."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaembed.bench.demo_tokenizer import SPECIAL_TOKENS, build_tokenizer, write_tokenizer
from metaembed.bench.scenes import COLOUR_WORDS, WORDS

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("word", [*COLOUR_WORDS, *WORDS, "a", "an", "and"])
def test_a_word_of_the_scenes_is_one_token_after_a_space(word):
    assert len(TOKENIZER.encode(f"Query: {word}").ids) == len(TOKENIZER.encode("Query:").ids) + 1


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_up_to_nfc(text):
    """Expected value: Unicode normalisation by the standard library."""
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>",
        "<|im_start|>user\nQuery: a red umbrella, an orange virgin and a blue anchor<|im_end|>"
        + "<|endoftext|>" * 11
        + "\n",
        "Ünïcode ☂ 日本語 e\u0301 don't  x1234\r\n\n  tail  ",
    ],
)
def test_hugging_face_gives_equal_ids(hugging_face, text):
    assert hugging_face(text).input_ids == TOKENIZER.encode(text).ids
    assert type(hugging_face).__name__.startswith("Qwen2Tokenizer")


def test_special_tokens_follow_the_bytes_and_merges_in_qwens_order():
    """Qwen2.5-VL's order, from its added_tokens.json: <|endoftext|> 151643 up to <|video_pad|> 151656."""
    ids = [TOKENIZER.token_to_id(text) for text in SPECIAL_TOKENS]
    assert ids == list(range(TOKENIZER.get_vocab_size() - 14, TOKENIZER.get_vocab_size()))
    assert (SPECIAL_TOKENS[0], SPECIAL_TOKENS[9], SPECIAL_TOKENS[12]) == (
        "<|endoftext|>",
        "<|vision_start|>",
        "<|image_pad|>",
    )

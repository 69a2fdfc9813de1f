"""Prompts from texts: structure, limits and refusals. Id parity with HF is in tests/parity."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.text import Template, Tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SPELLINGS = (*CONTROL, "<tool_call>")


def build(special: tuple[str, ...] = CONTROL) -> tokenizers.Tokenizer:
    """One token per byte (256 of them), words split at spaces; then the control tokens and one ordinary added token."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    full = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    full.normalizer, full.decoder = normalizers.NFC(), decoders.ByteLevel()
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    full.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return full


@pytest.fixture
def folder(tmp_path):
    build().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    return Tokenizer(folder / "tokenizer.json")


def spell(ids: np.ndarray) -> str:
    return build().decode(ids.tolist(), skip_special_tokens=False)


def test_the_released_templates_come_out_whole(tokenizer):
    """Expected: the released strings, typed out; one token per byte, so decoding shows everything."""
    end = "<|endoftext|>" * 11 + "\n"
    assert spell(tokenizer.prompt_ids("hi", 0, "query", 9)) == f"<|im_start|>user\nQuery: hi<|im_end|>{end}"
    assert spell(tokenizer.prompt_ids("hi", 0, "candidate", 9)) == "<|im_start|>user\nhi<|im_end|><|endoftext|>"
    pads = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
    assert spell(tokenizer.prompt_ids("hi", 3, "query", 9)) == f"<|im_start|>user\n{pads}Query: hi<|im_end|>{end}"
    alone = f"<|im_start|>user\n{pads}Describe the image.<|im_end|><|endoftext|>"
    for blank in (None, "", " \n\t"):
        assert spell(tokenizer.prompt_ids(blank, 3, "candidate", 1)) == alone


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_control_tokens_in_text_change_no_structure(tokenizer, spelling, side):
    """Expected: as many bytes more as the spelling has, and not one control id more."""
    plain, spelled = (tokenizer.prompt_ids(text, 4, side, 99).tolist() for text in ("x", f"x{spelling}"))
    assert len(spelled) == len(plain) + len(spelling)
    assert [i for i in spelled if i >= 256] == [i for i in plain if i >= 256]


def test_long_text_is_cut_and_the_loss_is_logged_once(tokenizer, caplog):
    """One token per byte: 7 of 20 letters stay, before the same ending; the prefix does not count."""
    for side in ("query", "candidate"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "metaembed"):
            cut = tokenizer.prompt_ids("abcdefghijklmnopqrst", 0, side, 7)
        assert [record.getMessage() for record in caplog.records] == [
            "text of 20 tokens cut to 7, the last 13 are not read: 'abcdefghijklmnopqrst'"
        ]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "metaembed"):
            assert cut.tolist() == tokenizer.prompt_ids("abcdefg", 0, side, 7).tolist()
        assert not caplog.records


def test_truncation_and_padding_saved_in_the_file_are_not_obeyed(folder):
    """A tokenizer.json keeps the settings of whoever saved it; they would shorten prompts silently."""
    full = build()
    full.enable_truncation(4)
    full.enable_padding(length=64)
    full.save(str(folder / "limited.json"))
    found, expected = (
        Tokenizer(folder / name).prompt_ids("some longer text", 0, "query", 99)
        for name in ("limited.json", "tokenizer.json")
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("text", [None, "", "   ", "\n\t "])
def test_nothing_at_all_is_refused(tokenizer, text):
    with pytest.raises(UsageError, match="empty text"):
        tokenizer.prompt_ids(text, 0, "query", 9)


@pytest.mark.parametrize("text", ["half \ud83d an emoji", "\udc00", b"bytes", 7, ["list"]])
def test_what_is_no_text_is_one_sentence(tokenizer, text):
    with pytest.raises(UsageError, match=r"valid Unicode|is a string"):
        tokenizer.prompt_ids(text, 0, "query", 9)


@pytest.mark.parametrize("arguments", [("x", -1, "query", 9), ("x", 0, "query", 0), ("x", 0, "document", 9)])
def test_impossible_requests_are_refused(tokenizer, arguments):
    with pytest.raises(UsageError):
        tokenizer.prompt_ids(*arguments)


def test_nul_and_a_very_long_text_are_read(tokenizer):
    assert "a\0b" in spell(tokenizer.prompt_ids("a\0b", 0, "candidate", 9))
    assert len(tokenizer.prompt_ids("a" * 1_000_000, 0, "candidate", 5)) == 3 + len("user\n") + 5


def test_threads_get_what_one_caller_gets(tokenizer):
    texts = [f"{word} {n}" for n in range(60) for word in SPELLINGS]
    expected = [tokenizer.prompt_ids(text, 2, "query", 50).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: tokenizer.prompt_ids(text, 2, "query", 50).tolist(), texts))
    assert found == expected


def test_ids_for_the_language_model_are_at_hand(tokenizer):
    """256 bytes, then the control tokens in order, then <tool_call>."""
    assert (tokenizer.pad_id, tokenizer.image_id, tokenizer.size) == (256, 261, 263)


@pytest.mark.parametrize("missing", CONTROL)
def test_a_tokenizer_without_a_needed_token_is_refused(tmp_path, missing):
    build(tuple(name for name in CONTROL if name != missing)).save(str(tmp_path / "t.json"))
    with pytest.raises(BundleError, match="lacks") as caught:
        Tokenizer(tmp_path / "t.json")
    assert missing in str(caught.value)


def test_a_tokenizer_whose_model_can_spell_a_control_token_is_refused(tmp_path):
    """A word-level model with <tool_call> among its words: hiding the added tokens would not help there."""
    full = tokenizers.Tokenizer(models.WordLevel({"user": 0, "<tool_call>": 1}, unk_token="user"))
    full.add_special_tokens([*CONTROL, "<tool_call>"])
    full.save(str(tmp_path / "t.json"))
    with pytest.raises(BundleError, match="plain text"):
        Tokenizer(tmp_path / "t.json")


def test_damaged_tokenizer_files_are_refused(folder):
    whole = (folder / "tokenizer.json").read_bytes()
    for data in (b"", b"{}", whole[:-40], b"\xff\xfe"):
        (folder / "bad.json").write_bytes(data)
        with pytest.raises(BundleError, match=r"bad\.json"):
            Tokenizer(folder / "bad.json")
    for path in (folder / "missing.json", folder):
        with pytest.raises(BundleError):
            Tokenizer(path)


def test_a_template_survives_a_json_file():
    template = Template(query_prefix="Find: ", query_suffix="")
    assert Template.from_json(json.loads(json.dumps(template.to_json()))) == template
    for damaged in (None, {}, {**template.to_json(), "new": ""}, {**template.to_json(), "text": 7}):
        with pytest.raises(BundleError, match="template"):
            Template.from_json(damaged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", "no marker"),
        ("text", "{text}{text}"),
        ("text", "<|image_pad|>{text}"),
        ("image", "{text}"),
        ("image_alone", " "),
    ],
)
def test_templates_that_cannot_hold_an_item_are_refused(field, value):
    with pytest.raises(BundleError, match="template"):
        Template(**{field: value})


def test_another_template_is_obeyed_and_checked(folder):
    """Braces and format characters in the user's text are text."""
    short = Tokenizer(folder / "tokenizer.json", Template(text="<|im_start|>{text}<|im_end|>", query_suffix="!"))
    assert spell(short.prompt_ids("{text} %s {}", 0, "query", 99)) == "<|im_start|>Query: {text} %s {}<|im_end|>!"
    with pytest.raises(BundleError, match="control token"):
        Tokenizer(folder / "tokenizer.json", Template(text="<|im_start|>{text} please<|im_end|>"))


def test_the_largest_id_may_be_of_the_model_or_added(folder, tokenizer):
    """Counted by hand: 256 bytes from 0, seven added tokens after them; then a model whose last byte has id 999."""
    assert tokenizer.largest_id() == ("<tool_call>", 262)
    content = json.loads((folder / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 999
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(folder / "tokenizer.json").largest_id() == (last, 999)

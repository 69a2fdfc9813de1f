"""From a text, an image or both to the token ids of the prompt that the released MetaEmbed recipe asks for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import tokenizers

from .errors import BundleError, UsageError

log = logging.getLogger(__name__)
Side = Literal["query", "candidate"]
IMAGE_TOKEN = "<|image_pad|>"
PAD_TOKEN = "<|endoftext|>"
SHOWN = 40  # characters of a text in a warning
CONTROL = re.compile(r"(<\|\w+\|>)")  # how a template writes a control token


@dataclass(frozen=True, kw_only=True)
class Template:
    """The prompt as data; the defaults are the released configuration (``use_simple_prompt``).

    ``{text}`` marks where prefix and user text go; an image alone carries ``image_alone`` as its text.

    Raises:
        BundleError: a field is not a string, or a marker is missing or repeated.
    """

    text: str = "<|im_start|>user\n{text}<|im_end|><|endoftext|>"
    image: str = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|><|endoftext|>"
    image_alone: str = "Describe the image."
    query_prefix: str = "Query: "
    candidate_prefix: str = ""
    query_suffix: str = "<|endoftext|>" * 10 + "\n"
    candidate_suffix: str = ""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str):
                raise BundleError(f"the template's {name} {value!r} is not a string")
        for name, images in (("text", 0), ("image", 1)):
            form: str = getattr(self, name)
            if form.count("{text}") != 1 or form.count(IMAGE_TOKEN) != images:
                raise BundleError(
                    f"the template's {name} needs {{text}} once and {IMAGE_TOKEN} {images} times: {form!r}"
                )
        if not self.image_alone.strip():
            raise BundleError("the template's image_alone is empty")

    def around(self, side: Side, *, with_image: bool) -> tuple[str, str]:
        """What stands before and after the user's text."""
        before, after = (self.image if with_image else self.text).split("{text}")
        if side == "query":
            return before + self.query_prefix, after + self.query_suffix
        return before + self.candidate_prefix, after + self.candidate_suffix

    def to_json(self) -> dict[str, str]:
        """Plain data for bundle.json; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Template:
        """Read what ``to_json`` wrote; missing or unknown fields (another version's) are a BundleError."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != names:
            raise BundleError(f"the template does not hold exactly {', '.join(sorted(names))}; export the model again")
        return cls(**data)


class _Frame(NamedTuple):
    """A template in ids. ``lead`` is plain text and is encoded with the user's, which its tokens may join."""

    before: list[int]
    lead: str
    after: list[int]


class Tokenizer:
    """The checkpoint's tokenizer.json and a template; turns one item into the ids of its prompt.

    User text is plain text, always. The tokenizer that reads it has the same model, normaliser and pre-tokeniser but
    knows no added token at all: neither the special ones (``<|im_end|>``) nor the others (``<tool_call>``) can be
    spelled. Nothing is switched per call, so one Tokenizer may serve several threads.

    Raises:
        BundleError: the file is missing or damaged, lacks a token of the template, or its model itself turns the
            spelling of an added token into that token.
    """

    def __init__(self, path: str | os.PathLike[str], template: Template | None = None) -> None:
        full = _read(Path(path))
        self.template = template or Template()
        self._control: dict[str, int] = {token.content: i for i, token in full.get_added_tokens_decoder().items()}
        self._plain = _without_added_tokens(full)
        self._check_plain(path)
        self.image_id, self.pad_id = self._control_ids((IMAGE_TOKEN, PAD_TOKEN))
        self.size: int = full.get_vocab_size(with_added_tokens=True)
        self._frames = {(side, image): self._frame(side, image) for side in get_args(Side) for image in (False, True)}

    def largest_id(self) -> tuple[str, int]:
        """The token with the largest id, added ones included, and that id."""
        return max({**self._plain.get_vocab(), **self._control}.items(), key=lambda item: item[1])

    def prompt_ids(
        self, text: str | None, image_tokens: int, side: Side, max_text_tokens: int
    ) -> npt.NDArray[np.int64]:
        """The ids [t] of one item's prompt, without Meta Tokens; ``<|image_pad|>`` stands image_tokens times.

        ``image_tokens`` is 0 for text alone. Empty or blank text beside an image means the image alone. Text of more
        than max_text_tokens tokens is cut there (the template's end stays) and a warning is logged.

        Raises:
            UsageError: no text and no image, a text that is not valid Unicode, or a limit below 1.
        """
        if side not in get_args(Side):
            raise UsageError(f"side {side!r} is not one of {', '.join(get_args(Side))}")
        if image_tokens < 0 or max_text_tokens < 1:
            raise UsageError(f"{image_tokens} image tokens and at most {max_text_tokens} text tokens make no prompt")
        frame = self._frames[side, image_tokens > 0]
        if _is_blank(text):
            if not image_tokens:
                raise UsageError("empty text: give a text, an image, or both")
            middle = self._encode(frame.lead + self.template.image_alone).ids
        else:
            middle = self._user_ids(frame.lead, text or "", max_text_tokens)
        ids = np.array([*frame.before, *middle, *frame.after], np.int64)
        return np.repeat(ids, np.where(ids == self.image_id, image_tokens, 1))

    def _user_ids(self, lead: str, text: str, limit: int) -> list[int]:
        encoding = self._encode(lead + text)
        # A token is the user's as soon as it holds one character of theirs: the space of "Query: " joins their word.
        first = sum(end <= len(lead) for _, end in encoding.offsets)
        surplus = len(encoding.ids) - first - limit
        if surplus > 0:
            start = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
            log.warning(
                "text of %d tokens cut to %d, the last %d are not read: %r", limit + surplus, limit, surplus, start
            )
        ids: list[int] = encoding.ids[: first + limit]
        return ids

    def _encode(self, text: str) -> Any:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # a str with a lone surrogate has no UTF-8
            raise UsageError("the text holds half a surrogate pair, which is not valid Unicode") from None

    def _frame(self, side: Side, with_image: bool) -> _Frame:
        before, after = (CONTROL.split(part) for part in self.template.around(side, with_image=with_image))
        if after[0]:
            raise BundleError(
                f"the template continues with {after[0]!r} after the user's text; a control token must come first"
            )
        return _Frame(self._ids(before[:-1]), before[-1], self._ids(after))

    def _ids(self, segments: list[str]) -> list[int]:
        ids: list[int] = []
        for i, segment in enumerate(segments):  # plain text and control tokens by turns
            ids += self._control_ids([segment]) if i % 2 else self._encode(segment).ids
        return ids

    def _control_ids(self, names: Iterable[str]) -> list[int]:
        missing = [name for name in names if name not in self._control]
        if missing:
            raise BundleError(f"the tokenizer lacks {', '.join(missing)}; it is not Qwen2.5-VL's")
        return [self._control[name] for name in names]

    def _check_plain(self, path: str | os.PathLike[str]) -> None:
        ids = set(self._control.values())
        for name in self._control:
            if ids.intersection(self._encode(name).ids):
                raise BundleError(f"the tokenizer {path} reads the plain text {name!r} as a control token")


def _is_blank(text: str | None) -> bool:
    if text is not None and not isinstance(text, str):
        raise UsageError(f"a text is a string, not {type(text).__name__}")
    return not (text or "").strip()


def _read(path: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"the tokenizer {path} cannot be read: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception for damaged JSON
        raise BundleError(f"{path} is not a tokenizer.json that this version of tokenizers reads: {error}") from error


def _without_added_tokens(full: Any) -> Any:
    """The same pipeline with no added token, truncation, padding or post-processor."""
    plain = tokenizers.Tokenizer(full.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(full, part) is not None:
            setattr(plain, part, getattr(full, part))
    return plain

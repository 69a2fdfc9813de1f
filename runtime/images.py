"""From an image file to the patches that Qwen2.5-VL's vision encoder reads, with Pillow and numpy alone."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import BundleError, MetaEmbedError, UsageError

# The released recipe stretches a shorter side to this before Qwen's own resizing.
MIN_SIDE = 28
MAX_ASPECT = 200
# What the exported graphs and Qwen's processor share; a checkpoint that says otherwise needs another graph.
SUPPORTED = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": int(Image.Resampling.BICUBIC),
}
_FILTERS = threading.Lock()  # warning filters are the process's: two threads would each restore the other's
# The defaults of transformers' Qwen2VLImageProcessor, for keys that a preprocessor_config.json leaves out.
DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
DEFAULT_MEAN = (0.48145466, 0.4578275, 0.40821073)
DEFAULT_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """How images become patches: sizes in pixels, ``mean`` and ``std`` per channel (R, G, B) of values in 0..1.

    Raises:
        BundleError: a value that the exported graphs do not support, or that makes no sense.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float] = DEFAULT_MEAN
    std: tuple[float, float, float] = DEFAULT_STD

    def __post_init__(self) -> None:
        _check_supported(asdict(self))
        limits = (self.min_pixels, self.max_pixels)
        if not all(type(limit) is int for limit in limits) or not 1 <= self.min_pixels <= self.max_pixels:
            raise BundleError(
                f"the image processor's min_pixels and max_pixels are {limits[0]!r} and {limits[1]!r}; "
                "whole numbers with 1 <= min_pixels <= max_pixels are needed"
            )
        if self.max_tokens < 1:
            raise BundleError(f"the image processor's max_pixels {self.max_pixels} is below one image token")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise BundleError(f"the image processor's std {list(self.std)} must be above zero")

    @property
    def unit(self) -> int:
        """Side in pixels of the square that becomes one image token."""
        return self.patch_size * self.merge_size

    @property
    def max_tokens(self) -> int:
        """The most image tokens that one image may become."""
        return self.max_pixels // self.unit**2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], max_image_tokens: int) -> ImageRules:
        """Read Hugging Face's image processor settings (both spellings of the limits) and cap them at max_image_tokens.

        Raises:
            BundleError: the config asks for something that this version does not do.
            UsageError: max_image_tokens is below the smallest image of the checkpoint.
        """
        _check_supported(config)
        size = config.get("size") or DEFAULT_SIZE
        if not isinstance(size, Mapping):
            raise BundleError(f"the image processor's size {size!r} is not an object with shortest_edge, longest_edge")
        rules = cls(  # the older spelling wins where both are present, as in transformers
            min_pixels=config.get("min_pixels") or size.get("shortest_edge", 0),
            max_pixels=config.get("max_pixels") or size.get("longest_edge", 0),
            mean=config.get("image_mean") or DEFAULT_MEAN,
            std=config.get("image_std") or DEFAULT_STD,
        )
        return rules.capped(max_image_tokens)

    def capped(self, max_image_tokens: int) -> ImageRules:
        """The same rules with at most max_image_tokens per image; a UsageError when no image could keep to that."""
        limit = max_image_tokens * self.unit**2
        if limit < self.min_pixels:
            smallest = math.ceil(self.min_pixels / self.unit**2)
            raise UsageError(f"at most {max_image_tokens} image tokens were asked for; this model needs {smallest}")
        return ImageRules(**{**asdict(self), "max_pixels": min(self.max_pixels, limit)})

    def to_json(self) -> dict[str, Any]:
        """Plain data for processor.json; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ImageRules:
        """Read what ``to_json`` wrote; missing or unknown fields are a BundleError."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != names:
            raise BundleError(
                f"processor.json does not hold exactly {', '.join(sorted(names))}; export the model again"
            )
        return cls(**data)


@dataclass(frozen=True, eq=False)
class Patches:
    """One image, cut up: ``pixels`` float32 [p, 1176], ``grid`` (temporal, height, width) in patches.

    Rows follow the 2x2 blocks that become one image token: block by block in raster order, raster order within a
    block. A row is (channel, temporal, y, x). The layout is that of ``pixel_values`` in transformers.
    """

    pixels: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    merge_size: int = 2

    @property
    def tokens(self) -> int:
        """How many image tokens (merged 2x2 patches) the language model will see."""
        return math.prod(self.grid) // self.merge_size**2


def smart_resize(height: int, width: int, rules: ImageRules) -> tuple[int, int]:
    """The (height, width) in pixels that Qwen gives an image: multiples of 28 within the limits, aspect kept.

    Equal to ``smart_resize`` of transformers, except that it never exceeds ``max_tokens``: where rounding would
    (strips, and then only for limits below 200 tokens), the image is refused.

    Raises:
        UsageError: the sides differ by more than 200 times, or the image cannot keep to ``max_tokens``.
    """
    _check_aspect(height, width, "the image")
    rows, columns = round(height / rules.unit), round(width / rules.unit)
    pixels = rows * columns * rules.unit**2
    if pixels > rules.max_pixels:
        shrink = math.sqrt(height * width / rules.max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / rules.unit)) for side in (height, width))
    elif pixels < rules.min_pixels:
        grow = math.sqrt(rules.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / rules.unit) for side in (height, width))
    if rows * columns > rules.max_tokens:
        raise UsageError(
            f"an image of {width}x{height} pixels needs {rows * columns} image tokens; "
            f"the limit is {rules.max_tokens}: crop it, or export with a larger one"
        )
    return rows * rules.unit, columns * rules.unit


def _open(path: Path) -> Image.Image:
    """Pillow warns of images from 89 megapixels on, and refuses those of twice that; so do we, in a sentence."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Read a file (or take a PIL image) as upright 8-bit RGB, both sides at least 28 pixels.

    EXIF orientation is applied, transparency is laid on white (a page), 16-bit grey keeps its upper 8 bits, and of an
    animation the first frame is read. A PIL image is not changed.

    Raises:
        UsageError: not a readable image, too large (twice Pillow's ``Image.MAX_IMAGE_PIXELS``), or too long and
            thin; the sentence names the file.
    """
    if isinstance(source, Image.Image):
        with _one_sentence("the PIL image"):
            return _stretch(_rgb_on_white(_upright(source)), "the PIL image")
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(f"an image is a path or a PIL image, not {type(source).__name__}")
    path = Path(source)
    if not os.path.isfile(path):  # False for a name too long, where Path.is_file raises
        raise UsageError(f"{path} is {_what_is_there(path)}; an image file is needed")
    with _one_sentence(str(path)), _open(path) as image:
        if image.format == "EPS":  # Pillow would start Ghostscript on it
            raise UsageError(f"{path} is PostScript; convert it to PNG or JPEG first")
        return _stretch(_rgb_on_white(_upright(image)), str(path))


def _what_is_there(path: Path) -> str:
    """What is no file."""
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path):
        return "no file but a pipe, a socket or a device"
    return "a broken link" if os.path.islink(path) else "missing"


def patchify(image: Image.Image, rules: ImageRules) -> Patches:
    """Resize (bicubic), normalise and cut an RGB image, bit for bit as transformers' PIL image processor does.

    Raises:
        UsageError: the image is not RGB, or ``smart_resize`` refuses its size.
    """
    if image.mode != "RGB":
        raise UsageError(f"patches are cut from RGB images, not {image.mode}; read the image with load_image")
    height, width = smart_resize(image.height, image.width, rules)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // rules.patch_size, width // rules.patch_size
    merge, side = rules.merge_size, rules.patch_size
    blocks = np.asarray(image).reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
    # Reorder the bytes and only then widen them to float32: a quarter of the traffic.
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, side**2)
    pixels = np.empty((rows * columns, 3, rules.temporal_patch_size, side**2), np.float32)
    for channel, values in enumerate(_normalised_levels(rules)):
        pixels[:, channel] = values[patches[:, channel]]  # a still image fills both temporal slots
    return Patches(pixels.reshape(rows * columns, -1), (1, rows, columns), merge)


def _normalised_levels(rules: ImageRules) -> npt.NDArray[np.float32]:
    """The value of each channel's 256 levels, [3, 256], rounded where transformers rounds."""
    levels = (np.arange(256, dtype=np.float64) * SUPPORTED["rescale_factor"]).astype(np.float32)
    mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (rules.mean, rules.std))
    return np.asarray((levels - mean) / std)


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except (MetaEmbedError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(f"{name} has more pixels than is safe to decode; shrink it") from error
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is not an image that can be read here") from error
    # On damaged files Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        raise UsageError(f"{name} cannot be read as an image: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # some formats keep EXIF behind the pixels
    try:
        turned = image.getexif().get(0x0112, 1) != 1
    except Exception:  # a damaged EXIF block says nothing about the picture
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white in some versions
        image = _grey_on_white(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_on_white(image: Image.Image) -> Image.Image:
    """The upper 8 bits of 16-bit grey; the one value that a PNG may call transparent is white."""
    if image.format == "TIFF" and image.mode == "I":
        raise ValueError("it holds 32-bit integer pixels; save it with 8 bits per channel")
    values = np.asarray(image)
    grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _stretch(image: Image.Image, name: str) -> Image.Image:
    if not min(image.size):
        raise UsageError(f"{name} has no pixels")
    width, height = (max(side, MIN_SIDE) for side in image.size)
    _check_aspect(height, width, name)  # first, or one line of 80 million pixels would become 28
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _check_aspect(height: int, width: int, name: str) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UsageError(f"{name}, {width}x{height} pixels, is more than {MAX_ASPECT} times as long as wide; crop it")


def _check_supported(config: Mapping[str, Any]) -> None:
    for name, supported in SUPPORTED.items():
        if config.get(name, supported) not in (supported, None):
            raise BundleError(f"the image processor has {name} {config[name]!r}; only {supported} is supported")


def _three_numbers(name: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        raise BundleError(f"the image processor's {name} {values!r} is not three numbers") from None
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise BundleError(f"the image processor's {name} {values!r} is not finite")
    return red, green, blue

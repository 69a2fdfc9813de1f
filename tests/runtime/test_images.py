"""Reading real image files of every kind, and the rules. Pixel parity with HF is in tests/parity."""

import json
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.images import ImageRules, load_image, patchify, smart_resize

WRITABLE = {
    "png": ("RGB", "L", "P", "1"),
    "jpg": ("RGB", "L", "CMYK"),
    "tiff": ("RGB", "CMYK"),
    "webp": ("RGB",),
    "gif": ("P",),
    "bmp": ("RGB",),
    "ppm": ("RGB",),
}
RULES = ImageRules(min_pixels=4 * 784, max_pixels=64 * 784)


def ramp(mode: str, width: int = 40, height: int = 30) -> Image.Image:
    """Distinct in x, y and channel."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 6, y * 8, (x + y) * 3], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(f"a.{kind}", mode) for kind, modes in WRITABLE.items() for mode in modes],
)
def test_opaque_files_read_as_pillow_converts_them(tmp_path, name, mode):
    """Expected: Pillow's own conversion to RGB."""
    path = tmp_path / name
    ramp(mode).save(path)
    with Image.open(path) as expected:
        np.testing.assert_array_equal(load_image(path), expected.convert("RGB"))
    assert load_image(str(path)).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    """Expected: alpha * colour + (1 - alpha) * 255 in float64, within the rounding of 8 bits."""
    image = ramp("RGB").convert(mode)
    image.putalpha(Image.fromarray(np.mgrid[:30, :40][1].astype(np.uint8) * 6))
    image.save(tmp_path / "a.png")
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    for source in (image, tmp_path / "a.png"):
        assert np.abs(np.asarray(load_image(source), np.float64) - expected).max() <= 1
    assert image.mode == mode  # the caller's image is not changed


def test_transparent_palette_colour_becomes_white(tmp_path):
    """Hand-made: index 0 is red but transparent, index 1 is blue."""
    image = Image.new("P", (40, 30), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 30))
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, transparency=0)
        found = np.asarray(load_image(tmp_path / name))
        assert (found[:, :20] == 255).all()
        assert (found[:, 20:] == (0, 0, 255)).all()


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path):
    """Expected: value // 256, by hand; Pillow's own conversion may clip everything to white."""
    values = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        found = np.asarray(load_image(tmp_path / name))
        np.testing.assert_array_equal(found, np.repeat((values // 256)[..., None], 3, axis=2))


def test_the_transparent_value_of_sixteen_bit_grey_becomes_white(tmp_path):
    """PNG: one 16-bit value is transparent, and another of the same upper byte is not."""
    values = np.full((30, 40), 1000, np.uint16)
    values[:, 20:] = 1001
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    found = np.asarray(load_image(tmp_path / "a.png"))
    assert (found[:, :20] == 255).all()
    assert (found[:, 20:] == 1001 // 256).all()


def test_threads_that_read_images_leave_the_warning_filters_as_they_were(tmp_path):
    """Found in review: each thread restored what another had set, and Pillow's warning stayed off for good."""
    ramp("RGB").save(tmp_path / "a.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_image, [tmp_path / "a.png"] * 500))
    assert warnings.filters == before


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    """Expected by the EXIF table: where the stored top-left corner (red) must appear."""
    stored = Image.new("RGB", (64, 48), "white")
    stored.paste("red", (0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, quality=95)
    found = np.asarray(load_image(tmp_path / name)).astype(int)
    top, left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}[orientation]
    assert found.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    assert np.abs(found[0 if top else -1, 0 if left else -1] - (255, 0, 0)).max() < 30
    assert np.abs(found[-1 if top else 0, -1 if left else 0] - 255).max() < 30


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("lime", "red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (np.asarray(load_image(tmp_path / name)) == (0, 255, 0)).all()


@pytest.mark.parametrize(("size", "expected"), [((1, 2000), (28, 2000)), ((300, 5), (300, 28)), ((3, 4), (28, 28))])
def test_only_a_side_below_28_is_stretched(size, expected):
    image = load_image(ramp("RGB", *size))
    assert image.size == expected
    np.testing.assert_array_equal(image, ramp("RGB", *size).resize(expected, Image.Resampling.BICUBIC))


def damaged_files(folder):
    png = folder / "whole.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 70, 3), np.uint8)).save(png)
    data = png.read_bytes()
    jpeg = folder / "whole.jpg"
    ramp("RGB", 300, 200).save(jpeg)
    header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = data[:12] + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    return {
        "cut.png": data[: len(data) // 2],
        "cut.jpg": jpeg.read_bytes()[:900],
        "flipped.png": data[:60] + bytes(255 - byte for byte in data[60:200]) + data[200:],
        "empty.png": b"",
        "text.png": b"this is not an image",
        "bomb.png": bomb,
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
    }


def test_unreadable_sources_are_one_sentence_that_names_the_file(tmp_path):
    sources = [tmp_path / "missing.png", tmp_path, "a\0b"]
    for name, data in damaged_files(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        sources.append(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")  # opening one would wait for ever
    for source in [*sources, tmp_path / "pipe"]:
        with pytest.raises(UsageError) as caught:
            load_image(source)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_file_is_called_what_it_is(tmp_path):
    """A pipe that is there was called missing."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "to a pipe").symlink_to("pipe")
    said = {"folder": "a folder", "pipe": "no file but a pipe, ", "broken": "a broken link",
            "to a pipe": "no file but a pipe, ", "nowhere": "missing"}  # fmt: skip
    for name, what in said.items():
        with pytest.raises(UsageError, match=f"/{name} is {what}"):
            load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("script.png", "PostScript"), ("bomb.png", "more pixels than is safe"), ("cut.jpg", "truncated")],
)
def test_the_sentence_gives_the_reason(tmp_path, name, reason):
    """PostScript must be refused for itself, not because Ghostscript happens to be missing."""
    (tmp_path / name).write_bytes(damaged_files(tmp_path)[name])
    with pytest.raises(UsageError, match=reason):
        load_image(tmp_path / name)


@pytest.mark.parametrize("source", [None, 7, b"bytes", np.zeros((9, 9, 3), np.uint8)])
def test_other_types_are_refused(source):
    with pytest.raises(UsageError, match="path or a PIL image"):
        load_image(source)


def test_strange_pil_images_are_refused():
    closed = ramp("RGB")
    closed.close()
    for image in (Image.new("RGB", (0, 9)), Image.new("F", (40, 30)), closed):
        with pytest.raises(UsageError, match="PIL image"):
            load_image(image)


def test_a_thin_line_is_refused_before_it_is_stretched():
    """28 times 20 million pixels would be half a gigabyte and more."""
    with pytest.raises(UsageError, match="200 times"):
        load_image(Image.new("L", (20_000_000, 1)))
    with pytest.raises(UsageError, match="200 times"):
        smart_resize(28, 5601, RULES)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path):
    for n, exif in enumerate((b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03")):
        ramp("RGB").save(tmp_path / f"{n}.jpg", exif=exif)
        assert load_image(tmp_path / f"{n}.jpg").size == (40, 30)


def test_patch_rows_go_block_by_block_and_repeat_in_time():
    """Hand count: a 56x84 picture of one colour per patch; row = 2x2 block in raster order, then inside the block."""
    rules = ImageRules(min_pixels=784, max_pixels=64 * 784, mean=(0, 0, 0), std=(1, 1, 1))
    colours = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)
    picture = np.repeat(np.repeat(colours, 14, axis=0), 14, axis=1)
    patches = patchify(Image.fromarray(np.stack([picture, picture + 30, picture + 60], axis=-1)), rules)
    assert patches.grid == (1, 4, 6)
    assert patches.tokens == 6
    rows = np.rint(patches.pixels.reshape(24, 3, 2, 196) * 255).astype(int)
    order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    expected = np.array(order)[:, None, None, None] + np.array([0, 30, 60])[:, None, None]
    np.testing.assert_array_equal(rows, np.broadcast_to(expected, rows.shape))


def test_patchify_takes_rgb_only():
    with pytest.raises(UsageError, match="RGB"):
        patchify(ramp("L"), RULES)


def test_both_spellings_of_the_limits_are_read_and_capped():
    old = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "size": {"longest_edge": 5}}
    new = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "min_pixels": None, "max_pixels": None}
    for config in (old, new):
        rules = ImageRules.from_config(config, 1024)
        assert (rules.min_pixels, rules.max_pixels, rules.max_tokens) == (3136, 1024 * 784, 1024)
    assert ImageRules.from_config(new, 10**6).max_pixels == 12845056
    assert ImageRules.from_config({}, 10**6).max_tokens == 1280


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 16},
        {"merge_size": 1},
        {"temporal_patch_size": 1},
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"resample": 2},
        {"size": {"height": 224, "width": 224}},
        {"size": 224},
        {"min_pixels": "3136"},
        {"min_pixels": 99999, "max_pixels": 784},
        {"min_pixels": 1, "max_pixels": 783},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_std": [0.5, 0.5, 0]},
        {"image_std": [0.5, 0.5, float("nan")]},
    ],
)
def test_processor_configs_that_the_graphs_do_not_support_are_refused(config):
    with pytest.raises(BundleError, match="image processor"):
        ImageRules.from_config(config, 1024)


def test_a_limit_below_the_smallest_image_is_refused():
    with pytest.raises(UsageError, match="needs 4"):
        ImageRules.from_config({}, 3)


def test_rules_survive_a_json_file():
    rules = ImageRules.from_config({"image_mean": [0.1, 0.2, 0.3]}, 77)
    assert ImageRules.from_json(json.loads(json.dumps(rules.to_json()))) == rules
    for damaged in (None, [], {}, {**rules.to_json(), "new": 1}):
        with pytest.raises(BundleError, match=r"processor\.json"):
            ImageRules.from_json(damaged)

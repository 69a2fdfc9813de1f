"""Bundles that are damaged, forged or of another version: one sentence each, and never a traceback of another class."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaembed.runtime.budget import Budget
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.manifest import MANIFEST, Bundle, FileRecord, Limits, Manifest, find_changed

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]
WEIGHTS = "weights/model.safetensors"


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and len(text) < 600


def rewrite(path: Path, content: bytes) -> None:
    """Replace a hard-linked file without touching the original."""
    path.unlink()
    path.write_bytes(content)


def test_the_manifest_reads_back_what_it_wrote(demo_bundle: Path):
    manifest = Bundle.open(demo_bundle).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.largest == Budget(16, 64)
    assert manifest.parity is not None


def test_every_file_of_a_bundle_is_recorded(demo_bundle: Path):
    """Independent source: the folder's listing, and hashlib over each file."""
    found = {path.relative_to(demo_bundle).as_posix() for path in demo_bundle.rglob("*") if path.is_file()}
    files = Bundle.open(demo_bundle).manifest.files
    assert set(files) == found - {MANIFEST}
    for name, record in files.items():
        content = (demo_bundle / name).read_bytes()
        assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch], ids=["absent", "empty", "a file"])
def test_a_folder_without_a_bundle_is_a_wrong_request(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "out")
    with pytest.raises(UsageError, match="holds no bundle"):
        Bundle.open(tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"\0" * 100,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "number", "string", "UTF-16", "deep", "zeros", "long number"],
)
def test_a_manifest_that_is_no_json_object(bundle: Path, content: bytes):
    rewrite(bundle / MANIFEST, content)
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle)
    assert is_one_sentence(error.value)


@pytest.mark.parametrize(("field", "value"), [("format", "zip"), ("format_version", 2), ("format_version", None)])
def test_another_format_or_version_is_named(edit_manifest: Edit, field: str, value: object):
    with pytest.raises(BundleError, match="export again"):
        Bundle.open(edit_manifest(lambda data: data.update({field: value})))


FIELDS = ("model", "precision", "quantization", "budgets", "limits", "parity", "geometry", "template", "tools", "files")
REQUIRED = tuple(name for name in FIELDS if name not in ("quantization", "tools"))


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_damage(edit_manifest: Edit, field: str):
    with pytest.raises(BundleError, match="damaged") as error:
        Bundle.open(edit_manifest(lambda data: data.pop(field)))
    assert field in str(error.value)


WRONG_FIELDS = {
    "model": (5, None, []),
    "precision": (5, None, "fp12", ["fp32"]),
    "quantization": (5, "int8", [1], {"type": "int3"}, {}),
    "budgets": (
        5,
        None,
        "8,16",
        [],
        [[8]],
        [[8, 16, 1]],
        [8, 16],
        [["8", "16"]],
        [[8.5, 16]],
        [[1e999, 1]],
        [[0, 4]],
        [[-1, 4]],
        [[True, 16]],
        [[17, 64]],
        [[16, 65]],
        {"8": 16},
    ),
    "limits": (
        5,
        None,
        [],
        {},
        {"image_tokens": "5", "text_tokens": 5},
        {"image_tokens": 0, "text_tokens": 5},
        {"image_tokens": 5.5, "text_tokens": 5},
        {"image_tokens": 5},
        {"image_tokens": True, "text_tokens": 5},
    ),
    "parity": (5, None, [], {}, "verified", {"passed": False}, {"passed": "yes"}),
    "geometry": (5, None, [], {}, "x"),
    "template": (5, None, [], "x"),
    "tools": (5, "x", None, [1]),
    "files": (5, None, [], "x", {"a": 5}, {"a": None}, {"a": []}, {"a": {}}, {"a": {"bytes": 1}}),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG_FIELDS.items() for value in values], ids=str
)
def test_a_field_of_the_wrong_kind_is_damage(edit_manifest: Edit, field: str, value: object):
    with pytest.raises(BundleError) as error:
        Bundle.open(edit_manifest(lambda data: data.update({field: value})), verify=False)
    assert is_one_sentence(error.value)


@pytest.mark.parametrize("value", ["x", None, [], {}, -1, 0, 2.5, 1e999, True], ids=str)
def test_every_number_of_the_geometry_is_checked(edit_manifest: Edit, demo_bundle: Path, value: object):
    """Each field in turn gets the value. Rates may be fractions, and the projection may be absent."""
    geometry = json.loads((demo_bundle / MANIFEST).read_bytes())["geometry"]
    sound = {"rms_eps": (2.5,), "rope_theta": (2.5,), "projection": (None,)}
    for part in (None, "text", "vision"):
        for field in geometry[part] if part else geometry:
            if (part is None and field in ("text", "vision")) or value in sound.get(field, ()):
                continue
            broken = json.loads(json.dumps(geometry))
            (broken[part] if part else broken)[field] = value
            if field == "full_attention_blocks" and value in ([], {}):
                continue  # a tower without full attention is possible
            with pytest.raises(BundleError) as error:
                Bundle.open(edit_manifest(lambda data, new=broken: data.update(geometry=new)), verify=False)
            assert is_one_sentence(error.value), (part, field)


@pytest.mark.parametrize("key", ["bytes", "sha256"])
@pytest.mark.parametrize("value", ["x", None, [], -1, 2.5, True], ids=str)
def test_a_file_record_of_the_wrong_kind_is_damage(edit_manifest: Edit, key: str, value: object):
    with pytest.raises(BundleError) as error:
        Bundle.open(edit_manifest(lambda data: data["files"][WEIGHTS].update({key: value})))
    assert is_one_sentence(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "weights/../../secret",
        "/etc/passwd",
        "C:/x",
        "C:\\x",
        "weights\\..\\x",
        "",
        ".",
        "weights",
        "a\0b",
        "x" * 300,
        "/".join(["d"] * 3000),
        "\ud800",
    ],
    ids=ascii,
)
def test_a_path_that_leaves_the_folder_or_is_no_file_is_refused(edit_manifest: Edit, tmp_path: Path, name: str):
    """The file that it means to reach is there, with the right size and hash: only its place is wrong."""
    (tmp_path / "secret").write_text("secret")
    record = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    folder = edit_manifest(lambda data: data["files"].update({name: record}))
    with pytest.raises(BundleError) as error:
        Bundle.open(folder)
    assert is_one_sentence(error.value)


@pytest.mark.parametrize("what", ["file", "folder", "loop"])
def test_a_link_that_leaves_the_folder_is_refused(bundle: Path, demo_bundle: Path, what: str):
    """The linked content is right to the byte: it is the original bundle's."""
    if what == "folder":
        shutil.rmtree(bundle / "weights")
        (bundle / "weights").symlink_to(demo_bundle / "weights")
    else:
        (bundle / WEIGHTS).unlink()
        (bundle / WEIGHTS).symlink_to(demo_bundle / WEIGHTS if what == "file" else bundle / WEIGHTS)
    with pytest.raises(BundleError, match=r"link|missing"):
        Bundle.open(bundle)


def test_a_bundle_behind_a_link_opens(bundle: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(bundle)
    assert Bundle.open(tmp_path / "link").manifest.model == "demo"


def every_file(demo_bundle: Path) -> list[str]:
    return sorted(json.loads((demo_bundle / MANIFEST).read_bytes())["files"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "extended", "empty", "one bit", "a folder"])
def test_damage_to_any_file_is_found_and_names_it(bundle: Path, demo_bundle: Path, damage: str):
    for name in every_file(demo_bundle):
        path, content = bundle / name, (demo_bundle / name).read_bytes()
        path.unlink()
        middle = len(content) // 2
        changed = {
            "truncated": content[:-1],
            "extended": content + b"\0",
            "empty": b"",
            "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }
        if damage in changed:
            path.write_bytes(changed[damage])
        elif damage == "a folder":
            path.mkdir()
        with pytest.raises(BundleError, match=path.name) as error:
            Bundle.open(bundle)
        assert is_one_sentence(error.value)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.link(demo_bundle / name, path)
    Bundle.open(bundle)


def test_swapped_files_are_found(bundle: Path):
    first, second = bundle / "golden" / "query.safetensors", bundle / "golden" / "candidate.safetensors"
    first.rename(bundle / "aside")
    second.rename(first)
    (bundle / "aside").rename(second)
    with pytest.raises(BundleError, match="golden"):
        Bundle.open(bundle)


def test_without_verification_sizes_are_still_checked(bundle: Path):
    content = (bundle / WEIGHTS).read_bytes()
    rewrite(bundle / WEIGHTS, content[:-1] + bytes([content[-1] ^ 1]))
    Bundle.open(bundle, verify=False)
    rewrite(bundle / WEIGHTS, content[:-1])
    with pytest.raises(BundleError, match="bytes instead of"):
        Bundle.open(bundle, verify=False)


def test_find_changed_names_exactly_the_changed(bundle: Path):
    files = Bundle.open(bundle).manifest.files
    assert find_changed(bundle, files) == []
    for name in ("processor.json", WEIGHTS):
        rewrite(bundle / name, b"x")
    assert sorted(find_changed(bundle, files)) == ["processor.json", WEIGHTS]


def test_a_file_that_the_manifest_does_not_name_cannot_be_asked_for(demo_bundle: Path):
    with pytest.raises(BundleError, match="not complete"):
        Bundle.open(demo_bundle, verify=False).path("engines/a100/x.plan")


def test_a_bundle_without_a_parity_record_is_unverified(edit_manifest: Edit, demo_bundle: Path):
    assert not Bundle.open(demo_bundle, verify=False).unverified
    assert Bundle.open(edit_manifest(lambda data: data.update(parity="unverified")), verify=False).unverified


def test_the_fingerprint_changes_with_whatever_decides_an_embedding(edit_manifest: Edit, demo_bundle: Path):
    """Weights, graphs, preprocessing and the prompt's template do; golden vectors and the parity record do not."""
    original = Bundle.open(demo_bundle, verify=False).manifest.fingerprint

    def fingerprint(change: Callable[[dict[str, Any]], object]) -> str:
        return Bundle.open(edit_manifest(change), verify=False).manifest.fingerprint

    assert fingerprint(lambda data: data["files"]["golden/query.safetensors"].update(sha256="0" * 64)) == original
    assert fingerprint(lambda data: data.update(parity="unverified", budgets=[[1, 1]])) == original
    seen = {original}
    for change in (
        lambda data: data["files"][WEIGHTS].update(sha256="1" * 64),
        lambda data: data["files"]["language.onnx"].update(sha256="2" * 64),
        lambda data: data["template"].update(query_prefix="Find: "),
        lambda data: data["limits"].update(text_tokens=7),
    ):
        seen.add(fingerprint(change))
    assert len(seen) == 5


@pytest.mark.parametrize("values", [(0, 5), (5, 0), (-1, 5), (2.0, 5), ("5", 5), (True, 5), (None, 5)], ids=str)
def test_limits_are_positive_whole_numbers(values: tuple[Any, Any]):
    with pytest.raises(UsageError, match="positive"):
        Limits(*values)


def test_every_error_is_one_of_ours():
    assert issubclass(BundleError, MetaEmbedError)
    assert not issubclass(BundleError, UsageError)


def test_hashing_can_be_stopped(tmp_path: Path):
    """An export that fails does not wait until tens of gigabytes are hashed."""
    import threading

    (tmp_path / "a").write_bytes(b"abc")
    stopped = threading.Event()
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert FileRecord.of(tmp_path / "a", stopped) == FileRecord(3, known)
    stopped.set()
    with pytest.raises(RuntimeError, match="stopped"):
        FileRecord.of(tmp_path / "a", stopped)

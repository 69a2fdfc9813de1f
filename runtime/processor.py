"""processor.json: how a bundle's images become patches."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import BundleError
from .images import ImageRules


def read_image_rules(path: Path) -> ImageRules:
    """The rules that the export wrote; a BundleError when the file is damaged."""
    try:
        return ImageRules.from_json(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error})") from None


def write_image_rules(rules: ImageRules, path: Path) -> None:
    path.write_text(json.dumps(rules.to_json(), indent=2) + "\n", encoding="utf-8")

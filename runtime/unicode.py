"""Texts that are whole: halves of characters, which Python lets into them, have no UTF-8."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """Whether a text can be written down; names that are not valid in the file system's encoding hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

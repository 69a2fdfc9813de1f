"""The exceptions a user can cause. Each carries one sentence: what is wrong, what is allowed, what to do."""


class MetaEmbedError(Exception):
    """The work failed: a broken file, a failed check, a full disk. Commands print the sentence and exit 1."""


class UsageError(MetaEmbedError, ValueError):
    """The request itself is wrong: an unknown model, an impossible budget. Commands print the sentence and exit 2."""


class BundleError(MetaEmbedError):
    """A bundle, index or checkpoint on disk is damaged, incomplete, or of a format this version does not read."""


class ParityError(MetaEmbedError):
    """Embeddings disagree with the reference beyond the tolerance."""


def describe_unusable(error: ImportError) -> str:
    """Why ONNX Runtime cannot be used: it is not there, or what its import said (a library that it needs is missing)."""
    if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
        return "is not installed; pip install 'metaembed-export[runtime]'"
    return f"cannot be loaded ({error})"

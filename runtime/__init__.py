if __name__ != "metaembed.runtime":
    raise ImportError(f"import metaembed.runtime, not {__name__!r}: a second copy of every module would follow")

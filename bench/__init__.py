if __name__ != "metaembed.bench":
    raise ImportError(f"import metaembed.bench, not {__name__!r}: a second copy of every module would follow")

if __name__ != "metaembed.export":
    raise ImportError(f"import metaembed.export, not {__name__!r}: a second copy of every module would follow")

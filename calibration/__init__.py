if __name__ != "metaembed.calibration":
    raise ImportError(f"import metaembed.calibration, not {__name__!r}: a second copy of every module would follow")

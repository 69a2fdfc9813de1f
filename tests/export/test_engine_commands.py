"""The lines that a person can paste: the same shapes, types and builder settings as our own build.

Expected flags: ``trtexec --help`` of 10.3 and 11, Polygraphy's own parser, and NVIDIA's pages on ``tensorrt_rtx``.
"""

import pytest

from metaembed.export.engine_commands import polygraphy_command, trtexec_command
from metaembed.export.profiles import Sizes, plan_engines, scorer_engine
from metaembed.runtime.budget import Budget

LANGUAGE = plan_engines(Sizes(7, 1176, 16, 100, 160), (Budget(8, 16),))[1]


def test_the_trtexec_line_has_a_group_of_shapes_per_profile_and_no_flag_that_its_version_lacks():
    line = trtexec_command(LANGUAGE, "tensorrt", (8, 7), "10.3.0")
    assert line.startswith(
        "trtexec --onnx=language.onnx --saveEngine=language.plan --stronglyTyped --noTF32 --skipInference"
    )
    assert line.count("--profile=") == 2
    assert line.count("--maxShapes=") == 2
    assert "rows:8 " in line
    assert "--stronglyTyped" not in trtexec_command(LANGUAGE, "tensorrt", (8, 7), "11.4.1")
    assert "tensorrt_rtx --onnx=language.onnx" in trtexec_command(LANGUAGE, "tensorrt_rtx", (8, 0), "1.7.1")


@pytest.mark.parametrize("version", ["10.3.0", "11.4.1"])
def test_tensorfloat_32_is_set_as_our_builder_sets_it(version):
    """trtexec allows it by default, Polygraphy does not; only the scorer of a narrow bundle is built with it."""
    narrow = scorer_engine(128, 16, 32, {16: 100}, narrow=True)
    assert "--noTF32" in trtexec_command(LANGUAGE, "tensorrt", (8, 7), version).split()
    assert "--noTF32" not in trtexec_command(narrow, "tensorrt", (8, 7), version).split()
    assert "--tf32" not in polygraphy_command(LANGUAGE, "tensorrt", (8, 7)).split()
    assert "--tf32" in polygraphy_command(narrow, "tensorrt", (8, 7)).split()


@pytest.mark.parametrize(("capability", "written"), [((8, 0), "80"), ((8, 9), "89"), ((12, 0), "120")])
def test_tensorrt_rtx_takes_capabilities_without_a_dot_and_polygraphy_with_one(capability, written):
    line = trtexec_command(LANGUAGE, "tensorrt_rtx", capability, "1.7.1")
    assert f"--computeCapabilities={written}" in line.split()
    assert "TF32" not in line, "tensorrt_rtx documents no such flag"
    assert f"--compute-capabilities {written[:-1]}.{written[-1]}" in polygraphy_command(
        LANGUAGE, "tensorrt_rtx", capability
    )

"""The optional native kernels; all else is in pyproject.toml. Without a C compiler the package works on numpy."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class PlainLibrary(build_ext):
    """Builds for ctypes: a shared library without a Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class AnyPython(bdist_wheel):
    """The wheel is for this platform, but for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "metaembed.runtime._maxsim",
            ["runtime/_maxsim.c"],
            depends=[
                "runtime/_maxsim_width.h",
                "runtime/_maxsim_kernel.h",
                "runtime/_maxsim_floats.h",
                "runtime/_maxsim_dots.h",
            ],
            extra_compile_args=["-O3", "-g0", "-std=gnu11"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
)

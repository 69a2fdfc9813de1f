"""BUILD.md of a device kit: what the device must have, how it is prepared, and the commands."""

from __future__ import annotations

from metaembed.runtime.devices import Device, JetPack

from .memory import gib
from .memory_check import swap_needed
from .preflight import Preflight

RECIPE, REQUIREMENTS, WHEELHOUSE = "BUILD.md", "requirements.txt", "wheelhouse"
VERIFIED = (
    "The last line builds the engines and replays the golden vectors on them; it exits with 1 when they disagree.",
    "Nothing about speed or accuracy on this device has been measured before that.",
)
UNVERIFIED = (
    "Nothing was verified: the bundle was exported without parity (--no-parity) and has no golden vectors. The last line",
    "builds the engines and checks files only; it says nothing about accuracy. Export again to have embeddings compared.",
)


def make_recipe(preflight: Preflight, command: str, wheel: str, sums: str, *, golden: bool) -> str:
    """The text. ``command`` builds and checks, ``wheel`` and ``sums`` are files of the kit."""
    device, estimate = preflight.device, preflight.estimate
    vectors = "golden vectors, " if golden else ""
    site = " --system-site-packages" if device.jetpacks else ""
    packages = "python3-venv python3-libnvinfer" if device.jetpacks else "python3-venv"
    lines = [
        f"# Build and check on {device.title}",
        "",
        f"This folder is complete: graphs, weights, tokenizer, {vectors}and `{wheel}` with the two commands.",
        "",
        *_system_lines(device),
        f"- Memory: about {gib(estimate.build_peak)} while building (an estimate), {gib(estimate.serving)} while serving.",
        f"- Disk: about {gib(estimate.plans)} for the plans.",
        "",
        "First see that all of it arrived whole; the build adds to bundle.json, so only before it:",
        "",
        "```sh",
        f"sha256sum --check --quiet {sums}",
        "```",
        "",
        *_swap_lines(swap_needed(device, estimate)),
        *(line for pack in device.jetpacks if pack.brings for line in _upgrade_lines(pack)),
        "```sh",
        f"sudo apt-get install {packages}",
        f"python3 -m venv{site} .venv && . .venv/bin/activate",
        f"pip install --no-deps -r {REQUIREMENTS}",
        f"pip install --no-deps ./{wheel}",
        command,
        "```",
        "",
        *(VERIFIED if golden else UNVERIFIED),
        "",
        *_offline_lines(device),
    ]
    return "\n".join(lines)


def _system_lines(device: Device) -> list[str]:
    if not device.jetpacks:
        return ["- System: x86-64 Linux with an NVIDIA driver for CUDA 12 and Python 3.10 to 3.12."]
    return [
        f"- JetPack {pack.version}: TensorRT {pack.tensorrt}{f' on top of its {pack.brings}' if pack.brings else ''}, "
        f"CUDA {pack.cuda}, Python {pack.python}."
        for pack in device.jetpacks
    ]


def _swap_lines(amount: int) -> list[str]:
    """How to give the board the swap that its build needs; nothing where it needs none."""
    if not amount:
        return []
    return [
        f"The build needs {amount} GiB of swap, which the board may be given by:",
        "",
        "```sh",
        f"sudo fallocate -l {amount}G /swapfile && sudo chmod 600 /swapfile",
        "sudo mkswap /swapfile && sudo swapon /swapfile",
        "```",
        "",
    ]


def _upgrade_lines(pack: JetPack) -> list[str]:
    """How to install the TensorRT that a JetPack does not bring (TensorRT's installation guide, Debian local repository)."""
    name = f"nv-tensorrt-local-repo-ubuntu2404-{pack.tensorrt}-cuda-*"
    return [
        f"For TensorRT {pack.tensorrt} on JetPack {pack.version}, which brings {pack.brings}: download the Debian repository of",
        "its Linux SBSA build (arm64) from NVIDIA's TensorRT page, then:",
        "",
        "```sh",
        f"sudo dpkg -i {name}_arm64.deb",
        f"sudo cp /var/{name}/*-keyring.gpg /usr/share/keyrings/",
        "sudo apt-get update && sudo apt-get install tensorrt python3-libnvinfer",
        "```",
        "",
    ]


def _offline_lines(device: Device) -> list[str]:
    """A Jetson's wheels can be fetched from any machine; TensorRT's own are put together by the machine that fetches them."""
    pythons = list(dict.fromkeys(pack.python for pack in device.jetpacks))
    arm = "--platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64"
    download = f"pip download --no-deps --only-binary=:all: -d {WHEELHOUSE} -r {REQUIREMENTS} {arm} --python-version"
    where = "any machine" if device.jetpacks else "an x86-64 Linux with the same Python"
    return [
        f"`pip` needs a network there. Without one, make a wheelhouse from this folder on {where} that has one:",
        "",
        "```sh",
        *(f"{download} {python}" for python in pythons),
        *([] if pythons else [f"pip wheel --no-deps -w {WHEELHOUSE} -r {REQUIREMENTS}"]),
        "```",
        "",
        "and on the device install from it:",
        "",
        "```sh",
        f"pip install --no-deps --no-index --find-links {WHEELHOUSE} -r {REQUIREMENTS}",
        "```",
        "",
    ]

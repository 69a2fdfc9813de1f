"""The device table against facts from elsewhere: peak rates from units x rate x clock, the support matrix."""

import pytest

from metaembed.runtime.devices import (
    DEVICES,
    JETPACKS,
    RTX_CAPABILITIES,
    Device,
    devices_of,
    find_device,
    supported_types,
)
from metaembed.runtime.errors import UsageError

# Streaming multiprocessors, boost clock in GHz, dense FLOP per clock and multiprocessor for fp32 and for fp16 on
# tensor cores with fp32 accumulation: from the white papers (Turing to Blackwell) and module data sheets.
UNITS = {
    "t4": (40, 1.59, 128, 1024),
    "a100-80gb": (108, 1.41, 128, 2048),
    "a100-40gb": (108, 1.41, 128, 2048),
    "a10": (72, 1.695, 256, 1024),
    "agx-orin-64gb": (16, 1.3, 256, 2048),
    "agx-orin-32gb": (14, 0.93, 256, 2048),
    "orin-nx-16gb": (8, 0.918, 256, 2048),
    "orin-nx-8gb": (8, 0.765, 256, 2048),
    "orin-nano-8gb": (8, 0.625, 256, 2048),
    "orin-nano-4gb": (4, 0.625, 256, 2048),
    "l4": (58, 2.04, 256, 1024),
    "rtx4090": (128, 2.52, 256, 512),
    "l40s": (142, 2.52, 256, 1024),
    "h100": (132, 1.83, 256, 4096),
    "h200": (132, 1.83, 256, 4096),
    "thor": (20, 1.575, 256, 8192),
    "rtx5090": (170, 2.407, 256, 512),
}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_peak_rates_equal_units_times_rate_times_clock(device: Device):
    """Independent source: the white papers' counts. Hopper's fp32 is quoted at a higher boost: 9 % is allowed."""
    units, clock_ghz, fp32, fp16 = UNITS[device.name]
    assert device.peak_tflops["fp32"] == pytest.approx(units * clock_ghz * fp32 / 1e3, rel=0.09)
    assert device.peak_tflops["fp16"] == pytest.approx(units * clock_ghz * fp16 / 1e3, rel=0.04)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_row_is_complete_and_consistent(device: Device):
    assert device.source.startswith("https://")
    assert device.memory_gib > 0
    assert device.bandwidth_gb_s > 0
    assert device.peak_tflops["int8"] >= 2 * device.peak_tflops["fp16"] * 0.99
    assert device.integrated == (device.capability in {(8, 7), (11, 0)})
    assert find_device(device.name) is device
    assert all(find_device(alias) is device for alias in device.aliases)


def test_no_name_is_used_twice():
    names = [name for device in DEVICES for name in (device.name, *device.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("capability", "bf16", "fp8"),
    [
        ((7, 5), False, False),
        ((8, 0), True, False),
        ((8, 6), True, False),
        ((8, 7), True, False),
        ((8, 9), True, True),
        ((9, 0), True, True),
        ((11, 0), True, True),
        ((12, 0), True, True),
    ],
)
def test_types_follow_the_vendors_support_matrix(capability, bf16, fp8):
    """TensorRT 10.x support matrix, hardware and precision table."""
    types = supported_types(capability)
    assert ("bf16" in types, "fp8" in types) == (bf16, fp8)
    assert {"fp32", "fp16", "int8"} <= types


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("A100", "a100-80gb"),
        ("a100_40gb", "a100-40gb"),
        ("orin", "agx-orin-64gb"),
        ("orin-64gb", "agx-orin-64gb"),
        ("Jetson AGX Orin 32GB", "agx-orin-32gb"),
        ("Orin Nano 8 GB", "orin-nano-8gb"),
        (" thor ", "thor"),
        ("RTX 4090", "rtx4090"),
        ("rtx-5090", "rtx5090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100", "h100"),
        ("tesla-t4", "t4"),
        ("h200-sxm", "h200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_people_may_spell_a_device_as_they_know_it(spelling, name):
    assert find_device(spelling).name == name


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
    ],
)
def test_what_nvidia_smi_prints_is_a_name(printed, name):
    """nvidia-smi -L on these cards."""
    assert find_device(printed).name == name


@pytest.mark.parametrize(
    "other", ["NVIDIA A100-SXM-64GB", "NVIDIA A10G", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA"]
)
def test_a_card_that_the_table_lacks_is_not_taken_for_a_similar_one(other):
    with pytest.raises(UsageError, match="there is no device"):
        find_device(other)


@pytest.mark.parametrize("wrong", ["", "orin-nanoo", "rtx", "a1000", "b200", "-", "é"])
def test_an_unknown_device_gets_one_sentence_with_the_known_ones(wrong):
    with pytest.raises(UsageError, match="known: ") as caught:
        find_device(wrong)
    assert "a100-80gb" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_nearest_names_come_first():
    with pytest.raises(UsageError, match="known: orin-nano"):
        find_device("orin-nano-16gb")


def test_jetson_boards_know_their_jetpacks_and_others_have_none():
    """Release notes: 6.x is Orin with TensorRT 10.3, 7.0 and 7.1 Thor with 10.13, 7.2 both with 10.16, which 11.4.1 may replace."""
    versions = {
        name: [(p.version, p.tensorrt) for p in find_device(name).jetpacks] for name in ("orin", "orin-nano", "thor")
    }
    common = [("6.1", "10.3.0"), ("6.2", "10.3.0"), ("7.2", "10.16")]
    assert versions["orin"] == [*common, ("7.2.2", "11.4.1")]
    assert versions["orin-nano"] == common
    assert versions["thor"] == [("7.0", "10.13"), ("7.1", "10.13"), ("7.2", "10.16"), ("7.2.2", "11.4.1")]
    assert [(p.version, p.brings) for p in find_device("thor").jetpacks if p.brings] == [("7.2.2", "10.16")]
    assert find_device("a100").jetpacks == ()
    assert all(pack.source.startswith("https://") for pack in JETPACKS)


def test_targets_without_an_ahead_of_time_builder_are_turing_orin_hopper_and_thor():
    without = {device.capability for device in DEVICES if not device.builds_ahead}
    assert without == {(7, 5), (8, 7), (9, 0), (11, 0)}
    assert not without & set(RTX_CAPABILITIES)


def test_devices_of_a_capability():
    assert [device.name for device in devices_of((8, 9))] == ["l4", "rtx4090", "l40s"]
    assert devices_of((6, 1)) == ()


def test_a_row_with_a_rate_for_a_type_without_hardware_is_refused():
    with pytest.raises(ValueError, match="peak rates"):
        Device("x", "X", "x", (), (8, 0), 1, 1.0, {"fp32": 1, "fp8": 1}, "https://example.org")

"""A configuration is valid once it exists: every bad value is a ConfigError.

Each message is one line that names the value and, after a semicolon, what to do instead.
"""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.errors import ConfigError
from vmexit.machine.config import MachineConfig, parse_size

# What the host has, or what fits below the 40 bits of a physical address, behind the MMIO hole.
MOST = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), (1 << 40) - (4 << 30))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("134217728", 128 << 20),
        ("0x8000000", 128 << 20),
        ("128M", 128 << 20),
        ("128m", 128 << 20),
        ("128MiB", 128 << 20),
        ("128MB", 128 << 20),
        (" 1G ", 1 << 30),
        ("1T", 1 << 40),
        ("512K", 512 << 10),
        ("0", 0),
        (4096, 4096),
    ],
)
def test_a_size_is_bytes_or_has_a_unit_that_is_a_power_of_two(text, size) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 64), st.sampled_from(["", "K", "M", "G", "T"]))
def test_any_number_with_any_unit_is_so_many_bytes(number, unit) -> None:
    assert parse_size(f"{number}{unit}") == number << 10 * " KMGT".index(unit or " ")


@given(st.integers(0, 1 << 64))
def test_any_hexadecimal_number_is_so_many_bytes(number) -> None:
    assert parse_size(f"{number:#x}") == number
    assert parse_size(f"0x{number:X}") == number


@pytest.mark.parametrize(
    "text", ["", " ", "M", "MB", "1.5G", "1e3", "12 34", "0x", "0xG", "12X", "1GG", "128MM", "lots"]
)
def test_what_is_no_size_is_a_config_error_that_quotes_it(text) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is no size; use bytes, or 512K, 128M, 1G"


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error_of_one_line(text) -> None:
    try:
        assert isinstance(parse_size(text), int)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("text", ["0x" + "f" * 5000, "1" + "0" * 4299 + "T"], ids=["hex", "T"])
def test_a_size_too_long_to_be_printed_is_a_config_error_like_any_other(text) -> None:
    with pytest.raises(ConfigError):
        MachineConfig(memory=parse_size(text))


BAD = [
    ({"accel": "xen"}, "'xen'", "use auto, kvm or soft"),
    ({"accel": ""}, "''", "use auto, kvm or soft"),
    ({"accel": "KVM\nkvm"}, r"'KVM\nkvm'", "use auto, kvm or soft"),
    ({"mode": "virtual"}, "'virtual'", "use real, protected or long"),
    ({"mode": "Real"}, "'Real'", "use real, protected or long"),
    ({"image": "a.bin", "firmware": "b.bin"}, "--firmware", "give one of them"),
    ({"memory": 0}, "0 bytes", "use --memory 128M"),
    ({"memory": -4096}, "-4096 bytes", "use --memory 128M"),
    ({"memory": 1}, "1 bytes", "use --memory 1M"),
    ({"memory": 5000}, "5000 bytes", "use --memory 4096"),
    ({"memory": 8191}, "8191 bytes", "use --memory 8192"),
    ({"memory": (1 << 30) + 1}, "1073741825 bytes", "use --memory 1073741824"),
    ({"memory": 1 << 60}, f"{1 << 60} bytes", "use a smaller --memory"),
    ({"load_address": 1 << 40}, "load address 0x10000000000", "use one from 0x0 to 0xffffffffff"),
    ({"entry": 1 << 40}, "entry 0x10000000000", "use one from 0x0 to 0xffffffffff"),
    ({"entry": 1 << 99}, f"entry {1 << 99:#x}", "use one from 0x0 to 0xffffffffff"),
    ({"debugcon": (0x10000, "")}, "--debugcon: 0x10000", "use 0 to 0xffff"),
    ({"debugcon": (-1, "f")}, "--debugcon: -0x1", "use 0 to 0xffff"),
    ({"debug_exit": 0x10000}, "--debug-exit: 0x10000", "use 0 to 0xffff"),
    ({"debug_exit": -1}, "--debug-exit: -0x1", "use 0 to 0xffff"),
    ({"cpu": None}, "cpu takes a text, not None", "use host"),
    ({"cpu": 5}, "not 5", "use host"),
    ({"devices": "testdev"}, "devices takes a tuple of texts, not 'testdev'", "('...',)"),
    ({"devices": None}, "not None", "('...',)"),
    ({"devices": (5,)}, "not (5,)", "('...',)"),
    ({"devices": ("testdev", "testdev")}, "testdev is given twice", "one is all"),
    ({"drives": "file=a"}, "drives takes a tuple of texts, not 'file=a'", "('...',)"),
    ({"drives": [b"file=a"]}, "drives takes a tuple of texts", "('...',)"),
    ({"rng": 2}, "rng takes True or False, not 2", "leave it out"),
    ({"rng": "yes"}, "rng takes True or False, not 'yes'", "leave it out"),
    ({"vsock": 3}, "vsock takes a text, not 3", "path=PATH"),
    ({"symbols": 3}, "symbols takes the path of a file, not 3", "use a text"),
    ({"vsock": "cid=3", "machine": "microvm"}, "the vsock 'cid=3' has no path", "path=PATH"),
    ({"vsock": "path=a"}, "the bare machine has no virtio devices", "microvm"),
    ({"cpu": "host,+sse2,-sse2"}, "asks for +sse2 and leaves out sse2", "give one of them"),
]


@pytest.mark.parametrize(("options", "names", "remedy"), BAD, ids=lambda v: str(v)[:40])
def test_every_bad_value_is_a_config_error_naming_it_and_a_remedy(options, names, remedy) -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig(**options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    what, _, then = message.rpartition("; ")
    assert names in what and remedy in then


@pytest.mark.parametrize("option", ["accel", "mode", "machine", "protocol", "cpu", "devices"])
def test_of_a_long_value_only_the_beginning_is_shown(option) -> None:
    value = "q" * 100_000
    with pytest.raises(ConfigError, match=r"'q{64}[.]{3}'") as caught:
        MachineConfig(**{option: (value,) if option == "devices" else value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("option", ["load_address", "entry"])
def test_a_negative_address_is_not_remedied_by_a_lower_one(option) -> None:
    with pytest.raises(ConfigError, match="-0x1 ") as caught:
        MachineConfig(**{option: -1})
    assert "lower" not in str(caught.value)


def test_memory_may_be_all_that_the_host_has_and_not_a_page_more() -> None:
    assert MachineConfig(memory=MOST).memory == MOST
    with pytest.raises(ConfigError, match=rf"{MOST + 4096} bytes .*; use a smaller"):
        MachineConfig(memory=MOST + 4096)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory": 4096},
        {"load_address": (1 << 40) - 1, "entry": 0},
        {"entry": (1 << 40) - 1},
        {"debug_exit": None},
        {"debug_exit": 0},
        {"debug_exit": 0xFFFF, "debugcon": (0, "")},
        {"debugcon": (0xFFFF, "log")},
        {"image": "a.bin"},
        {"firmware": "b.bin"},
        *({"accel": a, "mode": m} for a in ("auto", "kvm", "soft")
          for m in ("real", "protected", "long")),
    ],
    ids=str,
)  # fmt: skip
def test_values_up_to_their_limits_are_taken_as_they_are(options) -> None:
    config = MachineConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_a_configuration_cannot_be_changed_and_a_replacement_is_checked_anew() -> None:
    config = MachineConfig()
    with pytest.raises(AttributeError):
        config.memory = 1  # type: ignore[misc]
    assert config._replace(memory=8192).memory == 8192
    with pytest.raises(ConfigError):
        config._replace(memory=8193)


def test_the_defaults_are_those_of_the_command_line() -> None:
    config = MachineConfig()
    assert (config.memory, config.accel, config.mode) == (128 << 20, "auto", "real")
    assert (config.load_address, config.entry, config.debug_exit) == (0, 0x1000, 0xF4)

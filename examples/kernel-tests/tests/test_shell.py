"""The shell, as somebody types to it."""

import vmexit

SECONDS = 20


def test_help_names_the_commands(kernel):
    assert kernel.shell("help").split() == [
        "echo", "help", "memory", "off", "panic", "peek", "sleep", "tasks", "ticks",
    ]  # fmt: skip


def test_what_is_no_command_is_named(kernel):
    assert kernel.shell("ech o") == "ech: there is no such command\n"
    assert kernel.shell("") == ""


def test_backspace_takes_back_one_character(kernel):
    assert kernel.shell("\becho ab\x7f\bxy") == "xy\n"


def test_peek_reads_what_the_test_has_put_there(kernel):
    at = kernel.put((0x1234_5678_9ABC).to_bytes(8, "little"))
    assert kernel.shell(f"peek {at:#x}") == "123456789abc\n"
    assert kernel.shell("peek here") == "peek: at which address?\n"


def test_a_line_that_is_too_long_is_cut_at_its_end(kernel):
    for part in ("echo " + 45 * "x", 50 * "y", 27 * "z"):  # a whole one would not fit into the ring
        kernel.vm.console.send(part)
        assert kernel.vm.console.expect(part, SECONDS) == part
    assert kernel.shell("and more") == 45 * "x" + 50 * "y" + 27 * "z" + "\n"


def test_off_ends_the_machine_with_a_status(kernel):
    kernel.vm.console.send("off 3\n")
    stop = kernel.vm.run(SECONDS)
    assert (stop.reason, stop.value) == (vmexit.StopReason.DEBUG_EXIT, 3)

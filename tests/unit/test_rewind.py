"""What is kept to go back to the same pages again."""

from vmexit.machine.rewind import _together

PAGE = 4096


def test_what_is_kept_together_is_what_it_was_and_zeros_are_kept_once():
    zeros, all_but = bytes(PAGE), bytes(PAGE - 1) + b"\1"
    pages = [zeros, b"\1" * PAGE, bytes(3 * PAGE), all_but, zeros, b"\2" + bytes(2 * PAGE - 1)]
    kept = _together([memoryview(page) for page in pages])
    assert [bytes(view) for view in kept] == pages
    nothing, rest = kept[0].obj, kept[1].obj
    assert [view.obj is nothing for view in kept] == [True, False, True, False, True, False]
    assert all(view.obj is rest for view in (kept[3], kept[5]))
    assert (len(nothing), len(rest)) == (3 * PAGE, 4 * PAGE)


def test_nothing_is_kept_of_nothing():
    assert _together([]) == []

"""Adding up: nothing is lost where bins become wider or there is too much to tell apart."""

from hypothesis import given
from hypothesis import strategies as st

from vmexit.report import totals as module
from vmexit.report.names import usual_name
from vmexit.report.reader import DirtyEvent, ExitEvent, GuestEvent
from vmexit.report.totals import Timeline, Totals


def exit_at(time: int, address: int = 0x10, *, reason: str = "io out", ns: int | None = 5):
    kind = {"io": "port", "mm": "mmio"}.get(reason[:2], "")
    return ExitEvent(time, 0, reason, kind, address, "", ns)


@given(st.lists(st.tuples(st.integers(0, 10**15), st.sampled_from("abc")), max_size=60))
def test_each_event_is_in_the_bin_of_its_time_whatever_came_after(events) -> None:
    timeline = Timeline()
    for time, name in events:
        timeline.add(time, name)
    for name, bins in timeline.series.items():
        assert len(bins) == Timeline.BINS
        expected = [0] * Timeline.BINS
        for time, other in events:
            if name == other:
                expected[time // timeline.width] += 1
        assert bins == expected


def test_what_is_too_many_to_be_told_apart_is_counted_together(monkeypatch) -> None:
    monkeypatch.setattr(module, "_MAX_ADDRESSES", 100)
    totals = Totals()
    totals.add_all(exit_at(n, n, reason="mmio read") for n in range(1000))
    totals.add_all(exit_at(n, reason=f"reason {n}") for n in range(1000))
    assert len(totals.mmio) == 100 and totals.elsewhere.exits == 900
    assert len(totals.reasons) <= 13 and len(totals.timeline.series) <= 13
    assert sum(place.exits for place in totals.reasons.values()) == totals.exits == 2000
    assert sum(map(sum, totals.timeline.series.values())) == 2000


def test_times_reads_and_writes() -> None:
    totals = Totals()
    totals.add_all(
        [
            GuestEvent(100, 0, 900),
            exit_at(1000, ns=40),
            exit_at(2000, reason="io in", ns=60),
            exit_at(3000, 0xFEE0_0020, reason="mmio write", ns=7),
            exit_at(4000, reason="hlt", ns=None),
        ]
    )
    port = totals.ports[0x10]
    assert (port.exits, port.reads, port.writes, port.host_ns) == (2, 1, 1, 100)
    assert totals.mmio[0xFEE0_0020].host_ns == 7
    vcpu = totals.vcpus[0]
    assert (vcpu.guest_ns, vcpu.host_ns, vcpu.exits) == (900, 107, 4)
    assert (totals.first, totals.last, totals.timed) == (100, 4000, True)


def test_heat_is_how_often_a_chunk_was_found_written() -> None:
    totals = Totals()
    for pages in ({0: 3, 0x8000: 1}, {0: 2}):
        totals.add_all([DirtyEvent(1, {}), DirtyEvent(0x8000, pages)])
    assert totals.looks == 2
    assert totals.heat == {0: (2, 5), 0x8000: (1, 1)}


def test_well_known_places_have_names() -> None:
    names = {usual_name("port", port) for port in (0x3F8, 0x3FF, 0x40, 0x71, 0x80, 0xCF8)}
    assert names == {"COM1", "PIT", "RTC and CMOS", "POST code", "PCI address"}
    assert usual_name("mmio", 0xFEE0_00B0) == "LAPIC"
    assert usual_name("port", 0x12345) == usual_name("mmio", 0x3F8) == ""

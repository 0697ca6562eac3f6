"""What is remembered of states."""

from vmexit.core.known import Known


def test_it_is_the_state_itself_that_counts_and_the_kind():
    known: Known[str] = Known(2)
    state, equal = {"version": 1}, {"version": 1}
    known.add(state, "found", ("kvm", True))
    assert known.find(state, ("kvm", True)) == "found"
    assert known.find(equal, ("kvm", True)) is None
    assert known.find(state, ("kvm", False)) is None


def test_only_the_last_few_are_remembered():
    known: Known[int] = Known(8)
    states = [{"number": number} for number in range(20)]
    for number, state in enumerate(states):
        known.add(state, number)
    found = [known.find(state) for state in states]
    assert found == [None] * 12 + list(range(12, 20))

"""tasks.c, by the shell's command and by tasks of machine code."""

# void task(uint64_t *log): twice count up the byte at log and yield
#   push rbx; mov rbx, rdi; mov rax, YIELD; inc byte [rbx]; call rax;
#   mov rax, YIELD; inc byte [rbx]; call rax; pop rbx; ret
CODE = "53 48 89fb 48b8 {0} fe03 ffd0 48b8 {0} fe03 ffd0 5b c3"


def counting(kernel):
    yield_ = kernel.address("task_yield").to_bytes(8, "little").hex()
    return kernel.put(bytes.fromhex(CODE.format(yield_)))


def test_tasks_take_turns(kernel):
    assert kernel.shell("tasks abc") == "a1 b1 c1 a2 b2 c2 a3 b3 c3 \n"


def test_a_task_runs_from_yield_to_yield(kernel):
    counter = kernel.put(bytes(16))
    kernel.call_int("task_create", counting(kernel), counter)
    seen = []
    for _ in range(4):
        kernel.call("task_yield")
        seen.append((kernel.vm.memory.read_u8(counter), kernel.call("tasks_alive")))
    assert seen == [(1, 2), (2, 2), (2, 1), (2, 1)]


def test_there_are_eight_at_most_and_a_place_is_free_again(kernel):
    code, counter = counting(kernel), kernel.put(bytes(16))
    made = [kernel.call_int("task_create", code, counter) for _ in range(8)]
    assert made == [1, 2, 3, 4, 5, 6, 7, -1]
    for _ in range(3):
        kernel.call("task_yield")
    assert kernel.vm.memory.read_u8(counter) == 14
    assert kernel.call_int("task_create", code, counter) == 1


def test_their_stacks_are_given_back(kernel):
    free = kernel.call("pages_free_count")
    kernel.shell("tasks abcdefg")
    assert kernel.call("pages_free_count") == free

/* Task 0 is the one that the kernel has booted in; the others have a page each for their stack. */
#include "kernel.h"

#define TASKS 8

extern void task_switch(uint64_t *save, uint64_t load);
extern void task_start(void);

static struct {
    uint64_t rsp;
    void *stack;
    bool alive;
} tasks[TASKS] = {[0] = {.alive = true}};
static int current;
static void *left; /* the stack of a task that has ended, to be freed from another one */

int task_create(void (*function)(uint64_t), uint64_t argument)
{
    for (int task = 1; task < TASKS; task++) {
        if (tasks[task].alive)
            continue;
        uint64_t *stack = page_alloc();
        if (!stack)
            return -1;
        uint64_t *top = stack + PAGE / 8 - 1;
        *--top = (uint64_t)task_start;
        *--top = 0x202;               /* flags: interrupts are on */
        *--top = (uint64_t)function;  /* rbx */
        *--top = 0;                   /* rbp */
        *--top = argument;            /* r12 */
        *--top = 0;
        *--top = 0;
        *--top = 0;
        tasks[task].rsp = (uint64_t)top;
        tasks[task].stack = stack;
        tasks[task].alive = true;
        return task;
    }
    return -1;
}

void task_yield(void)
{
    const int from = current;
    int to = from;
    do
        to = (to + 1) % TASKS;
    while (!tasks[to].alive);
    if (to == from)
        return;
    current = to;
    task_switch(&tasks[from].rsp, tasks[to].rsp);
    if (left) {
        page_free(left);
        left = NULL;
    }
}

void task_exit(void)
{
    if (left)
        page_free(left);
    left = tasks[current].stack;
    tasks[current].alive = false;
    task_yield();
    panic("a task that has ended was run");
}

uint64_t tasks_alive(void)
{
    uint64_t count = 0;
    for (int task = 0; task < TASKS; task++)
        count += tasks[task].alive;
    return count;
}

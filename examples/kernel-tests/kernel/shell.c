/* A shell on the serial port: one word, and perhaps an argument. */
#include "kernel.h"

extern uint64_t serial_lost;

static void command_echo(const char *argument)
{
    print("%s\n", argument);
}

static void command_memory(const char *argument)
{
    (void)argument;
    print("%u pages free, %u bytes of the heap used\n", pages_free_count(), heap_used());
}

static void command_ticks(const char *argument)
{
    (void)argument;
    print("%u\n", ticks);
}

/* Waits for so many ticks, halted. */
static void command_sleep(const char *argument)
{
    uint64_t count;
    if (!parse_number(argument, &count)) {
        print("sleep: for how many ticks?\n");
        return;
    }
    const uint64_t end = ticks + count;
    while (*(volatile uint64_t *)&ticks < end)
        __asm__ volatile("hlt");
    print("slept\n");
}

static void command_peek(const char *argument)
{
    uint64_t address;
    if (!parse_number(argument, &address)) {
        print("peek: at which address?\n");
        return;
    }
    print("%x\n", *(volatile uint64_t *)address);
}

static void task_of_count(uint64_t name)
{
    for (uint64_t n = 1; n <= 3; n++) {
        print("%c%u ", (int)name, n);
        task_yield();
    }
}

/* As many tasks as the argument has letters take turns. */
static void command_tasks(const char *argument)
{
    for (; *argument; argument++)
        if (task_create(task_of_count, (uint64_t)*argument) < 0)
            print("no task for %c\n", *argument);
    while (tasks_alive() > 1)
        task_yield();
    print("\n");
}

static void command_panic(const char *argument)
{
    panic("%s", argument);
}

static void command_off(const char *argument)
{
    uint64_t status = 0;
    parse_number(argument, &status);
    power_off((uint8_t)status);
}

static void command_help(const char *argument);

static const struct {
    const char *name;
    void (*run)(const char *argument);
} commands[] = {
    {"echo", command_echo},   {"help", command_help}, {"memory", command_memory},
    {"off", command_off},     {"panic", command_panic}, {"peek", command_peek},
    {"sleep", command_sleep}, {"tasks", command_tasks}, {"ticks", command_ticks},
};
#define COMMANDS (sizeof commands / sizeof *commands)

static void command_help(const char *argument)
{
    (void)argument;
    for (size_t n = 0; n < COMMANDS; n++)
        print("%s ", commands[n].name);
    print("\n");
}

void shell_run(const char *line)
{
    char name[16];
    size_t size = 0;
    for (; line[size] && line[size] != ' ' && size < sizeof name - 1; size++)
        name[size] = line[size];
    name[size] = 0;
    if (!size)
        return;
    const char *argument = line + size;
    while (*argument == ' ')
        argument++;
    for (size_t n = 0; n < COMMANDS; n++)
        if (!strcmp(commands[n].name, name)) {
            commands[n].run(argument);
            return;
        }
    print("%s: there is no such command\n", name);
}

static int wait_for_key(void)
{
    for (;;) {
        interrupts_off();
        const int key = serial_get();
        if (key >= 0) {
            __asm__ volatile("sti");
            return key;
        }
        __asm__ volatile("sti; hlt"); /* nothing comes between the two */
    }
}

void shell(void)
{
    char line[128];
    for (;;) {
        size_t size = 0;
        print("k> ");
        for (int key; (key = wait_for_key()) != '\n' && key != '\r';) {
            if (key == 0x7f || key == '\b') {
                if (size) {
                    size--;
                    print("\b \b");
                }
            } else if (size < sizeof line - 1) {
                line[size++] = (char)key;
                serial_put((char)key);
            }
        }
        line[size] = 0;
        print("\n");
        shell_run(line);
    }
}

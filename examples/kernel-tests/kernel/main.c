#include "kernel.h"

void kernel_main(void)
{
    pages_init();
    interrupts_init(); /* first: setting up the PICs would lose an edge of the UART's */
    serial_init();
    print("small kernel: %u pages free\n", pages_free_count());
    shell();
}

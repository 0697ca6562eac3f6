// What a Linux guest does with a disk and a network, and how long it takes: a line each on stdout.
// Run by the shell of the initial RAM disk; the host's port is in the kernel's command line.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 4096, LARGE = 128 << 10, READS = 2000, ROUNDS = 1000 };
static const size_t SIZE = 64u << 20;
static char *buffer;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void disk(void) {
    int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
    if (fd < 0) fail("/dev/vda");
    srand(1);
    double start = now();
    for (int i = 0; i < READS; i++) {
        off_t at = (off_t)(rand() % (SIZE / PIECE)) * PIECE;
        if (pread(fd, buffer, PIECE, at) != PIECE) fail("random read");
    }
    printf("BENCH random %.9f\n", (now() - start) / READS);
    start = now();
    for (size_t at = 0; at < SIZE; at += LARGE)
        if (pread(fd, buffer, LARGE, at) != LARGE) fail("sequential read");
    printf("BENCH sequential %.9f\n", (now() - start) / (SIZE / LARGE));
    close(fd);
}

static int connection(int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_aton("10.0.2.2", &to.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void ask(int fd, char what) {
    if (write(fd, &what, 1) != 1) fail("ask");
}

static void network(int port) {
    int fd = connection(port);
    ask(fd, 'e');
    double start = now();
    for (int i = 0; i < ROUNDS; i++)
        if (write(fd, "x", 1) != 1 || read(fd, buffer, 1) != 1) fail("round trip");
    printf("BENCH rtt %.9f\n", (now() - start) / ROUNDS);
    close(fd);
    fd = connection(port);
    ask(fd, 's');
    start = now();
    for (size_t got = 0; got < SIZE;) {
        ssize_t n = read(fd, buffer, LARGE);
        if (n <= 0) fail("receive");
        got += n;
    }
    printf("BENCH receive %.9f\n", (now() - start) / (SIZE / LARGE));
    close(fd);
    fd = connection(port);
    ask(fd, 'r');
    start = now();
    for (size_t sent = 0; sent < SIZE;) {
        ssize_t n = write(fd, buffer, LARGE);
        if (n <= 0) fail("send");
        sent += n;
    }
    if (read(fd, buffer, 1) != 1) fail("answer");
    printf("BENCH send %.9f\n", (now() - start) / (SIZE / LARGE));
    close(fd);
}

int main(void) {
    if (posix_memalign((void **)&buffer, PIECE, LARGE)) fail("memory");
    memset(buffer, 'x', LARGE);
    setvbuf(stdout, NULL, _IOLBF, 0);
    disk();
    char line[4096] = "";
    FILE *file = fopen("/proc/cmdline", "r");
    if (file && fgets(line, sizeof line, file)) {
        const char *port = strstr(line, "bench.port=");
        if (port) network(atoi(port + strlen("bench.port=")));
    }
    printf("BENCH done 0\n");
    return 0;
}

// What a Linux guest does with a disk and a network, and how long it takes: a line each on stdout.
// Run by the shell of the initial RAM disk. The host's port is in the kernel's command line, and
// in which part of all that is to be done.
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

enum { PIECE = 4096, LARGE = 128 << 10, DISK = 64 << 20 };
static int reads = 2000, rounds = 1000;
static size_t size = DISK;
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
    for (int i = 0; i < reads; i++) {
        off_t at = (off_t)(rand() % (DISK / PIECE)) * PIECE;
        if (pread(fd, buffer, PIECE, at) != PIECE) fail("random read");
    }
    printf("BENCH random %.9f\n", (now() - start) / reads);
    start = now();
    for (size_t at = 0; at < size; at += LARGE)
        if (pread(fd, buffer, LARGE, at) != LARGE) fail("sequential read");
    printf("BENCH sequential %.9f\n", (now() - start) / (size / LARGE));
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
    for (int i = 0; i < rounds; i++)
        if (write(fd, "x", 1) != 1 || read(fd, buffer, 1) != 1) fail("round trip");
    printf("BENCH rtt %.9f\n", (now() - start) / rounds);
    close(fd);
    fd = connection(port);
    ask(fd, 's');
    start = now();
    for (size_t got = 0; got < size;) {
        ssize_t n = read(fd, buffer, LARGE);
        if (n <= 0) fail("receive");
        got += n;
    }
    printf("BENCH receive %.9f\n", (now() - start) / (size / LARGE));
    close(fd);
    fd = connection(port);
    ask(fd, 'r');
    start = now();
    for (size_t sent = 0; sent < size;) {
        ssize_t n = write(fd, buffer, LARGE);
        if (n <= 0) fail("send");
        sent += n;
    }
    if (read(fd, buffer, 1) != 1) fail("answer");
    printf("BENCH send %.9f\n", (now() - start) / (size / LARGE));
    close(fd);
}

static int given(const char *line, const char *name) {
    const char *at = strstr(line, name);
    return at ? atoi(at + strlen(name)) : 0;
}

int main(void) {
    if (posix_memalign((void **)&buffer, PIECE, LARGE)) fail("memory");
    memset(buffer, 'x', LARGE);
    setvbuf(stdout, NULL, _IOLBF, 0);
    char line[4096] = "";
    FILE *file = fopen("/proc/cmdline", "r");
    if (!file || !fgets(line, sizeof line, file)) fail("/proc/cmdline");
    int part = given(line, "bench.part="), port = given(line, "bench.port=");
    if (part) {
        reads /= part;
        rounds /= part;
        size /= part;
    }
    disk();
    if (port) network(port);
    printf("BENCH done 0\n");
    return 0;
}

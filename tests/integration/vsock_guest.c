/* The guest's side of the tests of vsock: a server that echoes, and clients. */
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static char buffer[1 << 16];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static struct sockaddr_vm at(unsigned cid, const char *port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = strtoul(port, NULL, 0),
	};
	return address;
}

static void write_all(int fd, const char *data, ssize_t size)
{
	while (size > 0) {
		ssize_t done = write(fd, data, size);
		if (done < 0)
			fail("write");
		data += done;
		size -= done;
	}
}

/* All that comes from one descriptor goes to the other one. */
static void copy(int from, int to)
{
	ssize_t size;
	while ((size = read(from, buffer, sizeof buffer)) > 0)
		write_all(to, buffer, size);
	if (size < 0)
		fail("read");
}

/* echo PORT: give back to each client what it sends, until it sends no more. */
static int echo(const char *port)
{
	struct sockaddr_vm address = at(VMADDR_CID_ANY, port);
	int server = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 128))
		fail("listen");
	signal(SIGCHLD, SIG_IGN);
	if (fork())
		return 0; /* it listens by now */
	for (;;) {
		int client = accept(server, NULL, NULL);
		if (client >= 0 && fork() == 0) {
			copy(client, client);
			return 0;
		}
		close(client);
	}
}

static int dial(const char *cid, const char *port)
{
	struct sockaddr_vm address = at(strtoul(cid, NULL, 0), port);
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
		fail("connect");
	return fd;
}

/* cat CID PORT: input to the server, then the end, and what it sends to the output. */
static int cat(const char *cid, const char *port)
{
	int fd = dial(cid, port);
	if (fork() == 0) {
		copy(0, fd);
		shutdown(fd, SHUT_WR);
		return 0;
	}
	copy(fd, 1);
	wait(NULL);
	return 0;
}

static char pattern(unsigned seed, size_t at)
{
	return (seed * 2654435761u + at * 40503u) >> 7;
}

/* many PORT COUNT SIZE: so many connections at once to a server that echoes so many bytes. */
static int many(const char *port, unsigned count, size_t size)
{
	int go[2], good = 0, status;
	pipe(go);
	for (unsigned n = 0; n < count; n++) {
		if (fork())
			continue;
		int fd = dial("2", port);
		char one;
		close(go[1]);
		read(go[0], &one, 1); /* until all are there */
		if (fork() == 0) {
			for (size_t done = 0; done < size;) {
				size_t part = 0;
				while (part < sizeof buffer && done < size)
					buffer[part++] = pattern(n, done++);
				write_all(fd, buffer, part);
			}
			shutdown(fd, SHUT_WR);
			return 0;
		}
		size_t seen = 0;
		ssize_t part;
		while ((part = read(fd, buffer, sizeof buffer)) > 0)
			for (ssize_t i = 0; i < part; i++)
				if (buffer[i] != pattern(n, seen++))
					return 1;
		return part < 0 || seen != size;
	}
	close(go[1]);
	while (wait(&status) > 0)
		good += status == 0;
	printf("%d are good\n", good);
	return 0;
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "echo"))
		return echo(argv[2]);
	if (argc == 4 && !strcmp(argv[1], "cat"))
		return cat(argv[2], argv[3]);
	if (argc == 5 && !strcmp(argv[1], "many"))
		return many(argv[2], atoi(argv[3]), atol(argv[4]));
	return 2;
}

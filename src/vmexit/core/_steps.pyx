# cython: language_level=3
"""`vmexit.core.steps.Steps`, compiled: see there. The whole of `run()` is a loop in C."""

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy


cdef extern from "sys/ioctl.h" nogil:
    int c_ioctl "ioctl"(int fd, unsigned long request, ...)


cdef enum Kind:
    CALL, COPY, COMPARE


cdef struct Step:
    Kind kind
    int fd
    int result
    unsigned long request
    unsigned char *to
    const unsigned char *source
    size_t size


cdef class Steps:
    cdef Step *_steps
    cdef Py_ssize_t _count
    cdef list _held  # views, so that what the pointers point to stays where it is

    def __cinit__(self):
        self._held = []

    def __dealloc__(self):
        free(self._steps)

    def __len__(self):
        return self._count

    def clear(self):
        self._count = 0
        self._held.clear()

    def call(self, int fd, unsigned long request, data, int result=0):
        cdef Step step
        step.kind, step.fd, step.request, step.result = CALL, fd, request, result
        step.to = self._hold(data, PyBUF_WRITABLE, &step.size)
        if step.size < (request >> 16 & 0x3FFF):  # include/uapi/asm-generic/ioctl.h, _IOC_SIZE
            raise ValueError(f"{step.size} bytes are too few for request {request:#x}")
        self._add(&step)

    def copy(self, to, here, source):
        cdef Step step
        cdef size_t room
        step.kind = COPY
        step.to = self._hold(to[here], PyBUF_WRITABLE, &room)
        step.source = self._hold(source, PyBUF_SIMPLE, &step.size)
        if step.size != room:
            raise ValueError(f"{step.size} bytes do not fill {room}")
        self._add(&step)

    def compare(self, a, b):
        cdef Step step
        cdef size_t other
        step.kind = COMPARE
        step.to = self._hold(a, PyBUF_SIMPLE, &other)
        step.source = self._hold(b, PyBUF_SIMPLE, &step.size)
        if step.size != other:
            raise ValueError(f"{step.size} bytes are never the same as {other}")
        self._add(&step)

    def run(self):
        cdef Py_ssize_t done = 0
        cdef Step *step
        while done < self._count:
            step = self._steps + done
            if step.kind == COPY:
                memcpy(step.to, step.source, step.size)
            elif step.kind == CALL:
                if c_ioctl(step.fd, step.request, step.to) != step.result:
                    break
            elif memcmp(step.to, step.source, step.size) != 0:
                break
            done += 1
        return done

    cdef unsigned char *_hold(self, data, int flags, size_t *size) except? NULL:
        cdef Py_buffer buffer
        view = memoryview(data)
        PyObject_GetBuffer(view, &buffer, flags)
        size[0] = buffer.len
        pointer = <unsigned char *>buffer.buf
        PyBuffer_Release(&buffer)
        self._held.append(view)  # which keeps the buffer of what it views
        return pointer

    cdef int _add(self, Step *step) except -1:
        steps = <Step *>realloc(self._steps, (self._count + 1) * sizeof(Step))
        if steps == NULL:
            raise MemoryError
        self._steps = steps
        steps[self._count] = step[0]
        self._count += 1
        return 0

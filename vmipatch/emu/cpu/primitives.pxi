# The C side of words.py: types, and what only C can do.  amalgam.py puts this in front of the parts.
cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyObject_GetBuffer, PyBuffer_Release
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset

ctypedef unsigned char u8
ctypedef signed char s8
ctypedef short s16
ctypedef int s32
ctypedef unsigned int u32
ctypedef unsigned long long u64
ctypedef long long i64
ctypedef u8 *p8
ctypedef u32 *p32
ctypedef i64 *p64

cdef inline u32 fetch32(p8 host, i64 at) noexcept nogil:
    cdef u32 value
    memcpy(&value, host + at, 4)
    return value

cdef inline void deposit32(p8 host, i64 at, u32 value) noexcept nogil:
    memcpy(host + at, &value, 4)

cdef inline void move_bytes(p8 host, i64 to, i64 source, i64 length) noexcept nogil:
    memmove(host + to, host + source, length)

cdef inline void set_bytes(p8 host, i64 to, u32 value, i64 length) noexcept nogil:
    memset(host + to, value, length)

cdef inline p8 address_of(object buffer):
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    cdef p8 start = <p8> view.buf
    PyBuffer_Release(&view)
    return start

cdef inline void release(void *memory) noexcept nogil:
    free(memory)

cdef inline object image_of(void *start, i64 length):
    return (<char *> start)[:length]

cdef inline void put_image(void *start, bytes image):
    memcpy(start, <char *> image, len(image))

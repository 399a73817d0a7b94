/* Calls one function of a kernel library in a process of its own, which may be an emulator's: `processors.py` compiles
 * this with the library and a function `call` for each processor, sends what to call, and gets the memory back.
 *
 * From the standard input, numbers of 64 bits:
 *     the name, 64 bytes; numbers of buffers, of pointers between them, of arguments; the length of each buffer
 *     the bytes of each buffer
 *     for each pointer: in which buffer it lies, where, to which buffer it points, where
 *     for each argument: its kind, and a number, the bits of a double, or a buffer and a place in it
 * To the standard output: the result, as number and as double, then the bytes of each buffer.
 *
 * A buffer ends where a page ends after which nothing may be read or written, so a function that goes beyond it ends the
 * process. The first byte is aligned as the length is.
 */
#define _DEFAULT_SOURCE
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static void take(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) exit(2);
}

static int64_t number(void) {
    int64_t value;
    take(&value, sizeof value);
    return value;
}

static void give(const void *from, size_t bytes) {
    if (fwrite(from, 1, bytes, stdout) != bytes) exit(2);
}

static uint8_t *guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    uint8_t *pages = mmap(NULL, (size_t)(room + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + room, (size_t)page, PROT_NONE)) exit(3);
    return pages + room - bytes;
}

int main(void) {
    char name[64];
    take(name, sizeof name);
    const int64_t buffers = number(), pointers = number(), count = number();
    uint8_t **buffer = calloc((size_t)buffers + 1, sizeof *buffer);
    int64_t *length = calloc((size_t)buffers + 1, sizeof *length);
    Argument *arguments = calloc((size_t)count + 1, sizeof *arguments), result = {0};
    if (!buffer || !length || !arguments) return 3;
    take(length, (size_t)buffers * sizeof *length);
    for (int64_t i = 0; i < buffers; i++) take(buffer[i] = guarded(length[i]), (size_t)length[i]);
    for (int64_t i = 0; i < pointers; i++) {
        uint8_t *place = buffer[number()];
        place += number();
        const uint8_t *target = buffer[number()];
        target += number();
        memcpy(place, &target, sizeof target);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t kind = number(), first = number(), second = number();
        if (kind == NUMBER) arguments[i].number = first;
        else if (kind == REAL) memcpy(&arguments[i].real, &first, sizeof first);
        else arguments[i].pointer = buffer[first] + second;
    }
    if (!call(name, arguments, &result)) return 4;
    give(&result.number, sizeof result.number);
    give(&result.real, sizeof result.real);
    for (int64_t i = 0; i < buffers; i++) give(buffer[i], (size_t)length[i]);
    return fflush(stdout) ? 2 : 0;
}

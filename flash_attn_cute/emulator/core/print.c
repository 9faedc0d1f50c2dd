/* What device code prints: printf's text goes to the function that the host set, as soon as it is printed. */
#include "machine.h"

#include <stdio.h>
#include <string.h>

#define LONGEST 4096 /* bytes of a format, or of a string, that are looked at */

static void (*print_text)(const char *text);

void engine_on_print(void (*function)(const char *text)) { print_text = function; }

/* A zero-terminated string of the program's memory. */
static void read_string(Warp *w, const Instr *in, int lane, uint64_t address, char *out, size_t size)
{
    size_t used = 0;
    for (; used + 1 < size; used++) {
        out[used] = (char)*generic_span(w, in, lane, address + used, 1, 0);
        if (!out[used])
            return;
    }
    out[used] = 0;
}

static uint64_t local_word(Warp *w, const Instr *in, int lane, uint32_t offset)
{
    uint64_t value;
    memcpy(&value, generic_span(w, in, lane, LOCAL_WINDOW | offset, 8, 0), 8);
    return value;
}

/* The next argument from the buffer: values of 4 or 8 bytes, each at a multiple of its size. */
static uint64_t take(Warp *w, const Instr *in, int lane, uint64_t *next, uint32_t size)
{
    uint64_t value = 0;
    *next = (*next + size - 1) & ~(uint64_t)(size - 1);
    memcpy(&value, generic_span(w, in, lane, *next, size, 0), size);
    *next += size;
    return value;
}

/* One conversion, `%...`, at `from`; returns where it ends. */
static const char *convert(Warp *w, const Instr *in, int lane, const char *from, uint64_t *next, char *out, size_t size, int *written)
{
    char format[64], text[LONGEST];
    size_t length = 1 + strspn(from + 1, "-+ #0123456789.");
    size_t modifiers = strspn(from + length, "hlLqjzt");
    int wide = modifiers && strchr("lLqjzt", from[length]) != NULL;
    char kind = from[length + modifiers];
    if (kind == '%' || !kind || length > sizeof format - 8) {
        *written = snprintf(out, size, "%%");
        return from + length + modifiers + (kind != 0);
    }
    memcpy(format, from, length);
    snprintf(format + length, sizeof format - length, "%s%c", strchr("diouxX", kind) ? "ll" : "", kind);
    if (strchr("eEfFgGaA", kind)) {
        uint64_t bits = take(w, in, lane, next, 8);
        double value;
        memcpy(&value, &bits, 8);
        *written = snprintf(out, size, format, value);
    } else if (kind == 's') {
        read_string(w, in, lane, take(w, in, lane, next, 8), text, sizeof text);
        *written = snprintf(out, size, format, text);
    } else if (kind == 'p')
        *written = snprintf(out, size, "0x%llx", (unsigned long long)take(w, in, lane, next, 8));
    else if (kind == 'c')
        *written = snprintf(out, size, format, (int)take(w, in, lane, next, 4));
    else {
        uint64_t raw = take(w, in, lane, next, wide ? 8 : 4);
        *written = snprintf(out, size, format, wide ? (long long)raw : kind == 'd' || kind == 'i' ? (long long)(int32_t)raw : (long long)(uint32_t)raw);
    }
    return from + length + modifiers + 1;
}

/* vprintf(format, arguments). r: local offsets of the two pointers. */
void op_vprintf(Warp *w, const Instr *in, uint32_t mask)
{
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        char format[LONGEST], out[2 * LONGEST];
        size_t used = 0;
        uint64_t next = local_word(w, in, i, R32(1)[i]);
        read_string(w, in, i, local_word(w, in, i, R32(0)[i]), format, sizeof format);
        for (const char *from = format; *from && used + 1 < sizeof out;) {
            int written = 1;
            if (*from == '%')
                from = convert(w, in, i, from, &next, out + used, sizeof out - used, &written);
            else
                out[used] = *from++;
            used += written > 0 ? (size_t)written : 0;
        }
        out[used < sizeof out ? used : sizeof out - 1] = 0;
        if (print_text)
            print_text(out);
    }
}

/* __assertfail(message, file, line, function). r: local offsets of the arguments. */
void op_assert_fail(Warp *w, const Instr *in, uint32_t mask)
{
    int i = __builtin_ctz(mask);
    char message[LONGEST], file[LONGEST], function[LONGEST];
    read_string(w, in, i, local_word(w, in, i, R32(0)[i]), message, sizeof message);
    read_string(w, in, i, local_word(w, in, i, R32(1)[i]), file, sizeof file);
    read_string(w, in, i, local_word(w, in, i, R32(3)[i]), function, sizeof function);
    uint32_t line;
    memcpy(&line, generic_span(w, in, i, LOCAL_WINDOW | R32(2)[i], 4, 0), 4);
    fault(w, in, FAULT_TRAP, "assertion failed: %s, in %s at %s:%u", message, function, file, line);
}

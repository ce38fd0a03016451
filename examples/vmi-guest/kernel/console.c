/* The serial console, and how a check that failed ends the run. */
#include "kernel.h"
#include "ops.h"

#define COM1 0x3F8
#define PORT_EXIT 0xF4

void console_init(void)
{
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x80);
    outb(COM1, 1);                      /* 115200 baud */
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);
    outb(COM1 + 2, 0xC7);
    outb(COM1 + 4, 3);
}

static void put(char c)
{
    while (!(inb(COM1 + 5) & 0x20))
        cpu_pause();
    outb(COM1, (u8)c);
}

void console_write(const char *text, u32 length)
{
    while (length--) {
        if (*text == '\n')
            put('\r');
        put(*text++);
    }
}

static u32 length_of(const char *text)
{
    u32 length = 0;
    while (text[length])
        length++;
    return length;
}

static void put_number(u32 value, u32 base)
{
    char digits[12];
    u32 at = sizeof digits;
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    console_write(digits + at, sizeof digits - at);
}

void printf(const char *format, ...)
{
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            console_write(format, 1);
            continue;
        }
        const char *text;
        switch (*++format) {
        case 's':
            text = __builtin_va_arg(arguments, const char *);
            console_write(text, length_of(text));
            break;
        case 'u':
            put_number(__builtin_va_arg(arguments, u32), 10);
            break;
        case 'x':
            put_number(__builtin_va_arg(arguments, u32), 16);
            break;
        default:
            console_write(format, 1);
        }
    }
    __builtin_va_end(arguments);
}

void passed(const char *name)
{
    printf("%s: ok\n", name);
}

void failed(const char *name, const char *what, u32 found, u32 expected)
{
    printf("%s: FAILED: %s is %x, expected %x\n", name, what, found, expected);
    outb(PORT_EXIT, 1);
    for (;;)
        asm volatile("cli; hlt");
}

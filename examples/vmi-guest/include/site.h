/*
 * Annotated sites of the RFC's kind.
 *
 * A site stands in .text: the native instructions, padded to the length of the translation. The translation stands
 * in .vmi.translation: pushes, one call, and the arguments taken off the stack again. .vmi.annotation names both;
 * .vmi.native holds the native instructions a second time, to measure them, and the linker drops it.
 *
 * Padding is n-1 operand-size prefixes before one nop. Version 1: the displacement of the call is the call's number,
 * and the last byte of an entry is 0. Version 2: displacement 0, and the last byte says where in the translation the
 * call stands.
 *
 * Labels: 881 native code, 882 its end with padding, 884 translation, 885 its call, 886 its end, 888 and 889 the copy.
 */
#ifndef SITE_H
#define SITE_H

#include "calls.h"

#ifdef __ASSEMBLER__

#ifdef FORM_RFC_V1
#define SITE_DISPLACEMENT(call) call
#define SITE_CALL_OFFSET 0
#else
#define SITE_DISPLACEMENT(call) 0
#define SITE_CALL_OFFSET 885b - 884b
#endif

/* native: the instructions in quotes, separated by semicolons. */
.macro site call:req, native:req
    .pushsection .vmi.native, "ax", @progbits
888: \native
889:
    .popsection
    .pushsection .vmi.translation, "ax", @progbits
884:
885: .byte 0xe8
    .long SITE_DISPLACEMENT(\call)
886:
    .popsection
881: \native
    .skip -(((886b - 884b) - (889b - 888b)) > 0) * ((886b - 884b) - (889b - 888b) - 1), 0x66
    .skip -(((886b - 884b) - (889b - 888b)) > 0), 0x90
882:
    .pushsection .vmi.annotation, "a", @progbits
    .balign 4
    .long \call, 881b, 884b
    .byte 882b - 881b, 886b - 884b, (886b - 884b) - (889b - 888b), SITE_CALL_OFFSET
    .popsection
.endm

#else

#define SITE_STRING_OF(x) #x
#define SITE_STRING(x) SITE_STRING_OF(x)

#ifdef FORM_RFC_V1
#define SITE_DISPLACEMENT(call) SITE_STRING(call)
#define SITE_CALL_OFFSET "0"
#else
#define SITE_DISPLACEMENT(call) "0"
#define SITE_CALL_OFFSET "885b - 884b"
#endif

/* Strings of assembly: in the translation `push` comes before the call, `pop` behind it. */
#define SITE_WITH(call, native, push, pop)                                                         \
    ".pushsection .vmi.native, \"ax\", @progbits\n"                                                \
    "888:\t" native "\n889:\n\t"                                                                   \
    ".popsection\n\t"                                                                              \
    ".pushsection .vmi.translation, \"ax\", @progbits\n"                                           \
    "884:\t" push "\n885:\t.byte 0xe8\n\t.long " SITE_DISPLACEMENT(call) "\n\t" pop "\n886:\n\t"   \
    ".popsection\n"                                                                                \
    "881:\t" native "\n\t"                                                                         \
    ".skip -(((886b - 884b) - (889b - 888b)) > 0) * ((886b - 884b) - (889b - 888b) - 1), 0x66\n\t" \
    ".skip -(((886b - 884b) - (889b - 888b)) > 0), 0x90\n"                                         \
    "882:\n\t"                                                                                     \
    ".pushsection .vmi.annotation, \"a\", @progbits\n\t"                                           \
    ".balign 4\n\t"                                                                                \
    ".long " SITE_STRING(call) ", 881b, 884b\n\t"                                                  \
    ".byte 882b - 881b, 886b - 884b, (886b - 884b) - (889b - 888b), " SITE_CALL_OFFSET "\n\t"      \
    ".popsection"

#define SITE(call, native) SITE_WITH(call, native, "", "")

/* Taking one or two stack arguments off: the long form of lea, as the RFC has it. */
#define SITE_POP1 "leal 4(%%esp), %%esp"
#define SITE_POP2 "leal 8(%%esp), %%esp"

#endif
#endif

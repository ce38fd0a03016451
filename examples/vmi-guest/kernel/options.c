/* The command line: words of Linux that leave something of the interface or of the processor unused. */
#include "kernel.h"

extern u32 command_line;

struct options options;

static const struct {
    const char *word;
    bool *option;
} words[] = {
    {"vmi=disable_pse", &options.no_pse},
    {"vmi=disable_pge", &options.no_pge},
    {"vmi=disable_sep", &options.no_sep},
    {"vmi=disable_timer", &options.no_timer},
};

static bool begins(const char *text, const char *word)
{
    while (*word && *text == *word)
        text++, word++;
    return !*word && (!*text || *text == ' ');
}

void options_read(void)
{
    if (!command_line || command_line >= BOOT_MAPPED)
        return;
    const char *text = (const char *)(PAGE_OFFSET + command_line);
    for (bool first = true; *text; first = *text++ == ' ')
        for (u32 at = 0; first && at < ARRAY_SIZE(words); at++)
            if (begins(text, words[at].word))
                *words[at].option = true;
}

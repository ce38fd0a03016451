/* The checks of ring 0 (or 1), in turn. */
#include "checks.h"

void checks_of_kernel(void)
{
}

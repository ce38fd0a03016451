/* One function a subject. */
#ifndef CHECKS_H
#define CHECKS_H

#include "kernel.h"

#endif

/* What driver.c and the calls that processors.py writes share. */
#include <stdint.h>
#include <string.h>

enum { NUMBER = 0, REAL = 1, POINTER = 2 };

typedef struct {
    int64_t number;
    double real;
    void *pointer;
} Argument;

/* Calls the function of that name; whether there is one. */
int call(const char *name, const Argument *arguments, Argument *result);

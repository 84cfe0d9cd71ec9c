/* exp, log and pow for Lua policies: the same bits on every machine, which the C library's do not
 * promise. Plain double arithmetic; exp and log are off by 2 units in the last place at most, pow by
 * as many as its exponent is large. The linker puts pow here (--wrap=pow), because Lua's operator ^ calls it. */
#include "policy.h"

#include <math.h>

/* ln 2 in two parts; multiples of the first up to 2^20 are exact. */
static const double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;

double number_exp(double x) {
    if (!(x < 709.8))
        return x != x ? x : HUGE_VAL;
    if (x < -745.2)
        return 0;
    double k = floor(x * 1.4426950408889634 + 0.5);
    double r = (x - k * ln2_high) - k * ln2_low, sum = 1; /* |r| < 0.35 */
    for (int i = 17; i >= 1; i--)
        sum = 1 + r * sum / i;
    int half = (int)k / 2; /* 2^k alone may not be representable */
    return ldexp(ldexp(sum, half), (int)k - half);
}

double number_log(double x) {
    if (!(x > 0))
        return x == 0 ? -HUGE_VAL : NAN;
    if (x == HUGE_VAL)
        return x;
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752) {
        m *= 2;
        e--;
    }
    double f = (m - 1) / (m + 1), square = f * f, sum = 0; /* |f| < 0.172 */
    for (int i = 25; i >= 1; i -= 2)
        sum = sum * square + 1.0 / i;
    return e * ln2_high + (2 * f * sum + e * ln2_low);
}

/* Whole exponents by squaring, so that small powers of whole numbers are exact. */
static double whole_power(double a, double b) {
    double result = 1;
    bool inverse = b < 0;
    for (double n = fabs(b); n >= 1; n = floor(n / 2)) {
        if (fmod(n, 2) == 1)
            result *= a;
        a *= a;
    }
    return inverse ? 1 / result : result;
}

double __wrap_pow(double a, double b);
double __wrap_pow(double a, double b) {
    if (b == 0 || a == 1)
        return 1;
    if (a != a || b != b)
        return a + b;
    if (fabs(b) == HUGE_VAL)
        return fabs(a) == 1 ? 1 : (fabs(a) > 1) == (b > 0) ? HUGE_VAL : 0;
    if (floor(b) == b && (fabs(b) <= 1024 || a <= 0))
        return whole_power(a, b);
    if (a < 0)
        return a == -HUGE_VAL ? (b > 0 ? HUGE_VAL : 0) : NAN;
    return b == 0.5 ? sqrt(a) : number_exp(b * number_log(a));
}

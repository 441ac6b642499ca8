// Numbers that the emitted functions compute with, and the functions that they call. Includes nothing, so that it compiles at once.
//   R: what all trajectories share; S: what differs by trajectory (a number, or with W defined a vector of W of them: vector.hpp)
//   I, J: integers, and M: truth values which differ by trajectory; K, KI, KM make the latter of the former
// SINGLE: single precision. FN: what stands before a function; __device__ for NVRTC and nvcc. EMITTED: before a function of the user.
// DEVICE: a thread for each trajectory, with no memory but its own, as on a GPU; what is called by address elsewhere stands in the same text.
#ifndef DEVICE
#define DEVICE 0
#endif
#ifndef FN
#ifdef __CUDACC__
#define FN static __device__ __forceinline__
#else
#define FN static inline
#endif
#endif
#if DEVICE
#define EMITTED FN void
#else
#define EMITTED extern "C" void
#endif
// TABLE: what stands before arrays of constants
#ifndef TABLE
#ifdef __CUDACC__
#define TABLE static __device__ const
#else
#define TABLE static const
#endif
#endif
#ifdef SINGLE
typedef float R;
#ifdef __CUDACC__
#define BI(name) ::name##f
#else
#define BI(name) __builtin_##name##f
#endif
#else
typedef double R;
#ifdef __CUDACC__
#define BI(name) ::name
#else
#define BI(name) __builtin_##name
#endif
#endif
typedef long long I;
// BI, BD: functions of R, and of double
#ifdef __CUDACC__
#define BD(name) ::name
#define TRAP __trap()
#define NO_NUMBER (__longlong_as_double(0x7ff8000000000000LL))
#define BEYOND_ALL (__longlong_as_double(0x7ff0000000000000LL))
#else
#define BD(name) __builtin_##name
#define TRAP __builtin_trap()
#define NO_NUMBER __builtin_nan("")
#define BEYOND_ALL __builtin_inf()
#endif
#define NOT_A_NUMBER (R(NO_NUMBER))
#define INFINITE (R(BEYOND_ALL))

#define UNARY(name, f) FN R m_##name(R x) { return BI(f)(x); }
UNARY(exp, exp) UNARY(expm1, expm1) UNARY(exp2, exp2) UNARY(log, log) UNARY(log1p, log1p) UNARY(log2, log2) UNARY(log10, log10)
UNARY(sin, sin) UNARY(cos, cos) UNARY(tan, tan) UNARY(asin, asin) UNARY(acos, acos) UNARY(atan, atan)
UNARY(sinh, sinh) UNARY(cosh, cosh) UNARY(tanh, tanh) UNARY(asinh, asinh) UNARY(acosh, acosh) UNARY(atanh, atanh)
UNARY(sqrt, sqrt) UNARY(abs, fabs) UNARY(floor, floor) UNARY(ceil, ceil) UNARY(trunc, trunc) UNARY(round, rint)
UNARY(erf, erf) UNARY(erfc, erfc) UNARY(lgamma, lgamma)
#undef UNARY
FN R m_pow(R x, R y) { return BI(pow)(x, y); }
FN R m_atan2(R y, R x) { return BI(atan2)(y, x); }
FN R m_hypot(R x, R y) { return BI(hypot)(x, y); }
FN R m_fmod(R x, R y) { return BI(fmod)(x, y); }
FN R m_sign(R x) { return R((x > 0) - (x < 0)); }
FN R m_sigmoid(R x) { return 1 / (1 + BI(exp)(-x)); }
FN R m_softplus(R x) { return (x > 0 ? x : 0) + BI(log1p)(BI(exp)(-BI(fabs)(x))); }
// NaN wins, as in ATen
FN R m_max(R x, R y) { return x != x || x > y ? x : y; }
FN R m_min(R x, R y) { return x != x || x < y ? x : y; }
// the sign of the divisor, as in Python
FN R m_remainder(R x, R y) { R r = BI(fmod)(x, y); return r != 0 && (y < 0) != (r < 0) ? r + y : r; }
FN R m_floordiv(R x, R y) {
  if (y == 0) return x / y;
  R r = BI(fmod)(x, y), q = (x - r) / y;
  if (r != 0 && (y < 0) != (r < 0)) q -= 1;
  if (q == 0) return BI(copysign)(R(0), x / y);
  R whole = BI(floor)(q);
  return q - whole > R(0.5) ? whole + 1 : whole;
}
FN R m_erfinv(R y) {
  R size = BI(fabs)(y), x;
  if (!(size <= 1)) return NOT_A_NUMBER;
  if (size == 1) return BI(copysign)(INFINITE, y);
  if (size <= R(0.7)) {
    R z = y * y;
    x = y * (((R(-0.140543331) * z + R(0.914624893)) * z + R(-1.645349621)) * z + R(0.886226899)) /
        ((((R(0.012229801) * z + R(-0.329097515)) * z + R(1.442710462)) * z + R(-2.118377725)) * z + 1);
  } else {
    R z = BI(sqrt)(-BI(log)((1 - size) / 2));
    x = BI(copysign)((((R(1.641345311) * z + R(3.429567803)) * z + R(-1.624906493)) * z + R(-1.970840454)) /
                     ((R(1.637067800) * z + R(3.543889200)) * z + 1), y);
  }
  for (int n = 0; n < 2; n++) x -= (BI(erf)(x) - y) / (R(1.1283791670955126) * BI(exp)(-x * x));
  return x;
}
FN R m_digamma(R x) {
  const R pi = R(3.14159265358979323846);
  if (x == 0) return BI(copysign)(INFINITE, -x);
  R sum = 0;
  if (x < 0) {
    if (x == BI(trunc)(x)) return NOT_A_NUMBER;
    sum = -pi / BI(tan)(pi * (x - BI(trunc)(x)));
    x = 1 - x;
  }
  for (; x < 10; x += 1) sum -= 1 / x;
  R z = 1 / (x * x);
  R series = z * (R(1.0 / 12) - z * (R(1.0 / 120) - z * (R(1.0 / 252) - z * (R(1.0 / 240) - z * (R(1.0 / 132) - z * R(691.0 / 32760))))));
  return sum + BI(log)(x) - R(0.5) / x - series;
}
FN R m_trigamma(R x) {
  const R pi = R(3.14159265358979323846);
  R sign = 1, sum = 0;
  if (x < R(0.5)) {
    R s = pi / BI(sin)(pi * x);
    sign = -1, sum = -s * s, x = 1 - x;
  }
  for (; x < 10; x += 1) sum += 1 / (x * x);
  R z = 1 / (x * x);
  return sign * (sum + (1 + R(0.5) / x + z * (R(1.0 / 6) - z * (R(1.0 / 30) - z * (R(1.0 / 42) - z * (R(1.0 / 30) - z * R(5.0 / 66)))))) / x);
}
FN I m_abs(I x) { return x < 0 ? -x : x; }
FN I m_sign(I x) { return (x > 0) - (x < 0); }
FN I m_max(I x, I y) { return x > y ? x : y; }
FN I m_min(I x, I y) { return x < y ? x : y; }
FN I m_fmod(I x, I y) { return x % y; }
FN I m_remainder(I x, I y) { I r = x % y; return r != 0 && (y < 0) != (r < 0) ? r + y : r; }
FN I m_floordiv(I x, I y) { I q = x / y; return x % y != 0 && (x < 0) != (y < 0) ? q - 1 : q; }
FN R m_sel(bool m, R a, R b) { return m ? a : b; }
FN I m_sel(bool m, I a, I b) { return m ? a : b; }
FN bool m_sel(bool m, bool a, bool b) { return m ? a : b; }
FN bool m_not(bool x) { return !x; }
FN R m_single(R x) { return R(float(x)); }
FN R m_float(I x) { return R(x); }
FN I m_int(R x) { return x == x && x > R(-9e18) && x < R(9e18) ? I(x) : I(-1) - I(0x7ffffffffffffffeLL); }
// an element of an array at a computed index; NaN outside of it
FN R m_look(const R* p, I base, I step, I count, I i) { return i >= 0 && i < count ? p[base + step * i] : NOT_A_NUMBER; }
// how many elements of a sorted array are below v (right: not above it); all for NaN
FN I m_search(const R* p, I base, I count, bool right, R v) {
  I low = 0, high = count;
  while (low < high) {
    I mid = (low + high) / 2;
    if (right ? !(p[base + mid] > v) : !(p[base + mid] >= v)) low = mid + 1; else high = mid;
  }
  return low;
}
#define POWERS(T) \
  FN T m_pow2(T x) { return x * x; } \
  FN T m_pow3(T x) { return x * x * x; } \
  FN T m_pow4(T x) { return m_pow2(x * x); } \
  FN T m_pow5(T x) { return m_pow2(x * x) * x; } \
  FN T m_pow6(T x) { return m_pow3(x * x); } \
  FN T m_pow7(T x) { return m_pow3(x * x) * x; } \
  FN T m_pow8(T x) { return m_pow4(x * x); }
POWERS(R)
#ifndef W
typedef R S;
typedef I J;
typedef bool M;
FN S K(R x) { return x; }
FN J KI(I x) { return x; }
FN M KM(bool x) { return x; }
FN void m_scatter(S* p, I base, I step, I count, J i, S v) { if (i >= 0 && i < count) p[base + step * i] += v; }
#endif

// Numbers of W trajectories at once, after scalar.hpp: a register of the processor, or a pair of pairs of them. Compilers lower what is wider
// than a register lane by lane where it is compared or chosen from; and two registers side by side hide the time that each waits for its own.
// MVEC: libmvec may be called, of glibc 2.22 or later (22), or 2.35 or later (35).
#ifdef SINGLE
typedef int E;
#define BYTES (4 * W)
#else
typedef long E;
#define BYTES (8 * W)
#endif
#if defined(__AVX512F__) && BYTES >= 64
#define REGISTER 64
#elif defined(__AVX2__) && BYTES >= 32
#define REGISTER 32
#else
#define REGISTER 16
#endif
#define VECTOR(T) __attribute__((vector_size(REGISTER))) T
typedef VECTOR(R) Rr;
typedef VECTOR(E) Er;
typedef VECTOR(double) Dr;
typedef VECTOR(long) Lr;

// of vectors: a lane of them, what comparisons of them give, and floats of that size
template <class V> struct Kind;
template <> struct Kind<Rr> { typedef R T; typedef Er Mask; typedef Rr Real; };
template <> struct Kind<Er> { typedef E T; typedef Er Mask; typedef Rr Real; };
#ifdef SINGLE
template <> struct Kind<Dr> { typedef double T; typedef Lr Mask; typedef Dr Real; };
template <> struct Kind<Lr> { typedef long T; typedef Lr Mask; typedef Dr Real; };
#endif
#define INLINED inline __attribute__((always_inline))
#define EVERYWHERE static INLINED
template <class V> struct Pair {
  typedef typename Kind<V>::T T;
  typedef typename Kind<V>::Mask Half;
  V a, b;
  T& operator[](int l) { return ((T*)this)[l]; }
  T operator[](int l) const { return ((const T*)this)[l]; }
#define OPERATOR(sign) \
  friend INLINED Pair operator sign(const Pair& x, const Pair& y) { return {x.a sign y.a, x.b sign y.b}; } \
  friend INLINED Pair operator sign(const Pair& x, T y) { return {x.a sign y, x.b sign y}; } \
  friend INLINED Pair operator sign(T x, const Pair& y) { return {x sign y.a, x sign y.b}; } \
  INLINED Pair& operator sign##=(const Pair& y) { a sign##= y.a; b sign##= y.b; return *this; } \
  INLINED Pair& operator sign##=(T y) { a sign##= y; b sign##= y; return *this; }
  OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|)
#undef OPERATOR
#define OPERATOR(sign) \
  friend INLINED Pair operator sign(const Pair& x, int y) { return {x.a sign y, x.b sign y}; }
  OPERATOR(>>) OPERATOR(<<)
#undef OPERATOR
#define OPERATOR(sign) \
  friend INLINED Pair<Half> operator sign(const Pair& x, const Pair& y) { \
    return {(Half)(x.a sign y.a), (Half)(x.b sign y.b)}; \
  }
  OPERATOR(<) OPERATOR(<=) OPERATOR(>) OPERATOR(>=) OPERATOR(==) OPERATOR(!=)
#undef OPERATOR
  INLINED Pair operator-() const { return {-a, -b}; }
  INLINED Pair operator~() const { return {~a, ~b}; }
};
template <class V> struct Kind<Pair<V>> {
  typedef typename Kind<V>::T T;
  typedef Pair<typename Kind<V>::Mask> Mask;
  typedef Pair<typename Kind<V>::Real> Real;
};
// COUNT lanes of a kind
template <class V, int COUNT, bool MORE = (COUNT * sizeof(typename Kind<V>::T) > sizeof(V))> struct Lanes { typedef V type; };
template <class V, int COUNT> struct Lanes<V, COUNT, true> { typedef typename Lanes<Pair<V>, COUNT>::type type; };

// the same bits as whole numbers, and back; whole numbers as floats
EVERYWHERE Er bits(Rr x) { return (Er)x; }
EVERYWHERE Rr real(Er x) { return (Rr)x; }
EVERYWHERE Rr number(Er x) { return __builtin_convertvector(x, Rr); }
#ifdef SINGLE
EVERYWHERE Lr bits(Dr x) { return (Lr)x; }
EVERYWHERE Dr real(Lr x) { return (Dr)x; }
EVERYWHERE Dr number(Lr x) { return __builtin_convertvector(x, Dr); }
#endif
template <class V> EVERYWHERE typename Kind<Pair<V>>::Mask bits(const Pair<V>& x) { return {bits(x.a), bits(x.b)}; }
template <class V> EVERYWHERE typename Kind<Pair<V>>::Real real(const Pair<V>& x) { return {real(x.a), real(x.b)}; }
template <class V> EVERYWHERE typename Kind<Pair<V>>::Real number(const Pair<V>& x) { return {number(x.a), number(x.b)}; }
// what ``on`` marks by ones in all bits, else the other one
template <class M, class V> EVERYWHERE V chosen(const M& on, const V& x, const V& y) { return real((on & bits(x)) | (~on & bits(y))); }

typedef Lanes<Rr, W>::type S;
typedef Lanes<Er, W>::type J;
typedef J M;
FN S K(R x) { return S{} + x; }
FN S K(S x) { return x; }
FN J KI(I x) { return J{} + E(x); }
FN J KI(J x) { return x; }
FN M KM(bool x) { return M{} - E(x); }
FN M KM(M x) { return x; }
POWERS(S)
EVERYWHERE S m_sel(M m, S a, S b) { return chosen(m, a, b); }
EVERYWHERE J m_sel(M m, J a, J b) { return (m & a) | (~m & b); }
EVERYWHERE S m_sel(bool m, S a, S b) { return m ? a : b; }
EVERYWHERE J m_sel(bool m, J a, J b) { return m ? a : b; }
FN M m_not(M x) { return ~x; }
FN S m_float(J x) { return number(x); }
FN J m_int(S x) {
  J r;
  for (int l = 0; l < W; l++) r[l] = E(m_int(x[l]));
  return r;
}

#define EACH(name) FN S m_##name(S x) { S r; for (int l = 0; l < W; l++) r[l] = m_##name(x[l]); return r; }
#define EACH2(name) FN S m_##name(S x, S y) { S r; for (int l = 0; l < W; l++) r[l] = m_##name(x[l], y[l]); return r; }
#define INTEGER2(name) FN J m_##name(J x, J y) { J r; for (int l = 0; l < W; l++) r[l] = E(m_##name(I(x[l]), I(y[l]))); return r; }
EACH(single) EACH(exp2) EACH(tan) EACH(floor) EACH(ceil) EACH(trunc) EACH(round) EACH(lgamma) EACH(digamma) EACH(trigamma) EACH(erfinv)
EACH2(fmod) EACH2(remainder) EACH2(floordiv)
INTEGER2(fmod) INTEGER2(remainder) INTEGER2(floordiv)

// what the processor or the library does with a whole register
#define PARTS(name) template <class V> FN Pair<V> m_##name(const Pair<V>& x) { return {m_##name(x.a), m_##name(x.b)}; }
#define PARTS2(name) template <class V> FN Pair<V> m_##name(const Pair<V>& x, const Pair<V>& y) { return {m_##name(x.a, y.a), m_##name(x.b, y.b)}; }
#if defined(__AVX2__) && defined(SINGLE)
EVERYWHERE Rr m_sqrt(Rr x) { Rr r; __asm__("vsqrtps %1, %0" : "=v"(r) : "v"(x)); return r; }
PARTS(sqrt)
#elif defined(__AVX2__)
EVERYWHERE Rr m_sqrt(Rr x) { Rr r; __asm__("vsqrtpd %1, %0" : "=v"(r) : "v"(x)); return r; }
PARTS(sqrt)
#else
EACH(sqrt)
#endif
#if defined(MVEC) && REGISTER > 16
#if REGISTER == 64 && defined(SINGLE)
#define NAME(name, v) _ZGVeN16##v##_##name##f
#elif REGISTER == 64
#define NAME(name, v) _ZGVeN8##v##_##name
#elif defined(SINGLE)
#define NAME(name, v) _ZGVdN8##v##_##name##f
#else
#define NAME(name, v) _ZGVdN4##v##_##name
#endif
#define LIBRARY(name) extern "C" Rr NAME(name, v)(Rr); FN Rr m_##name(Rr x) { return NAME(name, v)(x); } PARTS(name)
#define LIBRARY2(name) extern "C" Rr NAME(name, vv)(Rr, Rr); FN Rr m_##name(Rr x, Rr y) { return NAME(name, vv)(x, y); } PARTS2(name)
LIBRARY(exp) LIBRARY(log) LIBRARY(sin) LIBRARY(cos) LIBRARY2(pow)
#else
EACH(exp) EACH(log) EACH(sin) EACH(cos) EACH2(pow)
#endif
#if defined(MVEC) && REGISTER > 16 && MVEC >= 35
LIBRARY(expm1) LIBRARY(log1p) LIBRARY(log2) LIBRARY(log10) LIBRARY(asin) LIBRARY(acos) LIBRARY(atan) LIBRARY(sinh) LIBRARY(cosh) LIBRARY(tanh)
LIBRARY(asinh) LIBRARY(acosh) LIBRARY(atanh) LIBRARY(erf) LIBRARY(erfc) LIBRARY2(atan2) LIBRARY2(hypot)
#else
EACH(expm1) EACH(log1p) EACH(log2) EACH(log10) EACH(asin) EACH(acos) EACH(atan) EACH(sinh) EACH(cosh) EACH(tanh)
EACH(asinh) EACH(acosh) EACH(atanh) EACH(erf) EACH(erfc) EACH2(atan2) EACH2(hypot)
#endif

EVERYWHERE S m_abs(S x) { return real(bits(x) & ~bits(-S{})); }
EVERYWHERE S m_max(S x, S y) { return m_sel((M)((M)(x != x) | (M)(x > y)), x, y); }
EVERYWHERE S m_min(S x, S y) { return m_sel((M)((M)(x != x) | (M)(x < y)), x, y); }
FN S m_sign(S x) { return m_sel((M)(x > S{}), K(1), m_sel((M)(x < S{}), K(-1), S{})); }
FN S m_sigmoid(S x) { return 1 / (1 + m_exp(-x)); }
FN S m_softplus(S x) { return m_sel((M)(x > S{}), x, S{}) + m_log1p(m_exp(-m_abs(x))); }
FN J m_abs(J x) { return m_sel((M)(x < J{}), -x, x); }
FN J m_sign(J x) { return (M)(x < J{}) - (M)(x > J{}); }
FN J m_max(J x, J y) { return m_sel((M)(x > y), x, y); }
FN J m_min(J x, J y) { return m_sel((M)(x < y), x, y); }

// arrays of numbers that all share, and of those that differ by lane; indices alike
FN S m_look(const R* p, I base, I step, I count, J i) {
  S r;
  for (int l = 0; l < W; l++) r[l] = m_look(p, base, step, count, I(i[l]));
  return r;
}
FN S m_look(const S* p, I base, I step, I count, I i) { return i >= 0 && i < count ? p[base + step * i] : K(NOT_A_NUMBER); }
FN S m_look(const S* p, I base, I step, I count, J i) {
  S r;
  for (int l = 0; l < W; l++) r[l] = i[l] >= 0 && i[l] < count ? p[base + step * i[l]][l] : NOT_A_NUMBER;
  return r;
}
FN J m_search(const R* p, I base, I count, bool right, S v) {
  J r;
  for (int l = 0; l < W; l++) r[l] = E(m_search(p, base, count, right, v[l]));
  return r;
}
FN J m_search(const S* p, I base, I count, bool right, S v) {
  J r;
  for (int l = 0; l < W; l++) {
    I low = 0, high = count;
    while (low < high) {
      I mid = (low + high) / 2;
      R x = p[base + mid][l];
      if (right ? !(x > v[l]) : !(x >= v[l])) low = mid + 1; else high = mid;
    }
    r[l] = E(low);
  }
  return r;
}
FN void m_scatter(S* p, I base, I step, I count, I i, S v) { if (i >= 0 && i < count) p[base + step * i] += v; }
FN void m_scatter(S* p, I base, I step, I count, J i, S v) {
  for (int l = 0; l < W; l++) if (i[l] >= 0 && i[l] < count) p[base + step * i[l]][l] += v[l];
}

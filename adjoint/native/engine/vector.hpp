// Numbers of W trajectories at once, after scalar.hpp. MVEC: libmvec may be called, of glibc 2.22 or later (22), or 2.35 or later (35).
#ifdef SINGLE
typedef int E;
#else
typedef long long E;
#endif
typedef R S __attribute__((vector_size(W * sizeof(R))));
typedef E J __attribute__((vector_size(W * sizeof(R))));
typedef J M;
FN S K(R x) { return S{} + x; }
FN S K(S x) { return x; }
FN J KI(I x) { return J{} + E(x); }
FN J KI(J x) { return x; }
FN M KM(bool x) { return M{} - E(x); }
FN M KM(M x) { return x; }
POWERS(S)
FN S m_sel(M m, S a, S b) { return (S)((m & (M)a) | (~m & (M)b)); }
FN J m_sel(M m, J a, J b) { return (m & a) | (~m & b); }
FN S m_sel(bool m, S a, S b) { return m ? a : b; }
FN J m_sel(bool m, J a, J b) { return m ? a : b; }
FN M m_not(M x) { return ~x; }
FN S m_float(J x) { return __builtin_convertvector(x, S); }
FN J m_int(S x) {
  J r;
  for (int l = 0; l < W; l++) r[l] = E(m_int(x[l]));
  return r;
}

#define EACH(name) FN S m_##name(S x) { S r; for (int l = 0; l < W; l++) r[l] = m_##name(x[l]); return r; }
#define EACH2(name) FN S m_##name(S x, S y) { S r; for (int l = 0; l < W; l++) r[l] = m_##name(x[l], y[l]); return r; }
#define INTEGER2(name) FN J m_##name(J x, J y) { J r; for (int l = 0; l < W; l++) r[l] = E(m_##name(I(x[l]), I(y[l]))); return r; }
EACH(single) EACH(exp2) EACH(tan) EACH(floor) EACH(ceil) EACH(trunc) EACH(round) EACH(sqrt) EACH(lgamma) EACH(digamma) EACH(trigamma) EACH(erfinv)
EACH2(fmod) EACH2(remainder) EACH2(floordiv)
INTEGER2(fmod) INTEGER2(remainder) INTEGER2(floordiv)

#if defined(MVEC) && defined(__AVX2__)
// functions of 64 bytes where the processor has them, else of 32, called as often as W needs; narrower vectors go lane by lane
#if defined(__AVX512F__) && defined(SINGLE)
#define LANES 16
#define NAME(name, v) _ZGVeN16##v##_##name##f
#elif defined(__AVX512F__)
#define LANES 8
#define NAME(name, v) _ZGVeN8##v##_##name
#elif defined(SINGLE)
#define LANES 8
#define NAME(name, v) _ZGVdN8##v##_##name##f
#else
#define LANES 4
#define NAME(name, v) _ZGVdN4##v##_##name
#endif
typedef R Part __attribute__((vector_size(LANES * sizeof(R))));
template <Part (*F)(Part)> FN S m_parts(S x) {
  union { S whole; Part part[W / LANES]; } u;
  u.whole = x;
  for (int n = 0; n < W / LANES; n++) u.part[n] = F(u.part[n]);
  return u.whole;
}
template <Part (*F)(Part, Part)> FN S m_parts(S x, S y) {
  union { S whole; Part part[W / LANES]; } u, q;
  u.whole = x, q.whole = y;
  for (int n = 0; n < W / LANES; n++) u.part[n] = F(u.part[n], q.part[n]);
  return u.whole;
}
#define PARTS(name) extern "C" Part NAME(name, v)(Part); FN S m_##name(S x) { return m_parts<NAME(name, v)>(x); }
#define PARTS2(name) extern "C" Part NAME(name, vv)(Part, Part); FN S m_##name(S x, S y) { return m_parts<NAME(name, vv)>(x, y); }
#endif
#if defined(MVEC) && defined(__AVX2__) && W >= LANES
PARTS(exp) PARTS(log) PARTS(sin) PARTS(cos) PARTS2(pow)
#else
EACH(exp) EACH(log) EACH(sin) EACH(cos) EACH2(pow)
#endif
#if defined(MVEC) && defined(__AVX2__) && W >= LANES && MVEC >= 35
PARTS(expm1) PARTS(log1p) PARTS(log2) PARTS(log10) PARTS(asin) PARTS(acos) PARTS(atan) PARTS(sinh) PARTS(cosh) PARTS(tanh)
PARTS(asinh) PARTS(acosh) PARTS(atanh) PARTS(erf) PARTS(erfc) PARTS2(atan2) PARTS2(hypot)
#else
EACH(expm1) EACH(log1p) EACH(log2) EACH(log10) EACH(asin) EACH(acos) EACH(atan) EACH(sinh) EACH(cosh) EACH(tanh)
EACH(asinh) EACH(acosh) EACH(atanh) EACH(erf) EACH(erfc) EACH2(atan2) EACH2(hypot)
#endif

FN S m_abs(S x) { return (S)((J)x & (J)((~(J){}) ^ (J)(-S{}))); }
FN S m_max(S x, S y) { return m_sel((M)((x != x) | (x > y)), x, y); }
FN S m_min(S x, S y) { return m_sel((M)((x != x) | (x < y)), x, y); }
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

// What the loop itself computes with for W trajectories at once: doubles (times, sizes of steps), whole numbers and flags, one of every lane.
#if W == 1
typedef double DV;
typedef long LV;
FN DV d_of(S x) { return x; }
FN DV d_abs(DV x) { return BD(fabs)(x); }
FN DV d_sel(LV m, DV a, DV b) { return m ? a : b; }
FN S narrow(DV x) { return (S)x; }
#else
typedef Lanes<Dr, W>::type DV;
typedef Lanes<Lr, W>::type LV;
EVERYWHERE DV d_abs(DV x) { return real(bits(x) & ~bits(-DV{})); }
EVERYWHERE DV d_sel(LV m, DV a, DV b) { return chosen(m, a, b); }
#ifdef SINGLE
// a register of floats is two of doubles
template <class V> struct Floats;
template <> struct Floats<Pair<Dr>> { typedef Rr type; };
template <class V> struct Floats<Pair<V>> { typedef Pair<typename Floats<V>::type> type; };
template <class V> struct Wide;
template <> struct Wide<Rr> { typedef Pair<Dr> type; };
template <class V> struct Wide<Pair<V>> { typedef Pair<typename Wide<V>::type> type; };
typedef float Half __attribute__((vector_size(REGISTER / 2)));
EVERYWHERE Pair<Dr> d_of(Rr x) {
  union { Rr whole; Half half[2]; } u = {x};
  return {__builtin_convertvector(u.half[0], Dr), __builtin_convertvector(u.half[1], Dr)};
}
EVERYWHERE Rr narrow(const Pair<Dr>& x) {
  union { Rr whole; Half half[2]; } u;
  u.half[0] = __builtin_convertvector(x.a, Half), u.half[1] = __builtin_convertvector(x.b, Half);
  return u.whole;
}
template <class V> EVERYWHERE typename Wide<Pair<V>>::type d_of(const Pair<V>& x) { return {d_of(x.a), d_of(x.b)}; }
template <class V> EVERYWHERE typename Floats<Pair<Pair<V>>>::type narrow(const Pair<Pair<V>>& x) { return {narrow(x.a), narrow(x.b)}; }
#else
FN DV d_of(S x) { return x; }
FN S narrow(DV x) { return x; }
#endif
#endif
FN DV d_all(double x) { return DV{} + x; }
FN LV l_all(long x) { return LV{} + x; }
// flags are 0 or -1 (all bits)
FN LV flag(bool x) { return LV{} - (long)x; }
#if W == 1
FN LV flags(bool x) { return -(long)x; }
#define THAT(comparison) flags(comparison)
FN bool some(LV x) { return x; }
#else
#define THAT(comparison) ((LV)(comparison))
FN bool some(Lr x) { long r = 0; for (unsigned l = 0; l < sizeof(Lr) / sizeof(long); l++) r |= x[l]; return r; }
template <class V> FN bool some(const Pair<V>& x) { return some(x.a | x.b); }
#endif
// where one of them is no number the second one is taken
FN DV d_least(DV a, DV b) { return d_sel(THAT(a < b), a, b); }
FN DV d_most(DV a, DV b) { return d_sel(THAT(a > b), a, b); }
FN LV d_finite(DV x) { return THAT(d_abs(x) <= d_all(1.7976931348623157e308)); }

#ifdef __CUDACC__
#define MAY_ALIAS
#else
#define MAY_ALIAS __attribute__((may_alias))
#endif
struct Doubles {
  DV v;
  double& operator[](int l) { return ((double*)&v)[l]; }
  double operator[](int l) const { return ((const double*)&v)[l]; }
} MAY_ALIAS;
struct Longs {
  LV v;
  long& operator[](int l) { return ((long*)&v)[l]; }
  long operator[](int l) const { return ((const long*)&v)[l]; }
} MAY_ALIAS;
struct Flags {
  LV v;
  bool operator[](int l) const { return ((const long*)&v)[l]; }
  void set(int l, bool x) { ((long*)&v)[l] = -(long)x; }
} MAY_ALIAS;

// x to the p for positive normal x: the logarithm by the series of artanh, the power by that of exp, both by pairs of terms, as one waits for
// the other; relative error below 1e-11. Of one trajectory, the library's.
#if W == 1
FN DV d_power(DV x, DV p) { return BD(pow)(x, p); }
#else
template <class P> FN DV d_power(DV x, const P& p) {
  const LV all = bits(x), exponent = (all - l_all(0x3fe6a09e667f3bcdL)) >> 52;  // from the root of a half
  const DV m = real(all - (exponent << 52)), s = (m - 1) / (m + 1), s2 = s * s, s4 = s2 * s2;
  const DV series = ((1 + s2 * (1.0 / 3)) + s4 * (1.0 / 5 + s2 * (1.0 / 7))) + s4 * s4 * ((1.0 / 9 + s2 * (1.0 / 11)) + s4 * (1.0 / 13 + s2 * (1.0 / 15)));
  const DV power = p * (number(exponent) + 2.8853900817779268 * s * series);
  // nearest whole number, by the sum with one whose last place is a one
  const DV kept = d_least(d_most(power, d_all(-1000)), d_all(1000)), moved = kept + 6755399441055744.0;
  const DV z = (kept - (moved - 6755399441055744.0)) * 0.6931471805599453, z2 = z * z, z4 = z2 * z2;
  const DV first = (1 + z) + z2 * (0.5 + z * (1.0 / 6)), second = (1.0 / 24 + z * (1.0 / 120)) + z2 * (1.0 / 720 + z * (1.0 / 5040));
  const DV third = (1.0 / 40320 + z * (1.0 / 362880)) + z2 * (1.0 / 3628800);
  return real(bits(first + z4 * (second + z4 * third)) + (bits(moved) << 52));
}
#endif

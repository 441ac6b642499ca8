// Linear systems (D, D) of real or complex numbers, factorised with row exchanges by size, which every lane does for itself. The factors
// stand in the place of the matrix; P tells of the exchanges, and has room_of_exchanges(D) numbers (twice that of complex ones).
struct Complex { S re, im; };
FN Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
FN Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
FN Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
FN S times(S a, S b) { return a * b; }
FN Complex times(Complex a, S b) { return {a.re * b, a.im * b}; }
FN S inverse(S a) { return K(1) / a; }
FN Complex inverse(Complex a) {
  // scaled, so that squares stay numbers
  const S size = m_max(m_abs(a.re), m_abs(a.im)), x = a.re / size, y = a.im / size, d = (x * x + y * y) * size;
  return {x / d, -y / d};
}
FN S modulus(S a) { return m_abs(a); }
FN S modulus(Complex a) { return m_abs(a.re) + m_abs(a.im); }
FN Complex m_sel(M on, Complex a, Complex b) { return {m_sel(on, a.re, b.re), m_sel(on, a.im, b.im)}; }
FN bool nothing(S a) { for (int l = 0; l < W; l++) if (get(a, l) != 0) return false; return true; }
FN bool nothing(Complex a) { return nothing(a.re) && nothing(a.im); }

// Entries may be known to lie within LOW places below the diagonal and UP above it: row exchanges bring factors LOW further up, and are made
// step by step, in the factors only from the diagonal on.
constexpr int last_of(int d, int k, int by) { return by < d - 1 - k ? k + by : d - 1; }
#if W == 1
constexpr long room_of_exchanges(int d) { return d; }

template <int D, int LOW = D - 1, int UP = D - 1, class V> static void factorise(V* LU, V* P) {
  for (int k = 0; k < D; k++) {
    const int bottom = last_of(D, k, LOW), end = last_of(D, k, LOW + UP);
    int p = k;
    for (int i = k + 1; i <= bottom; i++) if (modulus(LU[i * D + k]) > modulus(LU[p * D + k])) p = i;
    *(R*)(P + k) = p;
    if (p != k) for (int j = k; j <= end; j++) { const V x = LU[k * D + j]; LU[k * D + j] = LU[p * D + j]; LU[p * D + j] = x; }
    const V one = LU[k * D + k] = inverse(LU[k * D + k]);
    for (int i = k + 1; i <= bottom; i++) if (!nothing(LU[i * D + k])) {
      const V x = LU[i * D + k] = LU[i * D + k] * one;
      for (int j = k + 1; j <= end; j++) LU[i * D + j] = LU[i * D + j] - x * LU[k * D + j];
    }
  }
}
template <int D, int LOW, class V> FN void exchanged(const V* P, V* x, int k, bool) {
  const int p = (int)*(const R*)(P + k);
  if (p != k) { const V v = x[k]; x[k] = x[p]; x[p] = v; }
}
#else
constexpr long room_of_exchanges(int d) { return (long)d * d; }
// the largest entry comes up by exchanges with each row below: P[k, i] says whether k and i were exchanged
template <int D, int LOW = D - 1, int UP = D - 1, class V> static void factorise(V* LU, V* P) {
  for (int k = 0; k < D; k++) {
    const int bottom = last_of(D, k, LOW), end = last_of(D, k, LOW + UP);
    for (int i = k + 1; i <= bottom; i++) {
      const M larger = (M)(modulus(LU[i * D + k]) > modulus(LU[k * D + k]));
      *(S*)(P + k * D + i) = m_sel(larger, K(1), K(0));
      for (int j = k; j <= end; j++) { const V a = LU[k * D + j], b = LU[i * D + j]; LU[k * D + j] = m_sel(larger, b, a); LU[i * D + j] = m_sel(larger, a, b); }
    }
    const V one = LU[k * D + k] = inverse(LU[k * D + k]);
    for (int i = k + 1; i <= bottom; i++) {
      if (nothing(LU[i * D + k])) continue;
      const V x = LU[i * D + k] = LU[i * D + k] * one;
      for (int j = k + 1; j <= end; j++) LU[i * D + j] = LU[i * D + j] - x * LU[k * D + j];
    }
  }
}
template <int D, int LOW, class V> FN void exchanged(const V* P, V* x, int k, bool back) {
  const int bottom = last_of(D, k, LOW);
  for (int b = k + 1; b <= bottom; b++) {
    const int i = back ? bottom + k + 1 - b : b;
    const M on = (M)(*(const S*)(P + k * D + i) > K(R(0.5)));
    const V u = x[k], v = x[i];
    x[k] = m_sel(on, v, u); x[i] = m_sel(on, u, v);
  }
}
#endif
template <int D, int LOW = D - 1, int UP = D - 1, class V> static void solve_lu(const V* LU, const V* P, V* x) {
  for (int k = 0; k < D; k++) {
    exchanged<D, LOW>(P, x, k, false);
    const V v = x[k];
    for (int i = k + 1, bottom = last_of(D, k, LOW); i <= bottom; i++) x[i] = x[i] - LU[i * D + k] * v;
  }
  for (int i = D - 1; i >= 0; i--) { V v = x[i]; for (int j = i + 1, end = last_of(D, i, LOW + UP); j <= end; j++) v = v - LU[i * D + j] * x[j]; x[i] = v * LU[i * D + i]; }
}
template <int D, int LOW = D - 1, int UP = D - 1, class V> static void solve_transposed(const V* LU, const V* P, V* x) {
  for (int i = 0; i < D; i++) { const V v = x[i] * LU[i * D + i]; x[i] = v; for (int j = i + 1, end = last_of(D, i, LOW + UP); j <= end; j++) x[j] = x[j] - LU[i * D + j] * v; }
  for (int k = D - 1; k >= 0; k--) {
    V v = x[k];
    for (int i = last_of(D, k, LOW); i > k; i--) v = v - LU[i * D + k] * x[i];
    x[k] = v;
    exchanged<D, LOW>(P, x, k, true);
  }
}
FN void clear(S& x) { x = K(0); }
FN void clear(Complex& x) { x = {K(0), K(0)}; }
// a place in a Jacobian of the state: row and column, which of its entries that is (of implicit equations: by the value; by the slope it is BESIDE
// further on), and the column's copy where there are some
struct At { int i, j; long entry; int copy; };

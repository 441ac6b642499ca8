// Dense linear systems (N, N), factorised with row exchanges by size, which every lane does for itself. LU (N * N) and the exchanges P.
#if W == 1
static void factorise(S* LU, S* P) {
  for (int k = 0; k < N; k++) {
    int p = k;
    for (int i = k + 1; i < N; i++) if (m_abs(LU[i * N + k]) > m_abs(LU[p * N + k])) p = i;
    P[k] = p;
    if (p != k) for (int j = 0; j < N; j++) { const S x = LU[k * N + j]; LU[k * N + j] = LU[p * N + j]; LU[p * N + j] = x; }
    const S pivot = LU[k * N + k];
    for (int i = k + 1; i < N; i++) if (LU[i * N + k] != 0) {
      const S x = LU[i * N + k] /= pivot;
      for (int j = k + 1; j < N; j++) LU[i * N + j] -= x * LU[k * N + j];
    }
  }
}
static void solve_lu(const S* LU, const S* P, S* x) {
  for (int k = 0; k < N; k++) { const int p = (int)P[k]; if (p != k) { const S v = x[k]; x[k] = x[p]; x[p] = v; } }
  for (int i = 1; i < N; i++) { S v = x[i]; for (int j = 0; j < i; j++) v -= LU[i * N + j] * x[j]; x[i] = v; }
  for (int i = N - 1; i >= 0; i--) { S v = x[i]; for (int j = i + 1; j < N; j++) v -= LU[i * N + j] * x[j]; x[i] = v / LU[i * N + i]; }
}
static void solve_transposed(const S* LU, const S* P, S* x) {
  for (int i = 0; i < N; i++) { const S v = x[i] / LU[i * N + i]; x[i] = v; for (int j = i + 1; j < N; j++) x[j] -= LU[i * N + j] * v; }
  for (int i = N - 1; i > 0; i--) { const S v = x[i]; for (int j = 0; j < i; j++) x[j] -= LU[i * N + j] * v; }
  for (int k = N - 1; k >= 0; k--) { const int p = (int)P[k]; if (p != k) { const S v = x[k]; x[k] = x[p]; x[p] = v; } }
}
#define EXCHANGES N
#else
// the largest entry comes up by exchanges with each row below: P[k, i] says whether k and i were exchanged, P[k, k] is one over the pivot
static void factorise(S* LU, S* P) {
  for (int k = 0; k < N; k++) {
    for (int i = k + 1; i < N; i++) {
      const M larger = (M)(m_abs(LU[i * N + k]) > m_abs(LU[k * N + k]));
      P[k * N + i] = m_sel(larger, K(1), K(0));
      for (int j = 0; j < N; j++) { const S a = LU[k * N + j], b = LU[i * N + j]; LU[k * N + j] = m_sel(larger, b, a); LU[i * N + j] = m_sel(larger, a, b); }
    }
    const S inverse = K(1) / LU[k * N + k];
    P[k * N + k] = inverse;
    for (int i = k + 1; i < N; i++) {
      const S x = LU[i * N + k] * inverse;
      LU[i * N + k] = x;
      for (int j = k + 1; j < N; j++) LU[i * N + j] -= x * LU[k * N + j];
    }
  }
}
static void exchange(const S* P, S* x, int k, int i) {
  const M on = (M)(P[k * N + i] > K(R(0.5)));
  const S a = x[k], b = x[i];
  x[k] = m_sel(on, b, a); x[i] = m_sel(on, a, b);
}
static void solve_lu(const S* LU, const S* P, S* x) {
  for (int k = 0; k < N; k++) for (int i = k + 1; i < N; i++) exchange(P, x, k, i);
  for (int i = 1; i < N; i++) { S v = x[i]; for (int j = 0; j < i; j++) v -= LU[i * N + j] * x[j]; x[i] = v; }
  for (int i = N - 1; i >= 0; i--) { S v = x[i]; for (int j = i + 1; j < N; j++) v -= LU[i * N + j] * x[j]; x[i] = v * P[i * N + i]; }
}
static void solve_transposed(const S* LU, const S* P, S* x) {
  for (int i = 0; i < N; i++) { const S v = x[i] * P[i * N + i]; x[i] = v; for (int j = i + 1; j < N; j++) x[j] -= LU[i * N + j] * v; }
  for (int i = N - 1; i > 0; i--) { const S v = x[i]; for (int j = 0; j < i; j++) x[j] -= LU[i * N + j] * v; }
  for (int k = N - 1; k >= 0; k--) for (int i = N - 1; i > k; i--) exchange(P, x, k, i);
}
#define EXCHANGES (N * N)
#endif
// I - hd J in place of the factors, with J at (t, y)
static void shifted_matrix(const S* J, const S hd, S* LU, S* P) {
  for (int i = 0; i < N; i++) for (int j = 0; j < N; j++) LU[i * N + j] = (i == j ? K(1) : K(0)) - hd * J[i * N + j];
  factorise(LU, P);
}

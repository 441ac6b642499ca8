// One step of a fully implicit Runge-Kutta method and its adjoint, see `methods/collocation.py` and `integrate/coupled.py`. Constants: STAGES,
// ALL (as many), A, B, C (the start of the step, then the stages), EMBEDDED, GAMMA, LAGRANGE, and of A = T diag(l) T^-1 the MODES, one of each
// conjugate pair: VALUE, OUT_OF and INTO, each with real and imaginary part. Slopes of stages are recorded.
#define RECORDED 1
#define HANDS_ON 0
#define BIG (STAGES * N)
#define ROOM_OF_STEP (N * N + MODES * 2 * (N * N + EXCHANGES) + N * N + EXCHANGES + (2 * STAGES + 8) * N + BIG * BIG + room_of_exchanges(BIG) + BIG)
struct Room {
  S *J, *filter, *P, *modes, *found, *last, *base, *bound, *point, *big, *bigP, *side;
  Room(S* at) : J(at), filter(J + N * N), P(filter + N * N), modes(P + EXCHANGES), found(modes + MODES * 2 * (N * N + EXCHANGES)), last(found + BIG),
    base(last + BIG), bound(base + 2 * N), point(bound + 2 * N), big(point + 4 * N), bigP(big + BIG * BIG), side(bigP + room_of_exchanges(BIG)) {}
  Complex* factors(int m) const { return (Complex*)(modes + m * 2 * (N * N + EXCHANGES)); }
  Complex* exchanges(int m) const { return factors(m) + N * N; }
};
FN S weighted(const double* w, int count, const S* ks, int n) {
  S total = K(0);
  for (int j = 0; j < count; j++) total += K(R(w[j])) * ks[j * N + n];
  return total;
}
static void mode_matrix(const S* J, const S h, int m, Complex* LU, Complex* P) {
  const S re = h * K(R(VALUE[m][0])), im = h * K(R(VALUE[m][1]));
  for (int i = 0; i < N; i++) for (int j = 0; j < N; j++) LU[i * N + j] = {(i == j ? K(1) : K(0)) - re * J[i * N + j], K(0) - im * J[i * N + j]};
  factorise<N>(LU, P);
}
// (I (x) I - h A (x) J)^-1 of residuals (STAGES, N), in the place found
static void solve_stages(const Room& r, const S* residuals, S* found) {
  for (int e = 0; e < BIG; e++) found[e] = K(0);
  for (int m = 0; m < MODES; m++) {
    if (VALUE[m][1] == 0) {
      S* x = r.point;
      for (int n = 0; n < N; n++) { x[n] = K(0); for (int i = 0; i < STAGES; i++) x[n] += K(R(OUT_OF[m][2 * i])) * residuals[i * N + n]; }
      solve_lu<N>(r.filter, r.P, x);
      for (int i = 0; i < STAGES; i++) for (int n = 0; n < N; n++) found[i * N + n] += K(R(INTO[m][2 * i])) * x[n];
    } else {
      Complex* x = (Complex*)r.point;
      for (int n = 0; n < N; n++) {
        x[n] = {K(0), K(0)};
        for (int i = 0; i < STAGES; i++) { x[n].re += K(R(OUT_OF[m][2 * i])) * residuals[i * N + n]; x[n].im += K(R(OUT_OF[m][2 * i + 1])) * residuals[i * N + n]; }
      }
      solve_lu<N>(r.factors(m), r.exchanges(m), x);
      // the other one of the pair is the conjugate
      for (int i = 0; i < STAGES; i++) for (int n = 0; n < N; n++) found[i * N + n] += K(R(2 * INTO[m][2 * i])) * x[n].re - K(R(2 * INTO[m][2 * i + 1])) * x[n].im;
    }
  }
}
static void step_forward(Attempt& a) {
  Room r(a.work);
  S *ks = a.ks, length, *d = r.found, *residuals = r.side;
  a.f.jac(&a.c, a.times, a.y, r.J, r.point);
  for (int l = 0; l < W; l++) a.counts[JACOBIANS][l] += a.on[l] && !a.again[l];
  // a real eigenvalue's matrix is that of the filter of the error
  if (FILTERED || SHARED_FILTER) { shifted_matrix(r.J, a.h * K(R(GAMMA)), r.filter, r.P); a.count(FACTORISATIONS); }
  for (int m = 0; m < MODES; m++) if (VALUE[m][1] != 0) { mode_matrix(r.J, a.h, m, r.factors(m), r.exchanges(m)); a.count(FACTORISATIONS); }
  for (int l = 0; l < W; l++) if (a.on[l]) {
    // the polynomial of the step before, where that is near
    const double ratio = a.last_h[l] != 0 ? get(a.h, l) / a.last_h[l] : 0;
    bool near = STAGES > 1 && a.guesses && ratio > 0 && ratio < 8;
    for (int i = 0; i < STAGES && near; i++) {
      double w[STAGES], p = 1;
      for (int j = 0; j < STAGES; j++) w[j] = 0;
      for (int m = 0; m < STAGES; m++, p *= 1 + ratio * C[i + 1]) for (int j = 0; j < STAGES; j++) w[j] += p * LAGRANGE[m][j];
      for (int n = 0; n < N; n++) {
        R x = 0;
        for (int j = 0; j < STAGES; j++) x += R(w[j]) * get(a.last_ks[j * N + n], l);
        put(ks[i * N + n], l, x);
        near = near && finite(x);
      }
    }
    if (!near) for (int i = 0; i < STAGES; i++) for (int n = 0; n < N; n++) put(ks[i * N + n], l, get(a.k1[n], l));
  }
  for (int n = 0; n < N; n++) {
    const S size = m_abs(a.y[n]);
    r.bound[n] = m_max(K(R(TOLERANCE)) * (size * a.step_rtol[n] + a.step_atol[n]), K(R(10 * EPSILON)) * size);
  }
  Newton newton(a, 1.0, a.adaptive ? MOST_COUPLED : MOST_CONSTANT);
  while (newton.round < newton.most && newton.any()) {
    for (int l = 0; l < W; l++) { const long n = newton.running[l]; a.counts[EVALUATED][l] += n * STAGES; a.counts[ITERATIONS][l] += n; a.counts[SOLVES][l] += n * MODES; }
    for (int i = 0; i < STAGES; i++) {
      for (int n = 0; n < N; n++) r.base[n] = a.y[n] + a.h * weighted(A[i], STAGES, ks, n);
      a.f.fun(&a.c, a.times + i + 1, r.base, residuals + i * N);
      for (int n = 0; n < N; n++) residuals[i * N + n] = ks[i * N + n] - residuals[i * N + n];
    }
    solve_stages(r, residuals, d);
    length = K(0);
    for (int i = 0; i < STAGES; i++) {
      S total = K(0);
      for (int n = 0; n < N; n++) { const S x = a.h * weighted(A[i], STAGES, d, n) / r.bound[n]; total += x * x; }
      length = m_max(length, total);
    }
    const M moves = newton.judge(m_sqrt(length) * K(R(ROOT)));
    for (int e = 0; e < BIG; e++) ks[e] = m_sel(moves, ks[e] - d[e], ks[e]);
  }
  const M lost = newton.lost();
  for (int e = 0; e < BIG; e++) ks[e] = m_sel(lost, K(NOT_A_NUMBER), ks[e]);
  for (int n = 0; n < N; n++) a.y1[n] = a.y[n] + a.h * weighted(B, STAGES, ks, n);
  if (!FILTERED) return;
  // (I - h gamma J)^-1 h (gamma f(t, y) + sum e_i k_i), once more at y plus that where it is too large
  S *estimate = r.point, *from_stages = r.base, total = K(0);
  const S hg = a.h * K(R(GAMMA));
  for (int n = 0; n < N; n++) { from_stages[n] = a.h * weighted(EMBEDDED, STAGES, ks, n); estimate[n] = from_stages[n] + hg * a.k1[n]; }
  solve_lu<N>(r.filter, r.P, estimate);
  a.count(SOLVES);
  for (int n = 0; n < N; n++) { const S x = estimate[n] / (m_max(m_abs(a.y[n]), m_abs(a.y1[n])) * a.step_rtol[n] + a.step_atol[n]); total += x * x; }
  total = m_sqrt(total) * K(R(ROOT));
  bool large[W], some = false;
  for (int l = 0; l < W; l++) {
    some |= large[l] = a.on[l] && get(total, l) > 1;
    if (large[l]) { a.counts[EVALUATED][l]++; a.counts[SOLVES][l]++; }
  }
  if (some) {
    S *moved = r.bound, *again = r.side;
    for (int n = 0; n < N; n++) moved[n] = a.y[n] + estimate[n];
    a.f.fun(&a.c, a.times, moved, again);
    for (int n = 0; n < N; n++) again[n] = from_stages[n] + hg * again[n];
    solve_lu<N>(r.filter, r.P, again);
    const M on = mask_of(large);
    for (int n = 0; n < N; n++) estimate[n] = m_sel(on, again[n], estimate[n]);
  }
  for (int n = 0; n < N; n++) a.error[n] = estimate[n];
}
FN void step_error(Attempt&) {}
template <int I> FN void dense_stages(Attempt&) {}

// ---- the adjoint: v_i - h sum_j a_ji J_j* v_j = kbar_i + h b_i l1, l0 = l1 + sum_i J_i* v_i
template <bool DENSE_OUTPUT> static void step_back(Return& a) {
  Room r(a.work);
  S *v = r.side, *u = r.point;
  for (int i = 0; i < STAGES; i++) {
    for (int n = 0; n < N; n++) {
      r.base[n] = a.y[n] + a.h * weighted(A[i], STAGES, a.ks, n);
      v[i * N + n] = a.h * K(R(B[i])) * a.bar[n];
      if (a.kbar) v[i * N + n] += a.kbar[i * N + n];
    }
    a.f.jac(&a.c, a.times + i + 1, r.base, r.J, r.point);
    for (int n = 0; n < N; n++) for (int j = 0; j < STAGES; j++) for (int m = 0; m < N; m++)
      r.big[(i * N + n) * BIG + j * N + m] = (i == j && n == m ? K(1) : K(0)) - a.h * K(R(A[i][j])) * r.J[n * N + m];
  }
  factorise<BIG>(r.big, r.bigP);
  solve_transposed<BIG>(r.big, r.bigP, v);
  for (int n = 0; n < N; n++) a.ybar[n] = a.bar[n];
  for (int i = 0; i < STAGES; i++) {
    S tb = K(0), dot = K(0);
    for (int n = 0; n < N; n++) r.base[n] = a.y[n] + a.h * weighted(A[i], STAGES, a.ks, n);
    a.f.vjp(&a.c, a.times + i + 1, r.base, v + i * N, u, &tb);
    for (int n = 0; n < N; n++) {
      a.ybar[n] += u[n];
      dot += K(R(B[i])) * a.ks[i * N + n] * a.bar[n] + weighted(A[i], STAGES, a.ks, n) * u[n];
    }
    if (a.timed) { a.tbar += tb; a.hbar += dot + K(R(C[i + 1])) * tb; }
  }
}

// One step of a fully implicit Runge-Kutta method and its adjoint, see `methods/collocation.py`, `integrate/coupled.py` and `residual.py`.
// Constants: STAGES, ALL (as many), A, B, C (the start of the step, then the stages), EMBEDDED, GAMMA, LAGRANGE, and of A = T diag(l) T^-1 the
// MODES, one of each conjugate pair: VALUE, OUT_OF and INTO, each with real and imaginary part. Slopes of stages are recorded.
#define RECORDED 1
#define HANDS_ON 0
#define BIG (STAGES * N)
#define ROOM_OF_MODE (2 * (room_of_factors(1) + EXCHANGES) + N)
#define ROOM_OF_STEP (ROOM_OF_PENCIL + MODES * ROOM_OF_MODE + (STAGES + 2) * (long)N + room_of_factors(STAGES) + room_of_rows(STAGES) + 2 * BIG)
struct Room : Pencil {
  S *modes, *found, *bound, *big, *bigP, *side, *sides;
  Room(S* at) : Pencil(at), modes(at + ROOM_OF_PENCIL), found(modes + MODES * ROOM_OF_MODE), bound(found + BIG), big(bound + 2 * N), bigP(big + room_of_factors(STAGES)),
    side(bigP + room_of_rows(STAGES)), sides(side + BIG) {}
  Complex* factors(int m) const { return (Complex*)(modes + m * ROOM_OF_MODE); }
  Complex* exchanges(int m) const { return factors(m) + room_of_factors(1); }
  S* scales(int m) const { return modes + m * ROOM_OF_MODE + 2 * (room_of_factors(1) + EXCHANGES); }
};
FN S weighted(const double* w, int count, const S* ks, int n) {
  S total = K(0);
  for (int j = 0; j < count; j++) total += K(R(w[j])) * ks[j * N + n];
  return total;
}
static void mode_matrix(const Functions& f, const Room& r, const S h, int m) {
  const S re = h * K(R(VALUE[m][0])), im = h * K(R(VALUE[m][1]));
  Complex *LU = r.factors(m), *P = r.exchanges(m);
  fill<1>(LU, 0, [&](const At& at) { return Complex{E_of(r.J, at) + re * G_of(r.J, at), im * G_of(r.J, at)}; });
  factorise_filled<1>(f, LU, P, IMPLICIT ? r.scales(m) : nullptr);
}
// (I (x) E + h A (x) G)^-1 of residuals (STAGES, N), in the place found
static void solve_stages(const Room& r, const S* residuals, S* found) {
  for (int e = 0; e < BIG; e++) found[e] = K(0);
  for (int m = 0; m < MODES; m++) {
    if (VALUE[m][1] == 0) {
      S* x = r.point;
      for (int n = 0; n < N; n++) { x[n] = K(0); for (int i = 0; i < STAGES; i++) x[n] += K(R(OUT_OF[m][2 * i])) * residuals[i * N + n]; }
      filter_solve(r, x);
      for (int i = 0; i < STAGES; i++) for (int n = 0; n < N; n++) found[i * N + n] += K(R(INTO[m][2 * i])) * x[n];
    } else {
      Complex* x = (Complex*)r.point;
      for (int n = 0; n < N; n++) {
        x[n] = {K(0), K(0)};
        for (int i = 0; i < STAGES; i++) { x[n].re += K(R(OUT_OF[m][2 * i])) * residuals[i * N + n]; x[n].im += K(R(OUT_OF[m][2 * i + 1])) * residuals[i * N + n]; }
      }
      for (int n = 0; n < N && IMPLICIT; n++) x[n] = times(x[n], r.scales(m)[n]);
      solve_filled<1>(r.factors(m), r.exchanges(m), x);
      // the other one of the pair is the conjugate
      for (int i = 0; i < STAGES; i++) for (int n = 0; n < N; n++) found[i * N + n] += K(R(2 * INTO[m][2 * i])) * x[n].re - K(R(2 * INTO[m][2 * i + 1])) * x[n].im;
    }
  }
}
#if ALONG
// stages whose first halves are known, and of whose second ones, tangents, the equations are linear: with B = A^-1, of z = y + h A k
// sum_j b_ij E_i z_j + h G_i z_i = sum_j b_ij E_i y - h F_p s, as a product of G and y would magnify the rounding of y by the stiffness
static void step_forward(Attempt& a) {
  Room r(a.work);
  S *z = r.side, *ks = a.ks;
  const S one = m_sel((M)(a.h == K(0)), K(1), a.h);
  for (int i = 0; i < STAGES; i++) {
    S *given = z + i * N, *start = r.found, total = K(0);
    for (int j = 0; j < STAGES; j++) total += K(R(INVERSE[i][j]));
    for (int n = 0; n < N; n++) {
      const bool known = n < N / 2;
      r.base[n] = known ? a.y[n] + a.h * weighted(A[i], STAGES, ks, n) : K(0);
      if (IMPLICIT) r.base[N + n] = known ? ks[i * N + n] : K(0);
      start[n] = known ? K(0) : total * a.y[n];
    }
    a.f.fun(&a.c, a.times + i + 1, r.base, given);
    a.f.jac(&a.c, a.times + i + 1, r.base, r.J, r.point);
    for (int n = 0; n < N; n++) given[n] = n < N / 2 ? K(0) : mass_row(r.J, start, n) + (IMPLICIT ? -a.h : a.h) * given[n];
    fill<STAGES>(r.big, i, [&](const At& at) { return K(R(INVERSE[i][at.copy])) * E_of(r.J, at) + (i == at.copy ? a.h * G_of(r.J, at) : K(0)); });
  }
  factorise_filled<STAGES>(a.f, r.big, r.bigP, IMPLICIT ? r.sides : nullptr);
  for (int e = 0; e < BIG && IMPLICIT; e++) z[e] = r.sides[e] * z[e];
  solve_filled<STAGES>(r.big, r.bigP, z);
  for (int e = 0; e < BIG; e++) if (e % N >= N / 2) z[e] = (z[e] - a.y[e % N]) / one;
  for (int i = 0; i < STAGES; i++) for (int n = N / 2; n < N; n++) ks[i * N + n] = weighted(INVERSE[i], STAGES, z, n);
  for (int n = 0; n < N; n++) a.y1[n] = a.y[n] + a.h * weighted(B, STAGES, ks, n);
}
#else
static void step_forward(Attempt& a) {
  Room r(a.work);
  S *ks = a.ks, length, *d = r.found, *residuals = r.side;
  pencil(a.f, a.c, a.times[0], a.y, a.k1, r);
  for (int l = 0; l < W; l++) a.counts[JACOBIANS][l] += a.on[l] && !a.again[l];
  // E alone may be singular
  const S size = IMPLICIT ? m_sel((M)(a.h == K(0)), K(1), a.h) : a.h;
  // a real eigenvalue's matrix is that of the filter of the error
  if (FILTERED || SHARED_FILTER) { filter_matrix(a.f, r, size * K(R(GAMMA))); a.count(FACTORISATIONS); }
  for (int m = 0; m < MODES; m++) if (VALUE[m][1] != 0) { mode_matrix(a.f, r, size, m); a.count(FACTORISATIONS); }
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
    r.bound[n] = m_max(K(R(TOLERANCE)) * (size * a.step_rtol[n] + a.step_atol[n]), K(R(10 * REAL_EPSILON)) * size);
  }
  Newton newton(a, 1.0, a.adaptive ? MOST_COUPLED : MOST_CONSTANT);
  // the slopes of a step of no size are known
  for (int l = 0; l < W; l++) newton.running[l] = newton.running[l] && get(a.h, l) != 0;
  while (newton.round < newton.most && newton.any()) {
    for (int l = 0; l < W; l++) { const long n = newton.running[l]; a.counts[EVALUATED][l] += n * STAGES; a.counts[ITERATIONS][l] += n; a.counts[SOLVES][l] += n * MODES; }
    for (int i = 0; i < STAGES; i++) {
      for (int n = 0; n < N; n++) r.base[n] = a.y[n] + a.h * weighted(A[i], STAGES, ks, n);
      residual(a.f, a.c, a.times[i + 1], r.base, ks + i * N, r.base, residuals + i * N);
    }
    solve_stages(r, residuals, d);
    length = K(0);
    for (int i = 0; i < STAGES; i++) {
      S total = K(0);
      for (int n = 0; n < N; n++) { const S x = as_seen(a, a.h * weighted(A[i], STAGES, d, n), a.h, n) / r.bound[n]; total += x * x; }
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
  for (int n = 0; n < N; n++) {
    from_stages[n] = a.h * weighted(EMBEDDED, STAGES, ks, n);
    if (IMPLICIT) { r.side[n] = from_stages[n]; r.side[N + n] = hg * a.k1[n]; }
    else estimate[n] = from_stages[n] + hg * a.k1[n];
  }
  for (int n = 0; n < N && IMPLICIT; n++) { from_stages[n] = mass_row(r.J, r.side, n); estimate[n] = from_stages[n] + mass_row(r.J, r.side + N, n); }
  filter_solve(r, estimate);
  a.count(SOLVES);
  for (int n = 0; n < N; n++) { const S x = as_tested(a, estimate[n], a.h, n) / (m_max(m_abs(a.y[n]), m_abs(a.y1[n])) * a.step_rtol[n] + a.step_atol[n]); total += x * x; }
  total = m_sqrt(total) * K(R(ROOT));
  bool large[W], some = false;
  for (int l = 0; l < W; l++) {
    some |= large[l] = a.on[l] && get(total, l) > 1;
    if (large[l]) { a.counts[EVALUATED][l]++; a.counts[SOLVES][l]++; }
  }
  if (some) {
    S *moved = r.bound, *again = r.side;
    for (int n = 0; n < N; n++) moved[n] = a.y[n] + estimate[n];
    if (IMPLICIT) {
      // E y' at that state, near the slope at the start
      residual(a.f, a.c, a.times[0], moved, a.k1, moved, again);
      for (int n = 0; n < N; n++) again[n] = mass_row(r.J, a.k1, n) - again[n];
    } else a.f.fun(&a.c, a.times, moved, again);
    for (int n = 0; n < N; n++) again[n] = from_stages[n] + hg * again[n];
    filter_solve(r, again);
    const M on = mask_of(large);
    for (int n = 0; n < N; n++) estimate[n] = m_sel(on, again[n], estimate[n]);
  }
  for (int n = 0; n < N; n++) a.error[n] = as_tested(a, estimate[n], a.h, n);
}
#endif
FN void step_error(Attempt&) {}
template <int I, bool AGAIN = false> FN void dense_stages(Attempt&) {}

#if CONSTRAINED
// ---- for slopes.hpp and constraints.hpp
FN Pencil pencil_of(Attempt& a) { return Pencil(a.work); }
FN void filtered(Attempt& a, S* x) { filter_solve(Room(a.work), x); a.count(SOLVES); }
FN void residual(Attempt& a, const S& t, const S* y, const S* slope, S* out) { residual(a.f, a.c, t, y, slope, Room(a.work).base, out); }
FN void mass_times(Attempt& a, const S* v, S* out) { for (int n = 0; n < N; n++) out[n] = mass_row(Room(a.work).J, v, n); }
#endif

// ---- the adjoint: E_i* v_i + h sum_j a_ji G_j* v_j = kbar_i + h b_i l1, l0 = l1 - sum_i G_i* v_i
template <bool DENSE_OUTPUT> static void step_back(Return& a) {
  Room r(a.work);
  S *v = r.side, *u = r.point;
  auto stage = [&](int i) {
    for (int n = 0; n < N; n++) { r.base[n] = a.y[n] + a.h * weighted(A[i], STAGES, a.ks, n); if (IMPLICIT) r.base[N + n] = a.ks[i * N + n]; }
  };
  for (int i = 0; i < STAGES; i++) {
    stage(i);
    for (int n = 0; n < N; n++) {
      v[i * N + n] = a.h * K(R(B[i])) * a.bar[n];
      if (a.kbar) v[i * N + n] += a.kbar[i * N + n];
    }
    a.f.jac(&a.c, a.times + i + 1, r.base, r.J, r.point);
    fill<STAGES>(r.big, i, [&](const At& at) { return (i == at.copy ? E_of(r.J, at) : K(0)) + a.h * K(R(A[i][at.copy])) * G_of(r.J, at); });
  }
  factorise_filled<STAGES>(a.f, r.big, r.bigP, IMPLICIT ? r.sides : nullptr);
  solve_filled<STAGES, true>(r.big, r.bigP, v);
  // the slope is one of F = 0: its derivative has the other sign
  for (int e = 0; e < BIG && IMPLICIT; e++) v[e] = -(r.sides[e] * v[e]);
  for (int n = 0; n < N; n++) a.ybar[n] = a.bar[n];
  for (int i = 0; i < STAGES; i++) {
    S tb = K(0), dot = K(0);
    stage(i);
    a.f.vjp(&a.c, a.times + i + 1, r.base, v + i * N, u, &tb);
    for (int n = 0; n < N; n++) {
      a.ybar[n] += u[n];
      dot += K(R(B[i])) * a.ks[i * N + n] * a.bar[n] + weighted(A[i], STAGES, a.ks, n) * u[n];
    }
    if (a.timed) { a.tbar += tb; a.hbar += dot + K(R(C[i + 1])) * tb; }
  }
}

// One step of a diagonally implicit Runge-Kutta method and its adjoint, see `methods/dirk.py`. Constants: STAGES, ALL (as many), A with its
// diagonal, B, C, EMBEDDED, GUESSES, STIFFLY_ACCURATE, HANDS_ON. Slopes of stages are recorded.
#define RECORDED 1
#define ROOM_OF_STEP (ENTRIES + room_of_factors(1) + EXCHANGES + (STAGES + 4) * N)
struct Room {
  S *J, *LU, *P, *us, *base, *delta, *point, *spare;
  Room(S* at) : J(at), LU(J + ENTRIES), P(LU + room_of_factors(1)), us(P + EXCHANGES), base(us + STAGES * N), delta(base + N), point(delta + N), spare(point + N) {}
};
FN S weighted(const double* w, int count, const S* ks, int n) {
  S total = K(0);
  for (int j = 0; j < count; j++) if (w[j] != 0) total += K(R(w[j])) * ks[j * N + n];
  return total;
}
// k = f(t, base + hd k), from a guess in k: NaN in lanes where the iteration fails
static void implicit_stage(Attempt& a, const S& t, const S hd, const Room& r, S* k) {
  Newton newton(a, TOLERANCE, MOST);
  S* value = r.spare;
  while (newton.round < newton.most && newton.any()) {
    for (int l = 0; l < W; l++) { const long n = newton.running[l]; a.counts[EVALUATED][l] += n; a.counts[ITERATIONS][l] += n; a.counts[SOLVES][l] += n; }
    for (int n = 0; n < N; n++) r.point[n] = r.base[n] + hd * k[n];
    a.f.fun(&a.c, &t, r.point, value);
    // (I - hd J) dk = -(k - f): in terms of the slopes
    for (int n = 0; n < N; n++) r.delta[n] = k[n] - value[n];
    solve_shifted(r.LU, r.P, r.delta);
    S length = K(0);
    for (int n = 0; n < N; n++) { const S x = hd * r.delta[n] / (m_abs(r.base[n]) * a.rtol[n] + a.atol[n]); length += x * x; }
    const M moves = newton.judge(m_sqrt(length) * K(R(ROOT)));
    for (int n = 0; n < N; n++) k[n] = m_sel(moves, k[n] - r.delta[n], k[n]);
  }
  const M lost = newton.lost();
  for (int n = 0; n < N; n++) k[n] = m_sel(lost, K(NOT_A_NUMBER), k[n]);
}
// a stage whose first half is known, and of whose second one, a tangent, the equation is linear: (I - hd f_y) z = base + hd f_p s, in terms of the
// state, as a product with f_y would magnify the rounding of base by the stiffness
static void stage_along(Attempt& a, const S& t, const S hd, const Room& r, S* k) {
  const S one = m_sel((M)(hd == K(0)), K(1), hd);
  for (int n = 0; n < N; n++) r.point[n] = n < N / 2 ? r.base[n] + hd * k[n] : K(0);
  a.f.fun(&a.c, &t, r.point, r.delta);
  a.f.jac(&a.c, &t, r.point, r.J, r.spare);
  shifted_matrix(a.f, r.J, hd, r.LU, r.P);
  for (int n = 0; n < N; n++) r.delta[n] = n < N / 2 ? K(0) : r.base[n] + hd * r.delta[n];
  solve_shifted(r.LU, r.P, r.delta);
  for (int n = N / 2; n < N; n++) k[n] = (r.delta[n] - r.base[n]) / one;
}
static void step_forward(Attempt& a) {
  Room r(a.work);
  a.f.jac(&a.c, a.times, a.y, r.J, r.point);
  for (int l = 0; l < W; l++) a.counts[JACOBIANS][l] += a.on[l] && !a.again[l];
  double factored = 0;
  for (int i = 0; i < STAGES; i++) {
    S* k = a.ks + i * N;
    for (int n = 0; n < N; n++) r.base[n] = a.y[n] + a.h * weighted(A[i], i, a.ks, n);
    const double diagonal = A[i][i];
    if (diagonal == 0) {
      if (i == 0) for (int n = 0; n < N; n++) k[n] = a.k1[n];
      else { a.f.fun(&a.c, a.times + i, r.base, k); a.count(EVALUATED); }
      continue;
    }
    if (ALONG) { stage_along(a, a.times[i], a.h * K(R(diagonal)), r, k); continue; }
    if (diagonal != factored) { shifted_matrix(a.f, r.J, a.h * K(R(diagonal)), r.LU, r.P); a.count(FACTORISATIONS); factored = diagonal; }
    for (int n = 0; n < N; n++) k[n] = i ? weighted(GUESSES[i], i, a.ks, n) : a.k1[n];
    implicit_stage(a, a.times[i], a.h * K(R(diagonal)), r, k);
  }
  const S* last = a.ks + (STAGES - 1) * N;
  for (int n = 0; n < N; n++)
    a.y1[n] = STIFFLY_ACCURATE ? r.base[n] + a.h * K(R(A[STAGES - 1][STAGES - 1])) * last[n] : a.y[n] + a.h * weighted(B, STAGES, a.ks, n);
}
FN void step_error(Attempt& a) {
  for (int n = 0; n < N; n++) a.error[n] = a.h * weighted(EMBEDDED, STAGES, a.ks, n);
}
template <int I, bool AGAIN = false> FN void dense_stages(Attempt&) {}

// ---- the adjoint: (I - h a_ii f_y(Y_i))* v_i = kbar_i + h (b_i l1 + sum a_ji u_j), u_i = (v_i - that) / (h a_ii)
template <bool DENSE_OUTPUT> static void step_back(Return& a) {
  Room r(a.work);
  S *v = r.base, *arrived = r.delta;
  for (int n = 0; n < N; n++) a.ybar[n] = a.bar[n];
  for (int i = STAGES - 1; i >= 0; i--) {
    S *u = r.us + i * N, dot = K(0), tb = K(0);
    for (int n = 0; n < N; n++) {
      S w = K(R(B[i])) * a.bar[n];
      for (int j = i + 1; j < STAGES; j++) if (A[j][i] != 0) w += K(R(A[j][i])) * r.us[j * N + n];
      dot += a.ks[i * N + n] * w;
      v[n] = a.kbar ? a.kbar[i * N + n] + a.h * w : a.h * w;
    }
    if (a.timed) a.hbar += dot;
    if (i == 0 && HANDS_ON) { for (int n = 0; n < N; n++) a.first[n] = v[n]; return; }
    for (int n = 0; n < N; n++) r.point[n] = a.y[n] + a.h * weighted(A[i], i + 1, a.ks, n);
    const S hd = a.h * K(R(A[i][i]));
    if (A[i][i] != 0) {
      for (int n = 0; n < N; n++) arrived[n] = v[n];
      a.f.jac(&a.c, a.times + i, r.point, r.J, u);
      shifted_matrix(a.f, r.J, hd, r.LU, r.P);
      solve_shifted<true>(r.LU, r.P, v);
    }
    a.f.vjp(&a.c, a.times + i, r.point, v, u, &tb);
    // a product with f_y* would magnify the rounding of v by the stiffness
    if (A[i][i] != 0) {
      const S one = m_sel((M)(hd == K(0)), K(1), hd);
      for (int n = 0; n < N; n++) u[n] = (v[n] - arrived[n]) / one;
    }
    dot = K(0);
    for (int n = 0; n < N; n++) { a.ybar[n] += u[n]; dot += a.ks[i * N + n] * u[n]; }
    if (a.timed) { a.tbar += tb; a.hbar += K(R(C[i])) * tb + K(R(A[i][i])) * dot; }
  }
}

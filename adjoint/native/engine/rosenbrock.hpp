// One step of a Rosenbrock method and its adjoint, see `Rosenbrock` in `methods/rosenbrock.py`; with MASS of M y' = f(t, y). Constants: STAGES, ALL (as many), A, COUPLING,
// B, C, D, EMBEDDED (of the error), GAMMA, and SAME, which of the evaluations of fun a stage uses. Stages are recorded: the way back needs the Jacobian alone.
#define RECORDED 1
#define HANDS_ON 0
#define ROOM_OF_STEP (ENTRIES + room_of_factors(1) + MASS * N * N + EXCHANGES + (2 * STAGES + 3) * N)
struct Room {
  S *J, *LU, *P, *values, *slope, *z, *us, *spare, *mass;
  Room(S* at) : J(at), LU(J + ENTRIES), P(LU + room_of_factors(1)), values(P + EXCHANGES), slope(values + STAGES * N), z(slope + N), us(z + N), spare(us + STAGES * N),
    mass(spare + N) {}
  // the factors of M - h gamma J at the start of a step
  void factorise(const Functions& f, const Ctx& c, const S* times, const S* y, const S& h) {
    f.jac(&c, times, y, J, slope);
    if (MASS) f.mass(&c, times, y, mass);
    shifted_matrix(f, J, h * K(R(GAMMA)), LU, P, MASS ? mass : nullptr);
  }
};
template <int I, int J = 0> FN S row_sum(const S* ks, int n, S total) {
  if constexpr (J < I) { if constexpr (A[I][J] != 0) total += K(R(A[I][J])) * ks[J * N + n]; return row_sum<I, J + 1>(ks, n, total); } else return total;
}
template <int I, int J = 0> FN S coupled(const S* ks, int n, S total) {
  if constexpr (J < I) { if constexpr (COUPLING[I][J] != 0) total += K(R(COUPLING[I][J])) * ks[J * N + n]; return coupled<I, J + 1>(ks, n, total); } else return total;
}
template <int J = 0> FN S weighted(const double* w, const S* ks, int n) {
  S total = K(0);
  for (int j = 0; j < STAGES; j++) if (w[j] != 0) total += K(R(w[j])) * ks[j * N + n];
  return total;
}
template <int I> FN void further_stages(const Functions& f, const Ctx& c, const S* times, const S h, const S* y, S* ks, Room& r) {
  if constexpr (I < STAGES) {
    if constexpr (I > 0 && SAME[I] == I) {
      for (int n = 0; n < N; n++) r.z[n] = y[n] + h * row_sum<I>(ks, n, K(0));
      f.fun(&c, times + I, r.z, r.values + I * N);
    }
    S* k = ks + I * N;
    if constexpr (MASS) for (int n = 0; n < N; n++) r.spare[n] = coupled<I>(ks, n, K(0));
    for (int n = 0; n < N; n++) {
      S side = r.values[SAME[I] * N + n];
      if constexpr (MASS) for (int m = 0; m < N; m++) side += r.mass[n * N + m] * r.spare[m];
      else side = coupled<I>(ks, n, side);
      if constexpr (D[I] != 0) side += h * K(R(D[I])) * r.slope[n];
      k[n] = side * K(R(GAMMA));
    }
    solve_shifted(r.LU, r.P, k);
    further_stages<I + 1>(f, c, times, h, y, ks, r);
  }
}
FN void step_forward(Attempt& a) {
  Room r(a.work);
  r.factorise(a.f, a.c, a.times, a.y, a.h);
  // divided by a Jacobian that is infinite every slope would be zero, and its error too: such a step is none
  S wild = K(0);
  for (int e = 0; e < N * N; e++) if (NONZERO[e]) wild += K(0) * r.J[e];
  for (int n = 0; n < N; n++) r.values[n] = a.k1[n] + wild;
  further_stages<0>(a.f, a.c, a.times, a.h, a.y, a.ks, r);
  for (int n = 0; n < N; n++) a.y1[n] = a.y[n] + a.h * weighted(B, a.ks, n);
  for (int l = 0; l < W; l++) a.counts[JACOBIANS][l] += a.on[l] && !a.again[l];
  a.count(FACTORISATIONS);
  a.count(SOLVES, STAGES);
}
FN void step_error(Attempt& a) {
  for (int n = 0; n < N; n++) a.error[n] = a.h * weighted(EMBEDDED, a.ks, n);
}
template <int I, bool AGAIN = false> FN void dense_stages(Attempt&) {}
#if MASS
// ---- for constraints.hpp: with E = M and G = -f_y at the start of the step
FN void filtered(Attempt& a, S* x) { Room r(a.work); solve_shifted(r.LU, r.P, x); a.count(SOLVES); }
static void residual(Attempt& a, const S& t, const S* y, const S* slope, S* out) {
  Room r(a.work);
  a.f.fun(&a.c, &t, y, r.z);
  for (int n = 0; n < N; n++) { S total = -r.z[n]; for (int m = 0; m < N; m++) total += r.mass[n * N + m] * slope[m]; out[n] = total; }
}
FN void mass_times(Attempt& a, const S* v, S* out) {
  Room r(a.work);
  for (int n = 0; n < N; n++) { S total = K(0); for (int m = 0; m < N; m++) total += r.mass[n * N + m] * v[m]; out[n] = total; }
}
#endif

// ---- the adjoint: v_i = gamma W*^-1 (kbar_i + sum gamma_ji v_j + h (b_i l1 + sum a_ji u_j)), u_j = f_y(Y_j)* v_j
template <int I, int J> FN void later(const S* us, const S* vs, int n, S& w, S& v) {
  if constexpr (J < STAGES) {
    if constexpr (A[J][I] != 0 && SAME[J] == J) w += K(R(A[J][I])) * us[J * N + n];
    if constexpr (COUPLING[J][I] != 0) v += K(R(COUPLING[J][I])) * vs[J * N + n];
    later<I, J + 1>(us, vs, n, w, v);
  }
}
template <int I> FN void stages_back(const Functions& f, const Ctx& c, const S* times, const S h, const S* y, const S* ks, const S* bar, const S* kbar, S* vs,
                                     S* us, S* ybar, bool timed, S& tbar, S& hbar, Room& r) {
  if constexpr (I >= 0) {
    S* v = vs + I * N;
    for (int n = 0; n < N; n++) {
      const S own = kbar ? kbar[I * N + n] : K(0);
      S w = K(R(B[I])) * bar[n], x = MASS ? K(0) : own;
      later<I, I + 1>(us, vs, n, w, x);
      if (timed) hbar += ks[I * N + n] * w;
      if constexpr (MASS) { r.z[n] = x; x = own; }
      v[n] = x + h * w;
    }
    if constexpr (MASS) for (int n = 0; n < N; n++) for (int m = 0; m < N; m++) v[n] += r.mass[m * N + n] * r.z[m];
    solve_shifted<true>(r.LU, r.P, v);
    for (int n = 0; n < N; n++) v[n] *= K(R(GAMMA));
    if constexpr (SAME[I] == I) {
      S tb = K(0);
      for (int n = 0; n < N; n++) {
        S total = v[n];
        for (int j = I + 1; j < STAGES; j++) if (SAME[j] == I) total += vs[j * N + n];
        r.slope[n] = total;
        r.z[n] = y[n] + h * row_sum<I>(ks, n, K(0));
      }
      f.vjp(&c, times + I, r.z, r.slope, us + I * N, &tb);
      for (int n = 0; n < N; n++) ybar[n] += us[I * N + n];
      if (timed) { tbar += tb; hbar += K(R(C[I])) * tb; }
    }
    stages_back<I - 1>(f, c, times, h, y, ks, bar, kbar, vs, us, ybar, timed, tbar, hbar, r);
  }
}
template <bool DENSE_OUTPUT> FN void step_back(Return& a) {
  Room r(a.work);
  const S h = a.h, *ks = a.ks;
  r.factorise(a.f, a.c, a.times, a.y, h);
  for (int n = 0; n < N; n++) a.ybar[n] = a.bar[n];
  S* vs = r.values;
  stages_back<STAGES - 1>(a.f, a.c, a.times, h, a.y, ks, a.bar, a.kbar, vs, r.us, a.ybar, a.timed, a.tbar, a.hbar, r);
  S* weights = r.LU;
  if constexpr (MASS) {
    // M multiplies sum_j gamma_ij K_j - K_i / gamma in stage i
    for (int e = 0; e < N * N; e++) weights[e] = K(0);
    for (int i = 0; i < STAGES; i++) for (int m = 0; m < N; m++) {
      S x = K(R(-1 / GAMMA)) * ks[i * N + m];
      for (int j = 0; j < i; j++) if (COUPLING[i][j] != 0) x += K(R(COUPLING[i][j])) * ks[j * N + m];
      for (int n = 0; n < N; n++) weights[n * N + m] += vs[i * N + n] * x;
    }
    S nothing_ = K(0);
    a.f.mass_vjp(&a.c, a.times, a.y, weights, r.slope, &nothing_);
  }
  // the Jacobian is an input of the step like any other
  for (int i = 0; i < N; i++) row_of(i, [&](const At& at) {
    S total = K(0);
    if (SPARSE || NONZERO[at.entry]) for (int s = 0; s < STAGES; s++) total += vs[s * N + i] * ks[s * N + at.j];
    weights[at.entry] = h * total;
  });
  for (int n = 0; n < N; n++) r.slope[n] = h * weighted(D, vs, n);
  S tb = K(0), phi = K(0);
  a.f.bend(&a.c, a.times, a.y, weights, r.slope, a.ybar, &tb, &phi);
  if (a.timed) { a.tbar += tb; a.hbar += phi / h; }
}

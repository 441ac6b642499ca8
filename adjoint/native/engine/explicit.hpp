#define ROOM_OF_STEP ((2 * ALL + 1) * N)
#define RECORDED 0
#define HANDS_ON 0
// One step of an explicit Runge-Kutta method and its adjoint (docs/theory.md, section 1). Of the tableau come, as constants: STAGES of the
// step, ALL with those of the dense output, A, B, C, EMBEDDED (of the error) and DENSE, and how the last stages relate to the next step.

// sum_j A[I][j] k_j, component n
template <int I, int J = 0> FN S row_sum(const S* ks, int n, S total) {
  if constexpr (J < I) {
    if constexpr (A[I][J] != 0) total += K(R(A[I][J])) * ks[J * N + n];
    return row_sum<I, J + 1>(ks, n, total);
  } else return total;
}
template <int J = 0> FN S weighted(const S* ks, int n, S total) {
  if constexpr (J < STAGES) {
    if constexpr (B[J] != 0) total += K(R(B[J])) * ks[J * N + n];
    return weighted<J + 1>(ks, n, total);
  } else return total;
}
template <int J = 0> FN S error_sum(const S* ks, int n, S total) {
  if constexpr (J < ERRORS) {
    if constexpr (EMBEDDED[J] != 0) total += K(R(EMBEDDED[J])) * ks[J * N + n];
    return error_sum<J + 1>(ks, n, total);
  } else return total;
}
template <int I> FN void stage_state(const S h, const S* y, const S* ks, S* z) {
  for (int n = 0; n < N; n++) z[n] = y[n] + h * row_sum<I>(ks, n, K(0));
}
// stages I, I + 1, ... of the step, the first being known; the state of the last one is kept in y1
template <int I> FN void further_stages(const Functions& f, const Ctx& c, const S* times, const S h, const S* y, S* ks, S* y1) {
  if constexpr (I < STAGES) {
    stage_state<I>(h, y, ks, y1);
    f.fun(&c, times + I, y1, ks + I * N);
    further_stages<I + 1>(f, c, times, h, y, ks, y1);
  }
}
FN void step_forward(Attempt& a) {
  for (int n = 0; n < N; n++) a.ks[n] = a.k1[n];
  further_stages<1>(a.f, a.c, a.times, a.h, a.y, a.ks, a.y1);
  // where the last stage is the end of the step, its state is there already
  if (!FSAL) for (int n = 0; n < N; n++) a.y1[n] = a.y[n] + a.h * weighted<0>(a.ks, n, K(0));
}
FN void step_error(Attempt& a) {
  for (int n = 0; n < N; n++) a.error[n] = a.h * error_sum<0>(a.ks, n, K(0));
}
// the stages that only the dense output needs; where the first of them is the slope at the end, it is there already, but where steps are taken AGAIN
template <int I, bool AGAIN = false> FN void dense_stages(Attempt& a) {
  if constexpr (I < ALL) {
    if constexpr (AGAIN || !(I == STAGES && NEXT_FIRST)) {
      stage_state<I>(a.h, a.y, a.ks, a.work);
      a.f.fun(&a.c, a.times + I, a.work, a.ks + I * N);
    }
    dense_stages<I + 1, AGAIN>(a);
  }
}
// ---- the adjoint: v_i = h (b_i l1 + sum_j a_ji u_j) + kbar_i, u_i = f_y(Y_i)* v_i, l0 = l1 + sum_i u_i
template <int I, int J, int USED> FN S from_later(const S* us, int n, S total) {
  if constexpr (J < USED) {
    if constexpr (A[J][I] != 0) total += K(R(A[J][I])) * us[J * N + n];
    return from_later<I, J + 1, USED>(us, n, total);
  } else return total;
}
template <int I, int USED> FN void stages_again(const Functions& f, const Ctx& c, const S* times, const S h, const S* y, S* zs, S* ks, bool all) {
  if constexpr (I < USED) {
    stage_state<I>(h, y, ks, zs + I * N);
    if (I < USED - 1 || all) f.fun(&c, times + I, zs + I * N, ks + I * N);
    stages_again<I + 1, USED>(f, c, times, h, y, zs, ks, all);
  }
}
template <int I, int USED> FN void stages_back(const Functions& f, const Ctx& c, const S* times, const S h, const S* zs, const S* ks, const S* bar,
                                               const S* kbar, S* us, S* v, S* ybar, bool timed, S& tbar, S& hbar) {
  if constexpr (I >= 0) {
    S tb = K(0);
    for (int n = 0; n < N; n++) {
      S w = K(0);
      if constexpr (I < STAGES) { if constexpr (B[I] != 0) w = K(R(B[I])) * bar[n]; }
      w = from_later<I, I + 1, USED>(us, n, w);
      if (timed) hbar += ks[I * N + n] * w;
      v[n] = kbar ? kbar[I * N + n] + h * w : h * w;
    }
    f.vjp(&c, times + I, zs + I * N, v, us + I * N, &tb);
    for (int n = 0; n < N; n++) ybar[n] += us[I * N + n];
    if (timed) { tbar += tb; hbar += K(R(C[I])) * tb; }
    stages_back<I - 1, USED>(f, c, times, h, zs, ks, bar, kbar, us, v, ybar, timed, tbar, hbar);
  }
}
// ks: the stages, where times count
template <bool DENSE_OUTPUT> FN void step_back(Return& r) {
  enum { USED = DENSE_OUTPUT ? ALL : STAGES - FSAL };
  // in memory of their own: states may be large
  S *zs = r.work, *us = zs + ALL * N, *v = us + ALL * N;
  stages_again<0, USED>(r.f, r.c, r.times, r.h, r.y, zs, r.ks, r.timed);
  for (int n = 0; n < N; n++) r.ybar[n] = r.bar[n];
  stages_back<USED - 1, USED>(r.f, r.c, r.times, r.h, zs, r.ks, r.bar, r.kbar, us, v, r.ybar, r.timed, r.tbar, r.hbar);
}

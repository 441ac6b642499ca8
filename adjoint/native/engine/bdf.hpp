// Backward differentiation formulas of variable order and step, and their adjoint: the rules of `integrate/bdf.py` and
// `sensitivity/bdf.py`. What a step knows of those before is a table of differences at equal distances, (DIFFERENCES, N), the state first. Constants,
// by order from 0 on: GAMMA, ALPHA, UNLIKE (their difference), CONSTANTS (of error estimates) and SLOPES, (ORDERS + 1, ORDERS + 1) each, of the matrix that brings the table
// to another distance, by the ratio of the two where that is one; of iterations BOUND and ROUNDS; of sizes SMALLEST_FACTOR, LARGEST_FACTOR, SAFE.
// Differences and correction over h are recorded as stages. The equation of a step is c F(t, p + d, (psi + d) / c) = 0 for the correction d of the
// prediction p, with F = y' - f of an ODE.
#define RECORDED 1
#define HANDS_ON 0
enum { ORDERS = STAGES - 1, DIFFERENCES = ORDERS + 3 };
#define ROOM_OF_STEP ((2 * DIFFERENCES + 6) * (long)N + ROOM_OF_JACOBIAN + 2 * ROOM_OF_PENCIL)
#if IMPLICIT
// ---- for slopes.hpp, whose matrices are none of those that are kept
FN Pencil pencil_of(Attempt& a) { return Pencil(a.work + ROOM_OF_STEP - ROOM_OF_PENCIL); }
static void find_slopes(Attempt& a, const S& t, const double* sign, double* width, const bool* wanted, S* slope, double* fast);
#endif

// what formulas weigh, in every lane by its own order
struct Formula {
  M low[DIFFERENCES], next[DIFFERENCES], after[DIFFERENCES];  // up to the order; one and two beyond it
  S weight[ORDERS + 1], constant, c, unlike;  // of psi; of the error; h / alpha; by how much the slope differs from that of the differences
  Formula(const long* order, const S& h) {
    const J q = whole(order);
    const S alpha = looked_up(ALPHA, order), over = K(1) / alpha;
    for (int j = 0; j < DIFFERENCES; j++) { low[j] = no_less(q, j); next[j] = equal_to(q, j - 1); after[j] = equal_to(q, j - 2); }
    for (int j = 0; j <= ORDERS; j++) weight[j] = m_sel(low[j], K(R(GAMMA[j])) * over, K(0));
    constant = looked_up(CONSTANTS, order);
    c = h / alpha;
    unlike = looked_up(UNLIKE, order);
  }
};
// the matrix that brings differences to distances ``ratio`` as large: with z for the operator of differences, z^i becomes (1 - (1 - z)^ratio)^i,
// up to z^order. Its first row and column are those of the unit matrix, and T[i][j] = 0 for i > j
struct Rescaling {
  S T[ORDERS + 1][ORDERS + 1];
  long highest;
  Rescaling(const long* order, const double* ratio) : highest(1) {
    const J q = whole(order);
    for (int l = 0; l < W; l++) if (order[l] > highest) highest = order[l];
    DV first[ORDERS + 1], row[ORDERS + 1];
    first[1] = row[1] = doubles(ratio);
    for (int k = 2; k <= highest; k++) first[k] = row[k] = first[k - 1] * (double(k - 1) - first[1]) / double(k);
    for (int i = 1; i <= highest; i++) {
      for (int j = i; j <= highest; j++) T[i][j] = m_sel(no_less(q, j), narrow(row[j]), K(R(i == j)));
      for (int j = highest; j > i; j--) { DV total = first[1] * row[j - 1]; for (int k = 2; j - k >= i; k++) total += first[k] * row[j - k]; row[j] = total; }
    }
  }
};

struct History {
  Pencil now;
  S *D, *following, *taken, *psi, *predicted, *base, *d, *value, *change;  // following: the table behind the attempt
  long order[W], equal[W], rounds[W];     // equal: steps at the present distance; rounds of the last iteration
  double ratio[W], kept[W], factored[W];  // what is recorded of a step, see `BdfSolver`; c of the factors
  bool known[W], solved[W];               // whether there is a Jacobian; whether the iteration converged
  bool settling[W]; double longer[W];     // see `BdfSolver._settle`
  History(S* at) : now(at), D(at + ROOM_OF_PENCIL), following(D + DIFFERENCES * N), taken(following + DIFFERENCES * N), psi(taken + ROOM_OF_JACOBIAN), predicted(psi + N),
    base(predicted + N), d(base + N), value(d + N), change(value + N) {
    for (int l = 0; l < W; l++) { order[l] = 1; equal[l] = rounds[l] = 0; ratio[l] = kept[l] = longer[l] = 1; factored[l] = NOT_A_NUMBER; known[l] = solved[l] = settling[l] = false; }
  }
  // a trajectory, from the state and the slope of the loop
  template <class O> void begin(O& o, int l) {
    // one that is not finite has no step
    if (o.step[l]) o.step[l] = least(most(o.step[l], o.q.min_step), o.q.max_step);
    for (int e = 0; e < DIFFERENCES * N; e++) put(D[e], l, R(0));
    for (int n = 0; n < N; n++) { put(D[n], l, get(o.y[n], l)); put(D[N + n], l, (R)(o.sign[l] * o.step[l]) * get(o.k1[n], l)); }
    order[l] = 1; equal[l] = 0; ratio[l] = kept[l] = 1; factored[l] = NOT_A_NUMBER; known[l] = settling[l] = false;
  }
  // the table times a matrix, of the numbers from such a one on
  void multiply(const Rescaling& m, int from) {
    for (int n = from; n < N; n++) for (int i = 1; i <= m.highest; i++) {
      S total = K(0);
      for (int j = i; j <= m.highest; j++) total += m.T[i][j] * D[j * N + n];
      D[i * N + n] = total;
    }
  }
  // the table of some lanes to ``factor`` of its distance
  void rescale(const bool* which, const double* factor) {
    double by[W];
    bool any = false;
    for (int l = 0; l < W; l++) { by[l] = which[l] ? factor[l] : 1; any |= by[l] != 1; }
    if (!any) return;
    multiply(Rescaling(order, by), 0);
    for (int l = 0; l < W; l++) if (by[l] != 1) { ratio[l] *= by[l]; equal[l] = 0; }
  }
  // steps are to have the size of h, whatever was said
  void fit(const Flags& on, const Doubles& h, Doubles& step) {
    bool which[W];
    double factor[W];
    for (int l = 0; l < W; l++) {
      const double size = BD(fabs)(h[l]);
      which[l] = on[l] && size != step[l];
      factor[l] = size / step[l];
      if (which[l]) step[l] = size;
    }
    rescale(which, factor);
  }
  void note(int l, double* at, long stride) const { at[0] = order[l]; at[stride] = ratio[l]; at[2 * stride] = kept[l]; }
  // which attempts are accepted, and the sizes of the steps that follow the others
  template <class O> LV judge(O& o) {
    Flags passed;
    bool which[W];
    double factor[W];
    for (int l = 0; l < W; l++) {
      o.bad.set(l, !solved[l]);
      passed.set(l, o.on[l] && solved[l] && o.level[l] <= 1);
      which[l] = o.on[l] && !passed[l];
      if (!which[l]) continue;
      factor[l] = 0.5;
      if (solved[l]) {
        factor[l] = SMALLEST_FACTOR;
        if (finite(o.level[l])) factor[l] = least(most(safety(l) * BD(pow)(most(o.level[l], 1e-30), -1.0 / (order[l] + 1)), SMALLEST_FACTOR), 1);
      }
      o.step[l] *= factor[l];
    }
    rescale(which, factor);
    return passed.v;
  }
  double safety(int l) const { return SAFE * (2 * ROUNDS + 1) / (2 * ROUNDS + rounds[l]); }
  template <class O> void arrive(O&, const Flags&, S*) {}
#if ALONG
  // the table at the start of a recorded step: see `matrices` in sensitivity/bdf.py
  void recall(const double* known, long stride, const long* row) {
    for (int l = 0; l < W; l++) { order[l] = (long)known[row[l]]; ratio[l] = known[stride + row[l]]; kept[l] = known[2 * stride + row[l]]; }
    bool whole[W];
    for (int l = 0; l < W; l++) whole[l] = kept[l] != 0;
    const M all = mask_of(whole);
    multiply(Rescaling(order, ratio), N / 2);
    for (int n = N / 2; n < N; n++) for (int i = 2; i < DIFFERENCES; i++) D[i * N + n] = m_sel(all, D[i * N + n], K(0));
  }
#endif
  // behind the steps of the lanes ``taken_``
  template <class O> void take(O&, const M& taken_, const Flags& passed) {
    for (int e = 0; e < DIFFERENCES * N; e++) D[e] = m_sel(taken_, following[e], D[e]);
    for (int l = 0; l < W; l++) if (passed[l]) { ratio[l] = kept[l] = 1; equal[l]++; }
  }
  // the error, in units of the tolerance, of lanes that would go on at an order ``more`` than the present one
  void levels(const Attempt& a, int more, const bool* ready, const S* size, double* found) const {
    const J q = whole(order);
    const S constant = looked_up(CONSTANTS + more, order);
    S total = K(0);
    for (int n = 0; n < N; n++) {
      S x = D[n];
      for (int j = 1; j < DIFFERENCES; j++) x = m_sel(equal_to(q, j - more - 1), D[j * N + n], x);
      const S e = as_tested(a, constant * x, a.h, n) / unit_of(a, size[n], n);
      total += e * e;
    }
    total = root_of(total);
    for (int l = 0; l < W; l++) found[l] = ready[l] && order[l] + more >= 1 && order[l] + more <= ORDERS ? get(total, l) : BEYOND_ALL;
  }
  // orders and sizes behind the steps that ``passed``, of lanes that go on
  template <class O> void follow(O& o, const Flags& passed) {
    bool which[W], ready[W], any = false;
    double factor[W], below[W], above[W];
    for (int l = 0; l < W; l++) {
      which[l] = passed[l] && o.live[l];
      ready[l] = which[l] && !o.lands[l] && equal[l] > order[l];
      any |= ready[l];
      factor[l] = 1;
      if (!which[l] || !o.lands[l]) continue;
      // behind a discontinuity differences say nothing
      forget(l);
      factor[l] = IMPLICIT ? 1 : 0.1;
    }
    if (any) {
      levels(o.a, -1, ready, o.size, below);
      levels(o.a, 1, ready, o.size, above);
      Doubles largest, best, powers;
      largest.v = best.v = DV{};
      for (int i = 0; i < 3; i++) {
        for (int l = 0; l < W; l++) powers[l] = -1.0 / (order[l] + i);
        const DV x = d_power(d_most(i == 1 ? o.level.v : doubles(i ? above : below), d_all(1e-30)), powers.v);
        const LV better = THAT(x > largest.v);
        largest.v = d_sel(better, x, largest.v);
        best.v = d_sel(better, d_all(i - 1), best.v);
      }
      for (int l = 0; l < W; l++) if (ready[l]) {
        factor[l] = least(most(safety(l) * largest[l], SMALLEST_FACTOR), LARGEST_FACTOR);
        // small changes are not worth a new matrix
        if (factor[l] > 0.95 && factor[l] < 1.2 && best[l] == 0) factor[l] = 1;
        order[l] += (long)best[l];
      }
    }
    for (int l = 0; l < W; l++) o.step[l] *= factor[l];
    rescale(which, factor);
#if IMPLICIT
    settle(o, passed);
#endif
  }
  void forget(int l) {
    for (int e = 2 * N; e < DIFFERENCES * N; e++) put(D[e], l, R(0));
    order[l] = 1; equal[l] = 0; kept[l] = 0;
  }
#if IMPLICIT
  // The step behind a named jump, where algebraic variables may jump too, is so small that nothing else moves, and not tested; the solve goes on
  // from its end, with the slope there, by steps of the size that it would have had.
  template <class O> void settle(O& o, const Flags& passed) {
    S now = K(0);
    bool which[W], settled[W], any = false;
    double factor[W], brief[W], fast[W];
    for (int l = 0; l < W; l++) {
      const bool landed = o.lands[l];
      which[l] = passed[l] && o.live[l] && (landed || settling[l]);
      settled[l] = which[l] && !landed;
      any |= settled[l];
      factor[l] = 1;
      // as fun sees it at the start of the next step
      put(now, l, moved((R)o.t[l], o.jumps_end[l], o.sign[l] * BEYOND_ALL));
      const double size = BD(fabs)(o.h[l]), smallest = 64 * REAL_EPSILON * BD(fabs)(get(now, l));
      brief[l] = least(0.1 * size, most(most(1e-10 * o.span[l], smallest), o.q.min_step));
      if (!which[l]) continue;
      if (settled[l]) forget(l);
      factor[l] = landed ? brief[l] / size : longer[l];
      if (landed) longer[l] = 0.1 * size / brief[l];
      settling[l] = landed;
    }
    if (any) {
      find_slopes(o.a, now, &o.sign[0], brief, settled, value, fast);
      for (int l = 0; l < W; l++) if (settled[l]) for (int n = 0; n < N; n++) put(D[N + n], l, get(value[n], l) * (R)o.h[l]);
    }
    for (int l = 0; l < W; l++) o.step[l] *= factor[l];
    rescale(which, factor);
  }
#endif
};
// the matrices at the prediction, of some lanes
static void take_matrices(Attempt& a, const S& c, const bool* which) {
  History& p = *a.past;
  Pencil there = p.now;
  there.J = p.taken;
  for (int n = 0; n < N && IMPLICIT; n++) p.value[n] = p.psi[n] / c;
  pencil(a.f, a.c, a.times[0], p.predicted, p.value, there);
  const M on = mask_of(which);
  for (int e = 0; e < ROOM_OF_JACOBIAN; e++) p.now.J[e] = m_sel(on, p.taken[e], p.now.J[e]);
  for (int l = 0; l < W; l++) if (which[l]) { p.known[l] = true; p.factored[l] = NOT_A_NUMBER; a.counts[JACOBIANS][l]++; }
}
// the correction, by Newton's iteration with old matrices
static void correct(Attempt& a, const S& c, const bool* which) {
  History& p = *a.past;
  bool anew = false;
  for (int l = 0; l < W; l++) if (which[l] && p.factored[l] != get(c, l)) { anew = true; a.counts[FACTORISATIONS][l]++; p.factored[l] = get(c, l); }
  if (anew) filter_matrix(a.f, p.now, c);
  const M on = mask_of(which);
  for (int n = 0; n < N; n++) { a.y1[n] = m_sel(on, p.predicted[n], a.y1[n]); p.d[n] = m_sel(on, K(0), p.d[n]); p.base[n] = m_sel(on, p.psi[n], p.base[n]); }
  Newton newton(a, BOUND, ROUNDS, which, 1, false);
  for (int l = 0; l < W; l++) if (which[l]) { p.rounds[l] = 0; a.stuck[l] = false; }
  while (newton.round < newton.most && newton.any()) {
    for (int l = 0; l < W; l++) { const long n = newton.running[l]; p.rounds[l] += n; a.counts[EVALUATED][l] += n; a.counts[ITERATIONS][l] += n; a.counts[SOLVES][l] += n; }
    if (IMPLICIT) {
      for (int n = 0; n < N; n++) p.value[n] = p.base[n] / c;
      residual(a.f, a.c, a.times[0], a.y1, p.value, p.now.base, p.change);
      for (int n = 0; n < N; n++) p.change[n] = c * p.change[n];
    } else {
      a.f.fun(&a.c, a.times, a.y1, p.value);
      for (int n = 0; n < N; n++) p.change[n] = p.base[n] - c * p.value[n];
    }
    filter_solve(p.now, p.change);
    S length = K(0);
    for (int n = 0; n < N; n++) { const S x = p.change[n] / (m_abs(p.predicted[n]) * a.rtol[n] + a.atol[n]); length += x * x; }
    const M moves = newton.judge(m_sqrt(length) * K(R(ROOT)));
    for (int n = 0; n < N; n++) {
      const S x = m_sel(moves, p.change[n], K(0));
      a.y1[n] -= x; p.d[n] -= x; p.base[n] -= x;
    }
  }
  newton.lost();
  for (int l = 0; l < W; l++) if (which[l]) p.solved[l] = !newton.failed[l];
}
// D_j becomes the sum of D_j ... D_q and the correction d; behind them come d and d - D_{q + 1}; from such a number on
static void next_table(Attempt& a, const Formula& f, int from) {
  History& p = *a.past;
  const S over = K(1) / m_sel((M)(a.h == K(0)), K(1), a.h);
  for (int n = from; n < N; n++) {
    S total = p.d[n];
    for (int j = DIFFERENCES - 1; j >= 0; j--) {
      const S old = p.D[j * N + n];
      total = m_sel(f.low[j], total + old, total);
      p.following[j * N + n] = m_sel(f.low[j], total, m_sel(f.next[j], p.d[n], m_sel(f.after[j], p.d[n] - p.D[(j ? j - 1 : 0) * N + n], old)));
    }
    p.following[n] = a.y1[n];
    for (int j = 1; j <= ORDERS; j++) a.ks[(j - 1) * N + n] = m_sel(f.low[j], p.following[j * N + n] * over, K(0));
    a.ks[ORDERS * N + n] = p.d[n] * over;
  }
}
FN void predict(Attempt& a, const Formula& f, int from) {
  History& p = *a.past;
  for (int n = from; n < N; n++) {
    S predicted = p.D[n], psi = K(0);
    for (int j = 1; j <= ORDERS; j++) { predicted += m_sel(f.low[j], p.D[j * N + n], K(0)); psi += f.weight[j] * m_sel(f.low[j], p.D[j * N + n], K(0)); }
    p.predicted[n] = predicted; p.psi[n] = psi;
  }
}
#if ALONG
// A step whose first half is known, and of whose second one, a tangent, the equation is linear: with z the sum of prediction and correction,
// (E + c G) z = E (predicted - psi) - c F_p s. What the first difference was at the start is nothing to formulas of order one, which come first
static void step_forward(Attempt& a) {
  History& p = *a.past;
  const Formula f(p.order, m_sel((M)(a.h == K(0)), K(1), a.h));
  predict(a, f, N / 2);
  for (int n = 0; n < N; n++) {
    const bool known = n < N / 2;
    if (!known) a.y1[n] = K(0);
    S slope = -f.unlike * a.ks[ORDERS * N + n];
    for (int j = 1; j <= ORDERS; j++) slope += K(R(1.0 / j)) * a.ks[(j - 1) * N + n];
    p.base[n] = known ? slope : K(0);
    p.value[n] = known ? K(0) : p.predicted[n] - p.psi[n];
  }
  pencil(a.f, a.c, a.times[0], a.y1, p.base, p.now);
  filter_matrix(a.f, p.now, f.c);
  for (int n = 0; n < N; n++) p.change[n] = n < N / 2 ? K(0) : mass_row(p.now.J, p.value, n);
  if (IMPLICIT) residual(a.f, a.c, a.times[0], a.y1, p.base, p.now.base, p.d);
  else { a.f.fun(&a.c, a.times, a.y1, p.d); for (int n = 0; n < N; n++) p.d[n] = -p.d[n]; }
  for (int n = N / 2; n < N; n++) p.change[n] -= f.c * p.d[n];
  filter_solve(p.now, p.change);
  for (int n = N / 2; n < N; n++) { a.y1[n] = p.change[n]; p.d[n] = p.change[n] - p.predicted[n]; }
  next_table(a, f, N / 2);
  for (int n = 0; n < N / 2; n++) p.following[n] = a.y1[n];
}
#else
static void step_forward(Attempt& a) {
  History& p = *a.past;
  // without a step E alone may be singular
  const Formula f(p.order, m_sel((M)(a.h == K(0)), K(1), a.h));
  predict(a, f, 0);
  bool fresh[W], again[W], any = false;
  for (int l = 0; l < W; l++) any |= fresh[l] = a.on[l] && !p.known[l];
  if (any) take_matrices(a, f.c, fresh);
  correct(a, f.c, a.on);
  any = false;
  for (int l = 0; l < W; l++) any |= again[l] = a.on[l] && !p.solved[l] && !fresh[l];
  if (any) { take_matrices(a, f.c, again); correct(a, f.c, again); }
  const M untested = mask_of(p.settling);
  next_table(a, f, 0);
  for (int n = 0; n < N; n++) a.error[n] = m_sel(untested, K(0), as_tested(a, f.constant * p.d[n], a.h, n));
}
#endif
FN void step_error(Attempt&) {}
template <int I, bool AGAIN = false> FN void dense_stages(Attempt&) {}

// ---- the adjoint
// what was recorded of steps, and the cotangents of the differences that they begin with and end with
struct Before {
  long order[W];
  double ratio[W], kept[W];
  S after, *carried;
  Before() { for (int l = 0; l < W; l++) { order[l] = 1; ratio[l] = kept[l] = 1; } }
  void load(int l, const double* known, long stride, bool) { order[l] = (long)known[0]; ratio[l] = known[stride]; kept[l] = known[2 * stride]; }
  void same(int l, int other) { order[l] = order[other]; ratio[l] = ratio[other]; kept[l] = kept[other]; }
};
// from the cotangent of the table behind a step and w, that of the correction, (E + c G)* u = w; psi - predicted has -E* u
FN void begun(Return&, const S&, const S*, const bool*) {}
template <bool DENSE_OUTPUT> static void step_back(Return& a) {
  const Before& p = *a.before;
  const Formula f(p.order, m_sel((M)(a.h == K(0)), K(1), a.h));
  Pencil r(a.work);
  S *behind = a.work + ROOM_OF_PENCIL, *near = behind + DIFFERENCES * N, *w = near + DIFFERENCES * N, *u = w + N, *v = u + N, *value = v + N, *base = value + 2 * N;
  const S over = K(1) / m_sel((M)(a.h == K(0)), K(1), a.h);
  for (int n = 0; n < N; n++) {
    S total = K(0);
    behind[n] = a.bar[n];
    for (int j = 1; j < DIFFERENCES; j++) {
      behind[j * N + n] = p.carried[(j - 1) * N + n];
      if (a.kbar && j <= ORDERS) behind[j * N + n] += m_sel(f.low[j], a.kbar[(j - 1) * N + n] * over, K(0));
    }
    for (int j = 0; j < DIFFERENCES; j++) total += m_sel((M)(f.low[j] | f.next[j] | f.after[j]), behind[j * N + n], K(0));
    if (a.kbar) total += a.kbar[ORDERS * N + n] * over;
    u[n] = w[n] = total;
  }
  // the slope of the formula
  for (int n = 0; n < N && IMPLICIT; n++) {
    base[n] = K(0);
    for (int j = 1; j <= ORDERS; j++) base[n] += K(R(1.0 / j)) * a.ks[(j - 1) * N + n];
    base[n] -= f.unlike * a.ks[ORDERS * N + n];
  }
  pencil(a.f, a.c, a.times[0], a.y, base, r);
  filter_matrix(a.f, r, f.c);
  solve_filled<1, true>(r.filter, r.P, u);
  for (int n = 0; n < N && IMPLICIT; n++) u[n] = r.scale[n] * u[n];
  for (int n = 0; n < N; n++) v[n] = IMPLICIT ? -f.c * u[n] : f.c * u[n];
  const S* at = IMPLICIT ? r.base : a.y;
  S tb = K(0);
  a.f.vjp(&a.c, a.times, at, v, value, &tb);
  for (int n = 0; n < N; n++) base[n] = IMPLICIT ? value[N + n] / f.c : -u[n];
  for (int n = 0; n < N; n++) {
    S total = K(0);
    for (int j = 0; j < DIFFERENCES; j++) {
      const S x = behind[j * N + n];
      total += x;
      S sum = total - (w[n] + base[n]);
      if (j <= ORDERS) sum += f.weight[j] * base[n];
      near[j * N + n] = m_sel(f.low[j], sum, m_sel(f.next[j], j + 1 < DIFFERENCES ? -behind[(j + 1) * N + n] : K(0), m_sel(f.after[j], K(0), x)));
    }
  }
  if (a.timed) {
    a.tbar += tb;
    // c F moves with c by F - E y'
    a.f.fun(&a.c, a.times, at, value);
    for (int l = 0; l < W; l++) {
      // by the time of the end, the stages, c, and the distance of the differences
      const long q = p.order[l];
      double total = get(tb, l), by_c = 0;
      for (int n = 0; n < N; n++) {
        if (a.kbar) for (int s = 0; s < STAGES; s++) total -= get(a.ks[s * N + n], l) * get(a.kbar[s * N + n], l) * get(over, l);
        by_c += IMPLICIT ? -get(value[n], l) * get(u[n], l) - get(r.base[N + n], l) * get(base[n], l) : get(value[n], l) * get(u[n], l);
        for (int j = 1; j <= q; j++) {
          const double before = get(a.ks[(j - 1) * N + n], l) - get(a.ks[(j == q ? ORDERS : j) * N + n], l);
          for (int i = 1; i <= q; i++) total += SLOPES[q][i * (ORDERS + 1) + j] * before * get(near[i * N + n], l);
        }
      }
      put(a.hbar, l, get(a.hbar, l) + (R)(total + by_c / ALPHA[q]));
    }
  }
  const Rescaling m(p.order, p.ratio);
  bool kept[W];
  for (int l = 0; l < W; l++) kept[l] = p.kept[l] != 0;
  const M all = mask_of(kept);
  for (int n = 0; n < N; n++) {
    for (int j = 2; j < DIFFERENCES; j++) near[j * N + n] = m_sel(all, near[j * N + n], K(0));
    a.ybar[n] = near[n];
    for (int j = 1; j < DIFFERENCES; j++) {
      S total = near[j * N + n];
      if (j <= m.highest) { total = K(0); for (int i = 1; i <= j; i++) total += m.T[i][j] * near[i * N + n]; }
      p.carried[(j - 1) * N + n] = total;
    }
  }
}

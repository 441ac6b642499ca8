// Adams-Bashforth-Moulton formulas of variable order and step, and their adjoint: the rules of `integrate/adams.py` and `sensitivity/adams.py`. What a
// step knows of those before are the state, differences of slopes (DIFFERENCES, N), and where the past times lie. Constants, by order: POINTS, nodes of a
// rule on [0, 1], and INTO, DIFFERENCES lines of each, the matrix from values there to coefficients in Legendre polynomials; CONSTANTS, of error estimates by order; STRETCHING, theta
// d/dtheta of such coefficients; FAILURES, after which order 1 is taken. Coefficients of the slope and the correction of the slope are recorded as stages.
#define RECORDED 1
#define HANDS_ON 0
#define LATE_STAGES 1
enum { HIGHEST = STAGES - 2, DIFFERENCES = HIGHEST + 1 };
#define ROOM_OF_STEP ((2 * DIFFERENCES + 6) * (long)N)

// the polynomials of the dense output are integrals of Legendre's
static void legendre(double x, double* v) {
  v[0] = 1; v[1] = x;
  for (int j = 1; j < STAGES - 1; j++) v[j + 1] = ((2 * j + 1) * x * v[j] - j * v[j - 1]) / (j + 1);
}
static void dense_weights(double theta, double* w) {
  double v[STAGES + 1];
  legendre(2 * theta - 1, v);
  w[0] = theta; w[STAGES - 1] = 0;
  for (int j = 1; j <= HIGHEST; j++) w[j] = (v[j + 1] - v[j - 1]) / (2 * (2 * j + 1));
}
static void dense_slopes(double theta, double* w) { legendre(2 * theta - 1, w); w[STAGES - 1] = 0; }

// what the sizes of steps make of a step, see `Weights`: every lane by its own order
struct Formula {
  M below[DIFFERENCES], at[DIFFERENCES];  // orders below that of the step, and that one
  S growth[DIFFERENCES], g[DIFFERENCES], last;
  DV inverse[DIFFERENCES], values[DIFFERENCES][DIFFERENCES];  // 1 / (1 - c); the polynomials at the POINTS
  long highest;
  // the order of a lane, and nodes, in steps from the present
  void set(const long* order, const Doubles* nodes) {
    highest = 1;
    for (int l = 0; l < W; l++) if (order[l] > highest) highest = order[l];
    const J q = whole(order);
    DV product = d_all(1);
    last = K(0);
    for (int j = 0; j <= highest; j++) {
      below[j] = (M)(KI(j) < q); at[j] = equal_to(q, j);
      if (j) product *= (1 - nodes[j - 1].v) / -nodes[j].v;
      growth[j] = m_sel(no_less(q, j), narrow(product), K(0));
      inverse[j] = 1 / (1 - nodes[j].v);
    }
    for (int p = 0; p <= highest; p++) {
      values[p][0] = d_all(1);
      for (int j = 0; j < highest; j++) values[p][j + 1] = values[p][j] * (POINTS[highest][p] - nodes[j].v) * inverse[j];
    }
    for (int j = 0; j <= highest; j++) { g[j] = narrow(basis(0, j)); last = m_sel(at[j], g[j], last); }
  }
  // the coefficient of polynomial l in that of difference j
  DV basis(int l, int j) const {
    DV total = DV{};
    for (int p = 0; p <= highest; p++) total += INTO[highest * DIFFERENCES + l][p] * values[p][j];
    return total;
  }
};

struct History {
  Formula formula;
  S *D, *star, *slope, *predicted, *value;
  Doubles past[DIFFERENCES], nodes[DIFFERENCES], last;  // times without the present one, in steps too; the size of the last step
  long order[W], equal[W], fails[W];
  double here[W], one_less[W], two_less[W];  // errors at the order of the attempt and the two below
  bool rising[W], solved[W];
  History(S* at) : D(at), star(D + DIFFERENCES * N), slope(star + DIFFERENCES * N), predicted(slope + N), value(predicted + N) {
    for (int j = 0; j < DIFFERENCES; j++) past[j].v = d_all(-j);
    last.v = DV{};
    for (int l = 0; l < W; l++) { order[l] = 1; equal[l] = fails[l] = 0; rising[l] = solved[l] = false; }
  }
  // a trajectory, from the state and the slope of the loop
  template <class O> void begin(O& o, int l) {
    // one that is not finite has no step
    if (o.step[l]) o.step[l] = least(most(o.step[l], o.q.min_step), o.q.max_step);
    // behind the history there are no times: these stand in, and nothing is made of them
    for (int j = 0; j < DIFFERENCES; j++) past[j][l] = -o.sign[l] * j * (o.step[l] ? o.step[l] : 1);
    for (int e = 0; e < DIFFERENCES * N; e++) put(D[e], l, e < N ? get(o.k1[e], l) : R(0));
    order[l] = 1; equal[l] = fails[l] = 0; rising[l] = true; last[l] = 0;
  }
  // the differences are those of real times: the size of the next step is no concern of theirs
  void fit(const Flags& on, const Doubles& h, Doubles& step) { for (int l = 0; l < W; l++) if (on[l]) step[l] = BD(fabs)(h[l]); }
  void note(int l, double* at, long stride) const {
    at[0] = order[l];
    for (int j = 0; j < DIFFERENCES; j++) at[(j + 1) * stride] = nodes[j][l];
  }
  bool lower(int l) const {
    return order[l] > 2 ? most(one_less[l], two_less[l]) <= here[l] : order[l] == 2 && one_less[l] <= 0.5 * here[l];
  }
  // the errors of a step, as though the grid were even, in units of the tolerance
  template <class O> void estimate(O& o) {
    double* found[3] = {here, one_less, two_less};
    DV uniform[DIFFERENCES];
    uniform[0] = d_all(1);
    for (int j = 1; j <= formula.highest; j++) uniform[j] = uniform[j - 1] * double(j) * formula.inverse[j - 1];
    for (int k = 0; k < 3; k++) {
      S size = K(0), total = K(0);
      for (int j = 0; j + k <= formula.highest; j++) size = m_sel(formula.at[j + k], narrow(o.h.v * CONSTANTS[j] * uniform[j]), size);
      for (int n = 0; n < N; n++) {
        S x = o.ks[(STAGES - 1) * N + n];
        for (int i = 1; i <= k; i++) for (int j = 0; j + i <= formula.highest; j++) x = m_sel(formula.at[j + i], x + star[j * N + n], x);
        const S e = size * x / unit_of(o.a, o.size[n], n);
        total += e * e;
      }
      total = root_of(total);
      for (int l = 0; l < W; l++) found[k][l] = get(total, l);
    }
  }
  // which attempts are accepted, and orders and sizes behind the others
  template <class O> LV judge(O& o) {
    Flags passed;
    estimate(o);
    for (int l = 0; l < W; l++) {
      o.bad.set(l, !solved[l]);
      passed.set(l, o.on[l] && solved[l] && o.level[l] <= 1);
      if (!o.on[l] || passed[l]) continue;
      double down = 0.5;
      if (solved[l] && lower(l) && order[l] > 1) order[l]--;
      rising[l] = false;
      if (++fails[l] >= FAILURES) {
        order[l] = 1;
        if (solved[l]) down = least(most(BD(sqrt)(0.5 / most(here[l], 1e-30)), 0.01), 0.5);
      }
      o.step[l] *= down;
    }
    return passed.v;
  }
  // the slope behind the steps that ``passed``
  template <class O> void arrive(O& o, const Flags& passed, S* slope) {
    S after = K(0);
    for (int l = 0; l < W; l++) put(after, l, moved((R)o.end[l], o.jumps_end[l], o.sign[l] * BEYOND_ALL));
    o.f.fun(&o.c, &after, o.y1, slope);
    o.n_fun.v -= passed.v;
  }
  // the differences behind them, of which the next step uses one more at most; behind a named time there is the slope alone
  template <class O> void take(O& o, const M& taken, const Flags& passed) {
    bool alone[W];
    for (int l = 0; l < W; l++) alone[l] = passed[l] && o.lands[l];
    const M restart = mask_of(alone);
    const J q = whole(order);
    for (int n = 0; n < N; n++) {
      S x = o.k1[n];
      for (int j = 0; j < DIFFERENCES; j++) {
        M kept = no_less(q, j - 1);
        if (j) kept = (M)(kept & m_not(restart));
        D[j * N + n] = m_sel(taken, m_sel(kept, x, K(0)), D[j * N + n]);
        x -= j <= formula.highest ? star[j * N + n] : K(0);
      }
    }
    for (int j = HIGHEST; j > 0; j--) past[j].v = d_sel(passed.v, past[j - 1].v - o.h.v, past[j].v);
    for (int l = 0; l < W; l++) if (passed[l]) { equal[l] = o.h[l] == last[l] ? equal[l] + 1 : 1; last[l] = o.h[l]; fails[l] = 0; }
  }
  // the errors of an order more, behind steps of equal size
  template <class O> void above(O& o, double* found) const {
    long next[W];
    for (int l = 0; l < W; l++) next[l] = order[l] < HIGHEST ? order[l] + 1 : HIGHEST;
    const J q = whole(next);
    const S size = narrow(o.h.v) * looked_up(CONSTANTS, next);
    S total = K(0);
    for (int n = 0; n < N; n++) {
      S x = K(0);
      for (int j = 0; j < DIFFERENCES; j++) x = m_sel(equal_to(q, j), D[j * N + n], x);
      const S e = size * x / unit_of(o.a, o.size[n], n);
      total += e * e;
    }
    total = root_of(total);
    for (int l = 0; l < W; l++) found[l] = get(total, l);
  }
  // orders and sizes behind the steps that ``passed``
  template <class O> void follow(O& o, const Flags& passed) {
    bool ready[W], less[W], any = false;
    double more[W];
    for (int l = 0; l < W; l++) {
      ready[l] = less[l] = false;
      if (!passed[l]) continue;
      less[l] = lower(l);
      rising[l] = rising[l] && !less[l] && order[l] < HIGHEST;
      any |= ready[l] = !rising[l] && !less[l] && equal[l] > order[l] && order[l] < HIGHEST;
    }
    if (any) above(o, more);
    for (int l = 0; l < W; l++) if (passed[l]) {
      if (ready[l]) less[l] = order[l] > 1 && one_less[l] <= least(here[l], more[l]);
      const bool higher = rising[l] || (ready[l] && !less[l] && more[l] < (order[l] > 1 ? here[l] : 0.5 * here[l]));
      const double level = most(less[l] ? one_less[l] : ready[l] && higher ? more[l] : here[l], 1e-30);
      order[l] += higher - (less[l] && order[l] > 1);
      double factor = level <= 0.5 ? 1 : least(most(BD(pow)(0.5 / level, 1.0 / (order[l] + 1)), 0.5), 0.9);
      if (rising[l] || level * BD(ldexp)(1.0, order[l] + 1) <= 0.5) factor = 2;
      if (o.lands[l]) { order[l] = 1; rising[l] = true; equal[l] = 0; factor = 0.1; }
      o.step[l] *= factor;
    }
  }
};
static void step_forward(Attempt& a) {
  History& p = *a.past;
  Formula& f = p.formula;
  Doubles h;
  for (int l = 0; l < W; l++) { const double x = get(a.h, l); h[l] = x ? x : 1; }
  for (int j = 0; j < DIFFERENCES; j++) p.nodes[j].v = p.past[j].v / h.v;
  f.set(p.order, p.nodes);
  for (int n = 0; n < N; n++) {
    S slope = K(0), change = K(0);
    for (int j = 0; j <= f.highest; j++) {
      const S star = p.star[j * N + n] = p.D[j * N + n] * f.growth[j], low = m_sel(f.below[j], star, K(0));
      slope += low; change += low * f.g[j];
    }
    p.slope[n] = slope; p.predicted[n] = a.y[n] + a.h * change;
  }
  a.f.fun(&a.c, a.times, p.predicted, p.value);
  a.count(EVALUATED);
  S constant = f.last;
  for (int j = 0; j < f.highest; j++) constant = m_sel(f.at[j + 1], constant - f.g[j], constant);
  for (int l = 0; l < W; l++) p.solved[l] = true;
  for (int n = 0; n < N; n++) {
    const S delta = a.ks[(STAGES - 1) * N + n] = p.value[n] - p.slope[n];
    a.y1[n] = p.predicted[n] + a.h * f.last * delta;
    a.error[n] = a.h * constant * delta;
    for (int l = 0; l < W; l++) p.solved[l] = p.solved[l] && finite(get(a.y1[n], l)) && finite(get(delta, l));
  }
}
FN void step_error(Attempt&) {}
template <int I, bool AGAIN = false> static void dense_stages(Attempt& a) {
  const History& p = *a.past;
  const Formula& f = p.formula;
  for (int e = 0; e < DIFFERENCES * N; e++) a.ks[e] = K(0);
  for (int j = 0; j <= f.highest; j++) for (int l = 0; l <= j; l++) {
    const S weight = narrow(f.basis(l, j));
    for (int n = 0; n < N; n++)
      a.ks[l * N + n] += weight * m_sel(f.at[j], a.ks[(STAGES - 1) * N + n], m_sel(f.below[j], p.star[j * N + n], K(0)));
  }
}

// ---- the adjoint, see `AdamsAdjoint`
struct Before {
  long order[W];
  bool restart[W];
  Doubles nodes[DIFFERENCES];
  S after;     // the time behind the step, as the next one sees it
  S* carried;  // cotangents of the differences
  Before() : after(K(0)) {
    for (int l = 0; l < W; l++) { order[l] = 1; restart[l] = false; }
    for (int j = 0; j < DIFFERENCES; j++) nodes[j].v = d_all(-j);
  }
  void load(int l, const double* known, long stride, bool lands) {
    order[l] = (long)known[0]; restart[l] = lands;
    for (int j = 0; j < DIFFERENCES; j++) nodes[j][l] = known[(j + 1) * stride];
  }
  void same(int l, int other) {
    order[l] = order[other]; restart[l] = restart[other];
    for (int j = 0; j < DIFFERENCES; j++) nodes[j][l] = nodes[j][other];
  }
};
// of the slope with which trajectories began, from ``y`` at ``t``
static void begun(Return& r, const S& t, const S* y, const bool* which) {
  const M on = mask_of(which);
  S *v = r.work, *u = v + N, tb = K(0);
  for (int n = 0; n < N; n++) v[n] = m_sel(on, r.before->carried[n], K(0));
  r.f.vjp(&r.c, &t, y, v, u, &tb);
  for (int n = 0; n < N; n++) r.ybar[n] += m_sel(on, u[n], K(0));
  r.tbar += m_sel(on, tb, K(0));
}
template <bool DENSE_OUTPUT> static void step_back(Return& a) {
  const Before& p = *a.before;
  Formula f;
  f.set(p.order, p.nodes);
  const J q = whole(p.order);
  const M restart = mask_of(p.restart);
  S *behind = a.work, *mine = behind + DIFFERENCES * N, *y_bar = mine + DIFFERENCES * N, *delta_bar = y_bar + N, *point = delta_bar + N, *u = point + N, *value = u + N;
  const S *delta = a.ks + (STAGES - 1) * N, at_g = a.h * f.last;
  S tb = K(0), after_bar = K(0);
  bool moving[W], any = false;
  for (int l = 0; l < W; l++) moving[l] = false;
  for (int n = 0; n < N; n++) {
    point[n] = K(0);
    for (int j = 0; j <= f.highest; j++) {
      const S x = m_sel(no_less(q, j), p.carried[j * N + n], K(0));
      behind[j * N + n] = j ? m_sel(restart, K(0), x) : x;
      point[n] += behind[j * N + n];
    }
    for (int l = 0; l < W; l++) for (int j = 0; j <= f.highest; j++) any |= moving[l] = moving[l] || get(behind[j * N + n], l) != 0;
    y_bar[n] = a.bar[n];
  }
  if (any) {
    // zero times a derivative that is no number would be none
    const M on = mask_of(moving);
    a.f.vjp(&a.c, &p.after, a.y, point, u, &after_bar);
    for (int n = 0; n < N; n++) y_bar[n] += m_sel(on, u[n], K(0));
    after_bar = m_sel(on, after_bar, K(0));
  }
  // those of the coefficients
  for (int e = 0; e < DIFFERENCES * N; e++) mine[e] = K(0);
  if (a.kbar) for (int j = 0; j <= f.highest; j++) for (int l = 0; l <= j; l++) {
    const S weight = narrow(f.basis(l, j));
    for (int n = 0; n < N; n++) mine[j * N + n] += weight * a.kbar[l * N + n];
  }
  for (int n = 0; n < N; n++) {
    delta_bar[n] = at_g * y_bar[n];
    if (a.kbar) {
      delta_bar[n] += a.kbar[(STAGES - 1) * N + n];
      for (int j = 0; j <= f.highest; j++) delta_bar[n] += m_sel(f.at[j], mine[j * N + n], K(0));
    }
    point[n] = a.y[n] - at_g * delta[n];
  }
  a.f.vjp(&a.c, a.times, point, delta_bar, u, &tb);
  for (int n = 0; n < N; n++) {
    a.ybar[n] = y_bar[n] + u[n];
    S later = K(0);
    for (int j = f.highest; j >= 0; j--) {
      const S x = mine[j * N + n] - later - delta_bar[n] + a.h * f.g[j] * a.ybar[n];
      p.carried[j * N + n] = m_sel(f.below[j], x * f.growth[j], K(0));
      later += behind[j * N + n];
    }
    for (int j = f.highest + 1; j < DIFFERENCES; j++) p.carried[j * N + n] = K(0);
  }
  if (!a.timed) return;
  a.tbar += tb + after_bar;
  // by the size of the step: theta d/dtheta of the whole polynomial at its end; all Legendre polynomials are one there
  const S over = K(1) / m_sel((M)(a.h == K(0)), K(1), a.h);
  S total = tb + m_sel(restart, after_bar, K(0)), k = K(0), last[DIFFERENCES];
  for (int l = 0; l < DIFFERENCES; l++) {
    last[l] = K(0);
    for (int j = l; j <= f.highest; j++) last[l] = m_sel(f.at[j], narrow(f.basis(l, j)), last[l]);
    if (l <= f.highest) k += m_sel(f.below[l], narrow(f.inverse[l]), K(0));
  }
  a.f.fun(&a.c, a.times, point, value);
  for (int n = 0; n < N; n++) {
    S end = K(0);
    for (int l = 0; l < DIFFERENCES; l++) {
      S bent = K(0);
      for (int m = l; m < DIFFERENCES; m++) bent += K(R(STRETCHING[l][m])) * a.ks[m * N + n];
      end += bent;
      if (a.kbar) total += (bent - last[l] * k * delta[n]) * over * a.kbar[l * N + n];
    }
    total += (value[n] - delta[n]) * a.ybar[n] + (K(1) - k * f.last) * delta[n] * y_bar[n] - (end - k * delta[n]) * over * delta_bar[n];
  }
  a.hbar += total;
}

// How implicit equations F(t, y, y') = 0 begin: E = F_y' and G = F_y at given values, and by Newton's method with full steps the slopes of
// those variables that are ``differential`` and the values of the others. Rows whose residual does not fall, or whose matrix is all but
// singular, are not ``found``. The way back is that of a root: of F(t, y, y') = 0 in the unknowns u, M = F_u, it is M* v = -u_bar, and what
// v* F adds to the cotangents of everything else.
struct Beginning {
  const Consistent& q; const Functions f;
  Own own; Ctx c; S* memory; Memory<OWNED> own_bars; Memory<SHARED> totals; S* bars[INPUTS + 1];
  S *pair, *next, *J, *LU, *P, *scale, *r, *step, *spare, *handed;
  S now;
  long row[W];
  Beginning(const Consistent& q) : q(q), f(functions_of(q)) {
    const long numbers = ROOM_OF_JACOBIAN + room_of_factors(1) + EXCHANGES + 2 * ARGUMENTS + 5 * (long)N;
    memory = lanes_of(numbers);
    for (long i = 0; i < numbers; i++) memory[i] = K(0);
    pair = memory; next = pair + ARGUMENTS; J = next + ARGUMENTS; LU = J + ROOM_OF_JACOBIAN; P = LU + room_of_factors(1); scale = P + EXCHANGES; r = scale + N; step = r + N; spare = step + N; handed = spare + N;
    S *of_all = totals, *of_own = own_bars;
    for (long e = 0; e < SHARED; e++) of_all[e] = K(0);
    for (int i = 0; i < INPUTS; i++) {
      if (OWN[i]) { bars[i] = of_own; of_own += OWN[i]; }
      else { bars[i] = of_all; of_all += NUMBERS[i]; }
    }
    c = {q.inputs, own.a, q.tables, bars};
  }
  ~Beginning() { free(memory); }
  void take(long first, long limit) {
    for (int l = 0; l < W; l++) {
      const long i = row[l] = first + l < limit ? first + l : limit - 1;
      own.load(q.inputs, l, i);
      put(now, l, q.t[i]);
      for (int n = 0; n < N; n++) { put(pair[n], l, q.y[i * N + n]); put(pair[N + n], l, q.yp[i * N + n]); }
    }
  }
  void matrices() {
    f.jac(&c, &now, pair, J, spare);
    for (int l = 0; l < W; l++) {
      R* to = q.pencil + row[l] * N * ARGUMENTS;
      for (int e = 0; e < N * ARGUMENTS; e++) to[e] = 0;
      for (int i = 0; i < N; i++) row_of(i, [&](const At& at) { R* x = to + i * ARGUMENTS + at.j; x[0] = get(J[at.entry], l); x[N] = get(J[at.entry + BESIDE], l); });
    }
  }
  // of F_u
  S entry(const At& at) const { return J[at.entry + (q.differential[at.j] ? BESIDE : 0)]; }
  // Whether ranks and index can be nothing else than what ``differential`` says (see `analyse`): where algebraic variables have no derivative in
  // any equation, and M is far from singular, in equations that are in units of their derivatives. As many equations as there are such
  // variables have none, or combinations of equations that have none do not consist of what is left of rates that cancel.
  void judge() {
    bool fine[W];
    S *weight = spare, total = K(0), inverse = K(0), rates = K(0);
    bool apart[W];
    f.jac(&c, &now, pair, J, spare);
    long rank = 0;
    for (int n = 0; n < N; n++) rank += q.differential[n] != 0;
    for (int l = 0; l < W; l++) {
      double all = 0;
      long with = 0;
      fine[l] = true;
      for (int i = 0; i < N; i++) {
        double size = 0, largest = 0;
        row_of(i, [&](const At& at) {
          const double e = BD(fabs)((double)get(J[at.entry + BESIDE], l)), g = BD(fabs)((double)get(J[at.entry], l));
          fine[l] = fine[l] && finite(e) && finite(g) && (e == 0 || q.differential[at.j]);
          size = most(size, e); largest = most(largest, most(e, g));
        });
        put(step[i], l, (R)size); put(weight[i], l, (R)largest);
        all = most(all, size);
      }
      for (int i = 0; i < N; i++) {
        const double size = get(step[i], l), largest = get(weight[i], l);
        with += size > 0;
        fine[l] = fine[l] && (size == 0 || size > least(1e-11 * largest, 1e-13 * all));
        put(weight[i], l, (R)(1 / (size > 0 ? size : largest > 0 ? largest : 1)));
      }
      apart[l] = with == rank;
    }
    for (int i = 0; i < N; i++) row_of(i, [&](const At& at) { const S x = weight[i] * entry(at), g = weight[i] * J[at.entry]; total += x * x; rates += g * g; });
    fill<1>(LU, 0, [&](const At& at) { return weight[at.i] * entry(at); });
    factorise_filled<1>(f, LU, P, scale);
    for (int n = 0; n < N; n++) {
      for (int i = 0; i < N; i++) step[i] = i == n ? scale[i] : K(0);
      solve_filled<1>(LU, P, step);
      for (int i = 0; i < N; i++) inverse += step[i] * step[i];
    }
    const S condition = m_sqrt(total * inverse), cancelling = m_sqrt(rates * inverse);
    for (int l = 0; l < W; l++) q.sound[row[l]] = fine[l] && get(condition, l) <= q.condition && (apart[l] || get(cancelling, l) <= q.condition);
    // slopes of algebraic variables enter nothing
    for (int n = 0; n < N; n++) { handed[n] = pair[N + n]; if (!q.differential[n]) pair[N + n] = K(0); }
  }
  void back(long first) {
    f.jac(&c, &now, pair, J, spare);
    fill<1>(LU, 0, [&](const At& at) { return entry(at); });
    factorise_filled<1>(f, LU, P, scale);
    for (int l = 0; l < W; l++) for (int n = 0; n < N; n++) {
      const R* of = row[l] != first + l ? nullptr : q.differential[n] ? q.yp_bar : q.y_bar;
      put(step[n], l, of ? of[row[l] * N + n] : R(0));
    }
    solve_filled<1, true>(LU, P, step);
    for (int n = 0; n < N; n++) step[n] = -(scale[n] * step[n]);
    S* of_own = own_bars, tb = K(0);
    for (long e = 0; e < OWNED; e++) of_own[e] = K(0);
    f.vjp(&c, &now, pair, step, next, &tb);
    for (int l = 0; l < W; l++) if (row[l] == first + l) {
      for (int n = 0; n < N; n++) q.y0_bar[row[l] * N + n] = q.differential[n] ? q.y_bar[row[l] * N + n] + get(next[n], l) : R(0);
      for (int i = 0; i < INPUTS; i++) for (long e = 0; e < OWN[i]; e++) q.input_bars[i][row[l] * OWN[i] + e] += get(bars[i][e], l);
    }
  }
  void add_up() {
    *q.infinite = infinite(q.y0_bar, q.rows * N);
    for (int i = 0; i < INPUTS; i++) {
      for (long e = 0; e < NUMBERS[i] && !OWN[i]; e++) for (int l = 0; l < W; l++) q.input_bars[i][e] += get(bars[i][e], l);
      *q.infinite += infinite(q.input_bars[i], OWN[i] ? q.rows * OWN[i] : NUMBERS[i]);
    }
  }
  // the unknown n of a state and its slopes
  S& unknown(S* of, int n) const { return of[q.differential[n] ? N + n : n]; }
  static S length(const S* x) { S total = K(0); for (int n = 0; n < N; n++) total += x[n] * x[n]; return m_sqrt(total); }
  void complete() {
    bool running[W], done[W], any = true;
    for (int l = 0; l < W; l++) { running[l] = true; done[l] = false; }
    f.fun(&c, &now, pair, r);
    S norm = length(r);
    for (long k = 0; k < q.most && any; k++) {
      f.jac(&c, &now, pair, J, spare);
      fill<1>(LU, 0, [&](const At& at) { return entry(at); });
      factorise_filled<1>(f, LU, P, scale);
      // the reciprocals of the pivots
      S small = m_abs(inverse_pivot(LU, 0)), large = small;
      for (int n = 1; n < N; n++) { const S x = m_abs(inverse_pivot(LU, n)); small = m_min(small, x); large = m_max(large, x); }
      for (int n = 0; n < N; n++) step[n] = scale[n] * r[n];
      solve_filled<1>(LU, P, step);
      S measure = K(0);
      for (int e = 0; e < ARGUMENTS; e++) next[e] = pair[e];
      for (int n = 0; n < N; n++) {
        const S x = step[n] / (K(R(q.rtol * 1e-3)) + K(R(q.rtol)) * m_abs(unknown(pair, n)));
        measure += x * x;
        unknown(next, n) = unknown(pair, n) - step[n];
      }
      measure = m_sqrt(measure) * K(R(ROOT));
      f.fun(&c, &now, next, r);
      const S after = length(r);
      any = false;
      for (int l = 0; l < W; l++) if (running[l]) {
        const double at = get(after, l), before = get(norm, l), size = get(measure, l);
        const bool exact = before == 0, fine = finite(at) && finite(size) && get(large, l) * q.least < get(small, l);
        done[l] = exact || (fine && (size <= 1 || at == 0));
        running[l] = !done[l] && fine && at <= (1 - 1e-4) * before;
        any |= running[l];
        if (!exact && (running[l] || done[l])) for (int e = 0; e < ARGUMENTS; e++) put(pair[e], l, get(next[e], l));
      }
      norm = after;
    }
    for (int l = 0; l < W; l++) {
      q.found[row[l]] = done[l];
      for (int n = 0; n < N; n++) {
        q.y_found[row[l] * N + n] = get(pair[n], l);
        q.yp_found[row[l] * N + n] = get(q.sound && !q.differential[n] ? handed[n] : pair[N + n], l);
      }
    }
  }
};
extern "C" void consistent(const Consistent* q) {
  Beginning b(*q);
  for (long first = 0; first < q->rows; first += W) {
    b.take(first, q->rows);
    if (q->pencil) b.matrices();
    else if (q->y_bar) b.back(first);
    else {
      if (q->sound) b.judge();
      b.complete();
    }
  }
  if (q->y_bar) b.add_up();
}

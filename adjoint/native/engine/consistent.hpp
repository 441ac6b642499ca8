// How implicit equations F(t, y, y') = 0 begin: E = F_y' and G = F_y at given values, and by Newton's method with full steps the slopes of
// those variables that are ``differential`` and the values of the others. Rows whose residual does not fall, or whose matrix is all but
// singular, are not ``found``.
struct Beginning {
  const Consistent& q; const Functions f;
  Own own; Ctx c; S* memory;
  S *pair, *next, *J, *LU, *P, *scale, *r, *step, *spare;
  S now;
  long row[W];
  Beginning(const Consistent& q) : q(q), f(functions_of(q)) {
    const long numbers = ROOM_OF_JACOBIAN + room_of_factors(1) + EXCHANGES + 2 * ARGUMENTS + 4 * (long)N;
    memory = lanes_of(numbers);
    for (long i = 0; i < numbers; i++) memory[i] = K(0);
    pair = memory; next = pair + ARGUMENTS; J = next + ARGUMENTS; LU = J + ROOM_OF_JACOBIAN; P = LU + room_of_factors(1); scale = P + EXCHANGES; r = scale + N; step = r + N; spare = step + N;
    c = {q.inputs, own.a, q.tables, nullptr};
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
      fill<1>(LU, 0, [&](const At& at) { return J[at.entry + (q.differential[at.j] ? BESIDE : 0)]; });
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
      for (int n = 0; n < N; n++) { q.y_found[row[l] * N + n] = get(pair[n], l); q.yp_found[row[l] * N + n] = get(pair[N + n], l); }
    }
  }
};
extern "C" void consistent(const Consistent* q) {
  Beginning b(*q);
  for (long first = 0; first < q->rows; first += W) {
    b.take(first, q->rows);
    if (q->pencil) b.matrices();
    else b.complete();
  }
}

// How trajectories begin: their slopes, and Hairer's first steps (`integrate/clock.py`), of W rows at once, before there is a lane for
// each of them.

static void scaled_norm(const S* e, const S* size, const S* rtol, const S* atol, S* out) {
  S total = K(0);
  if (N == 1) { *out = m_abs(e[0] / (size[0] * rtol[0] + atol[0])); return; }
  for (int n = 0; n < N; n++) { S x = e[n] / (size[n] * rtol[n] + atol[n]); total += x * x; }
  *out = m_sqrt(total) * K(R(ROOT));
}

// the tolerances of a row, in one lane
static void load_tolerances(const Forward& q, S* rtol, S* atol, int l, long r) {
  for (int n = 0; n < N; n++) {
    put(rtol[n], l, q.rtol[r * q.rtol_row + n * q.rtol_column]);
    put(atol[n], l, q.atol[r * q.atol_row + n * q.atol_column]);
  }
}

struct Starts {
  const Forward& q; const Functions& f;
  static constexpr long NUMBERS_HERE = 6 * (long)N + CONSTRAINED * (4 * (long)N + ROOM_OF_STEP);
  Own own; Ctx c; Memory<NUMBERS_HERE> memory; Attempt a;  // of the step that tells the size of the first one, where there are constraints
  S *y, *slope, *rtol, *atol, *beyond, *size;
  Doubles step; bool guessed;
  long from, to;  // the rows that are here
#if EVENTS > 0
  S events[EVENTS];
#endif

  Starts(const Forward& q, const Functions& f) : q(q), f(f), a{f, c}, guessed(q.adaptive && !q.first_step), from(0), to(0) {
    for (long i = 0; i < NUMBERS_HERE; i++) memory[i] = K(0);
    y = memory; slope = y + N; rtol = slope + N; atol = rtol + N; beyond = atol + N; size = beyond + N;
    c = {q.inputs, own.a, q.tables, nullptr};
    a.y = y; a.step_rtol = rtol; a.step_atol = atol; a.beside = memory + 6 * (long)N; a.work = a.beside + 4 * (long)N;
    a.power = q.power; a.skipped = q.skipped;
  }

  double anchor(long r, long i) const { return q.anchors[i * q.rows + r]; }
  // those of the rows from ``first``, where there are as many below ``limit``
  void take(long first, long limit) {
    long row[W];
    S now;
    double sign[W];
    const bool fixed = !q.rtol_row && !q.atol_row && to > 0;
    for (int l = 0; l < W; l++) {
      const long r = row[l] = first + l < limit ? first + l : limit - 1;
      own.load(q.inputs, l, r);
      if (!fixed) load_tolerances(q, rtol, atol, l, r);
      for (int n = 0; n < N; n++) put(y[n], l, q.y0[r * N + n]);
      sign[l] = anchor(r, q.n_anchors - 1) >= anchor(r, 0) ? 1.0 : -1.0;
      put(now, l, moved((R)anchor(r, 0), q.shift == 2, sign[l] * BEYOND_ALL));
      step[l] = q.first_step ? q.first_step[q.first_step_row * r] : BEYOND_ALL;
    }
    from = first; to = first + W < limit ? first + W : limit;
#if EVENTS > 0
    {
      S at;
      for (int l = 0; l < W; l++) put(at, l, (R)anchor(row[l], 0));
      ((EventFunctions)q.events)(&c, &at, y, events);
    }
#endif
    for (int i = 0; i < COUNTS; i++) for (int l = 0; l < W; l++) a.counts[i][l] = 0;
#if CONSTRAINED
    double t[W], span[W];
    bool every[W];
    for (int l = 0; l < W; l++) { t[l] = anchor(row[l], 0); span[l] = BD(fabs)(anchor(row[l], q.n_anchors - 1) - t[l]); every[l] = true; }
#endif
#if IMPLICIT
    double width[W], fast[W];
    for (int l = 0; l < W; l++) width[l] = 1e-3 * span[l];
    find_slopes(a, now, sign, width, every, slope, fast);
#else
    f.fun(&c, &now, y, slope);
#endif
    if (guessed) {
#if IMPLICIT
      for (int l = 0; l < W; l++) step[l] = least(1e-3 * span[l], 0.5 / most(fast[l], 1e-300));
#elif MASS
      first_steps(a, t, sign, span, every, &step[0]);
#else
      hairer(row, sign);
#endif
      // a guess, but one that the times resolve
      for (int l = 0; l < W; l++) step[l] = most(most(step[l], 2 * RESOLVED * BD(fabs)(anchor(row[l], 0))), q.min_step);
    }
    for (int l = 0; l < W; l++) for (int n = 0; n < N; n++) {
      // nothing goes on from a state that is not finite: a step of no size says so at once
      if (!finite(get(y[n], l))) step[l] = 0;
    }
  }
  void hairer(const long* row, const double* sign) {
    S a0, a1, a2, there, h0;
    Doubles least0, room;
    for (int n = 0; n < N; n++) size[n] = m_abs(y[n]);
    scaled_norm(y, size, rtol, atol, &a0);
    scaled_norm(slope, size, rtol, atol, &a1);
    for (int l = 0; l < W; l++) {
      const long r = row[l];
      double nearest = 0, ahead_most = BEYOND_ALL;
      for (long i = 1; i < q.n_anchors; i++) {
        const double ahead = anchor(r, i) - anchor(r, 0);
        if (sign[l] * ahead > 0 && BD(fabs)(ahead) < ahead_most) { ahead_most = BD(fabs)(ahead); nearest = anchor(r, i); }
      }
      if (!finite(ahead_most)) { ahead_most = 0; nearest = anchor(r, q.n_anchors > 1 ? 1 : 0); }
      room[l] = ahead_most;
      const double d0 = get(a0, l), d1 = get(a1, l);
      double g = (d0 < 1e-5 || d1 < 1e-5) ? 1e-6 : 0.01 * d0 / d1;
      g = least(finite(g) ? g : 1e-6, q.max_step);
      put(there, l, (R)(g < ahead_most ? anchor(r, 0) + sign[l] * g : nearest));
      least0[l] = least(g, ahead_most);
      put(h0, l, (R)(sign[l] * least0[l]));
    }
    for (int n = 0; n < N; n++) size[n] = y[n] + h0 * slope[n];
    f.fun(&c, &there, size, beyond);
    for (int n = 0; n < N; n++) { beyond[n] = beyond[n] - slope[n]; size[n] = m_abs(y[n]); }
    scaled_norm(beyond, size, rtol, atol, &a2);
    for (int l = 0; l < W; l++) {
      const double worst = most(get(a1, l), (double)get(a2, l) / least0[l]);
      const double next = worst <= 1e-15 ? most(least0[l] * 1e-3, 1e-6) : BD(pow)(0.01 / worst, 1.0 / (ERROR_ORDER + 1));
      const double x = least(100 * least0[l], next);
      step[l] = finite(x) && x > 0 ? x : least0[l];
    }
  }
};

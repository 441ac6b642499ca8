// Solves that are parts of one by two methods, which hand trajectories over to each other: the rules of `integrate/stiffness.py`, and those of
// `Companion` for explicit steps at the edge of stability whose derivatives are wanted. Constants: LEAST (of weights); LEVEL, beyond which a step speaks
// for the other method, PATIENCE, how many of them it takes, and FORGET, how many others in a row make up for them; of explicit methods EARLY and LATE,
// two stages at the end of a step; PRODUCTS, which estimate the size of the Jacobian, NEAR, the part of the interval from which on there is one more, and
// WIDEST, a bound of displacements.
struct Handover {
  Longs hits, misses;
#if RECORDED
  void begin(int l, double) { hits[l] = misses[l] = 0; }
  // a bound of the size of the Jacobian at the start of the step, in units of the tolerance
  template <class O> LV speaks(const O& o, const S* unit) const {
    const S* J = o.a.work;
    S size = K(0);
    for (int i = 0; i < N; i++) {
      S total = K(0);
      row_of(i, [&](const At& at) { total += m_abs(J[at.entry]) * unit[at.j]; });
      size = m_max(size, total / unit[i]);
    }
    return THAT(d_of(size) * d_abs(o.h.v) / o.q.interval < d_all(LEVEL));
  }
#else
  Doubles rate, bound, probed;  // the size of the Jacobian by power iteration, what of it speaks for the other method, and the size of the probe
  Flags begun;
  void begin(int l, double probe) { hits[l] = misses[l] = 0; rate[l] = bound[l] = 0; probed[l] = probe; begun.set(l, false); }
  // the size of the Jacobian in the direction of the error
  template <class O> LV speaks(const O& o, const S* unit) const {
    S apart = K(0), change = K(0);
    for (int n = 0; n < N; n++) {
      const S late = o.y[n] + o.a.h * row_sum<LATE>(o.ks, n, K(0)), early = o.y[n] + o.a.h * row_sum<EARLY>(o.ks, n, K(0));
      const S x = (late - early) / unit[n], f = (o.ks[LATE * N + n] - o.ks[EARLY * N + n]) / unit[n];
      apart += x * x; change += f * f;
    }
    const S size = m_sel((M)(apart > K(0)), m_sqrt(change) / m_sqrt(apart), K(0));
    return THAT(d_most(bound.v, d_of(size)) * d_abs(o.h.v) / o.q.interval > d_all(LEVEL));
  }
  // a step of power iteration in some lanes: by how much their probes grew
  template <class O> DV product(O& o, const Flags& which) {
    S *change = o.looking, *at = o.inside, size = K(0), whole = K(0);
    for (int n = 0; n < N; n++) whole = m_max(whole, m_abs(o.y[n]) * K(R(SHIFT)));
    // within the tolerance, and well above rounding
    auto unit = [&](int n) {
      const S length = m_abs(o.y[n]), x = length * K(R(SHIFT)) + m_min(length * o.rtol[n] + o.atol[n], (length + K(1)) * K(R(WIDEST)));
      return m_sel((M)(x > K(0)), x, m_sel((M)(whole > K(0)), whole, K(R(SHIFT))));
    };
    for (int n = 0; n < N; n++) at[n] = o.y[n] + o.probe[n] * unit(n);
    o.f.fun(&o.c, o.a.times, at, change);
    for (int n = 0; n < N; n++) { change[n] = (change[n] - o.k1[n]) / unit(n); size = m_max(size, m_abs(change[n])); }
    o.n_fun.v -= which.v;
    Doubles grown;
    for (int l = 0; l < W; l++) {
      const double x = get(size, l);
      const bool usable = x > 0 && finite(x);
      grown[l] = usable ? x / probed[l] : 0;
      if (!which[l]) continue;
      for (int n = 0; n < N; n++) put(o.probe[n], l, usable ? (R)(get(change[n], l) / x) : o.drawn(n, l));
      probed[l] = usable ? 1 : o.largest;
    }
    return grown.v;
  }
  // the errors of steps with those beyond stability, which are no better than none, and when they are short speak for the other method. The size of
  // the Jacobian is that at the start, and anew wherever it would be a bound
  template <class O> DV bounded(O& o, const DV& error) {
    const double part = 1.0 / PRODUCTS;
    const DV length = d_abs(o.h.v);
    Flags taken, first, near;
    Doubles grown, level, found;
    taken.v = o.on.v & THAT(error <= d_all(1));
    first.v = taken.v & ~begun.v;
    near.v = taken.v & begun.v & THAT(rate.v * length > d_all(NEAR * INTERVAL));
    for (int k = 0; k <= PRODUCTS && some(first.v); k++) {
      grown.v = product(o, first);
      // the last one turns the probe further
      for (int l = 0; l < W && k < PRODUCTS; l++) if (first[l]) rate[l] = (k ? rate[l] : 1) * BD(pow)(grown[l], part);
    }
    begun.v = begun.v | first.v;
    if (some(near.v)) {
      grown.v = product(o, near);
      product(o, near);
      for (int l = 0; l < W; l++) if (near[l]) rate[l] = BD(pow)(rate[l], 1 - part) * BD(pow)(grown[l], part);
    }
    level.v = rate.v * length / INTERVAL;
    const LV beyond = taken.v & THAT(level.v > d_all(1));
    bound.v = d_sel(beyond, rate.v, bound.v);
    for (int l = 0; l < W; l++) found[l] = BD(pow)(level[l], ERROR_ORDER + 1);
    return d_sel(beyond, found.v, error);
  }
#endif
  // which of the lanes ``staying`` are handed over behind their steps
  template <class O> LV over(O& o, const LV& staying) {
    S* unit = o.inside;
    for (int n = 0; n < N; n++) unit[n] = m_max(m_abs(o.y[n]) * o.rtol[n] + o.atol[n], K(R(LEAST)));
    const LV hit = staying & speaks(o, unit);
    hits.v -= hit;
    misses.v = (misses.v - (staying & ~hit)) & ~hit;
    hits.v = hits.v & ~THAT(misses.v >= l_all(FORGET));
    return staying & THAT(hits.v >= l_all(PATIENCE));
  }
};

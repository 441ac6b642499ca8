// The adaptive loop: W trajectories side by side; a lane whose trajectory has ended takes the next one. The rules are those of
// `integrate/clock.py`, `plan.py` and the samplers.

// of size one, unlike each other
FN double scattered(int n) { return 1.5 + BD(cos)((n + 1.0) * (n + 1.0)); }
// of every lane, what a solve that is interrupted between two steps goes on from, beside its memory
struct Standing {
  Doubles t, step, target, error1, error2, sign, span;
  Doubles due;  // the time of the next sample, in the direction of integration
  Longs segment, attempts, accepted, n_fun;
  long next[W];
#if SWITCHES
  Handover handover;
#endif
  Doubles looked;  // the longest step, a little more, that was looked at, and how long ago
  Longs since;
  Flags unstable, live, rejected, bad;
  bool jump[W];
};
struct Loop : Standing {
  const Forward& q; Tape& tape; const Functions f;
  long from, to, waiting;
  static constexpr long ROOM_BEFORE_STEP = (15 + 2 * ALL) * (long)N, ROOM = ROOM_BEFORE_STEP + ROOM_OF_STEP + 6 * CONSTRAINED * (long)N;
  Own own; Ctx c; Memory<ROOM> memory;
  S *y, *y1, *k1, *ks, *rtol, *atol, *size, *error, *other, *srtol, *satol;
  Starts starts;
  Attempt a;
#if MULTISTEP
  History past;
  Doubles level;  // of the error of the last attempt
#endif
  Doubles wanted, end, h;
  long row[W];
#if EVENTS > 0
  Watch watch[W];
  EventFunctions events;
#endif
  S *probe, *inside, *direction, *looking;  // direction, of the first lane: where probes begin; looking: room for a look
  double stop[W];  // where a terminal event ends a trajectory in this step
  double largest;  // number of direction
  bool aiming[W];  // the step is to end just before a terminal event
  Flags lands, on;
  bool jumps_end[W];

  Loop(const Forward& q, Tape& tape, long from, long to) : q(q), tape(tape), f(functions_of(q)), from(from), to(to), waiting(from), starts(q, f), a{f, c}
#if MULTISTEP
    , past(memory + ROOM_BEFORE_STEP)
#endif
  {
    S* at = memory;
    y = at; y1 = (at += N); k1 = (at += N); rtol = (at += N); atol = (at += N); size = (at += N); error = (at += N); other = (at += N);
    srtol = (at += N); satol = (at += N); probe = (at += N); inside = (at += N); direction = (at += N); looking = (at += N); ks = (at += 2 * N);
    a.y = y; a.k1 = k1; a.rtol = srtol; a.atol = satol; a.ks = ks; a.y1 = y1; a.error = error; a.step_rtol = rtol; a.step_atol = atol;
    a.last_ks = at + ALL * N; a.work = memory + ROOM_BEFORE_STEP; a.beside = a.work + ROOM_OF_STEP; a.left = a.beside + 5 * (long)N; a.guesses = q.guesses; a.adaptive = q.adaptive; a.power = q.power; a.skipped = q.skipped;
    for (long i = 0; i < ROOM; i++) memory[i] = K(0);
    c = {q.inputs, own.a, q.tables, nullptr};
#if MULTISTEP
    a.past = &past;
#endif
#if EVENTS > 0
    events = (EventFunctions)q.events;
    for (int l = 0; l < W; l++) watch[l].begin(q, from);
#endif
    live.v = lands.v = rejected.v = bad.v = unstable.v = on.v = flag(false);
    h.v = span.v = wanted.v = target.v = end.v = error1.v = error2.v = looked.v = due.v = DV{};
    segment.v = attempts.v = accepted.v = n_fun.v = since.v = LV{};
    step.v = sign.v = d_all(1);
    for (int l = 0; l < W; l++) {
      row[l] = from; t[l] = q.anchors[from]; next[l] = 0; stop[l] = NO_NUMBER;
      aiming[l] = jump[l] = jumps_end[l] = a.on[l] = a.again[l] = a.stuck[l] = false;
      own.load(q.inputs, l, from);
      load_tolerances(q, rtol, atol, l, from);
      of_stages(l);
      for (int n = 0; n < N; n++) put(y[n], l, q.y0[from * N + n]);
    }
    largest = 0;
    for (int n = 0; n < N && q.watched; n++) {
      const double x = q.interval ? q.drawn[n] : scattered(n);
      put(direction[n], 0, (R)x);
      largest = most(largest, (R)x);
    }
  }

  // however loose the tolerances of the steps are, stages are roots, and no tighter than rounding allows
  void of_stages(int l) {
    for (int n = 0; n < N; n++) {
      put(srtol[n], l, most(least(get(rtol[n], l), LOOSEST_RTOL), q.least_rtol));
      put(satol[n], l, least(get(atol[n], l), LOOSEST_ATOL));
    }
  }
  // of size one, away from zero: what must not be negative stays so
  R drawn(int n, int l) const { return (R)BD(copysign)((double)get(direction[n], 0), (double)get(y[n], l)); }
  double anchor(int l, long i) const { return q.anchors[i * q.rows + row[l]]; }
  long sample(int l, long i) const { return q.order ? q.order[i * q.rows + row[l]] : i; }
  double sample_time(int l, long i) const { return q.t_eval[sample(l, i) * q.rows + row[l]]; }
  void to_next_sample(int l) { due[l] = next[l] < q.n_samples ? sign[l] * sample_time(l, next[l]) : BEYOND_ALL; }
  void to_next_anchor(int l) {
    while (segment[l] < q.n_anchors - 1 && anchor(l, segment[l] + 1) == t[l] && (accepted[l] || segment[l] < q.n_anchors - 2)) segment[l]++;
    if (segment[l] < q.n_anchors - 1) target[l] = anchor(l, segment[l] + 1);
  }
  void write_sample(int l, const S* v, long in_step) {
    const long i = sample(l, next[l]++) * q.rows + row[l];
    for (int n = 0; n < N; n++) q.samples[i * N + n] = get(v[n], l);
    q.sample_step[i] = in_step;
    to_next_sample(l);
  }

#if IMPLICIT || EVENTS > 0
  // of the slope within the step of a lane
  void write_slope(int l, double theta, R* to) const {
    double w[ALL];
    dense_slopes(theta, w);
    for (int n = 0; n < N; n++) {
      R v = 0;
      for (int s = 0; s < ALL; s++) if (w[s]) v += (R)w[s] * get(ks[s * N + n], l);
      to[n] = v;
    }
  }
#endif
#if IMPLICIT
  R* slope_of_sample(int l) const { return q.slopes + (sample(l, next[l]) * q.rows + row[l]) * N; }
#endif

  void finish(int l, long status) {
    const long r = row[l];
    live.set(l, false);
    if (status == -3 && a.stuck[l]) status = -4;
    for (; next[l] < q.n_samples;) {
      const long i = sample(l, next[l]++) * q.rows + r;
      for (int n = 0; n < N; n++) q.samples[i * N + n] = R(NO_NUMBER);
#if IMPLICIT
      for (int n = 0; n < N && q.slopes; n++) q.slopes[i * N + n] = R(NO_NUMBER);
#endif
      q.sample_step[i] = -1;
    }
    for (int n = 0; n < N; n++) {
      q.last[r * N + n] = get(y[n], l);
      q.final[r * N + n] = status < 0 ? R(NO_NUMBER) : get(y[n], l);
      q.scaled[r * N + n] = BD(fabs)(get(error[n], l) / (get(size[n], l) * get(rtol[n], l) + get(atol[n], l)));
    }
    q.n_steps[r] = attempts[l]; q.n_accepted[r] = accepted[l]; q.n_fun[r] = n_fun[l] + a.counts[EVALUATED][l]; q.status[r] = status;
    q.t_final[r] = t[l]; q.next_step[r] = step[l];
    q.unstable[r] = unstable[l];
    for (int i = 0; i < EVALUATED; i++) q.work[i * q.rows + r] = a.counts[i][l];
  }

  // lanes without a trajectory take one
  void refill() {
    for (int l = 0; l < W; l++) while (!live[l] && waiting < to) {
      if (waiting >= starts.to) starts.take(waiting, to);
      const long r = row[l] = waiting, j = waiting++ - starts.from;
      live.set(l, true);
      own.load(q.inputs, l, r);
      if (q.rtol_row || q.atol_row) {
        load_tolerances(q, rtol, atol, l, r);
        of_stages(l);
      }
      t[l] = anchor(l, 0);
      sign[l] = anchor(l, q.n_anchors - 1) >= t[l] ? 1.0 : -1.0;
      span[l] = BD(fabs)(anchor(l, q.n_anchors - 1) - t[l]);
      step[l] = starts.step[j];
      attempts[l] = accepted[l] = next[l] = segment[l] = since[l] = 0;
      n_fun[l] = !IMPLICIT + (starts.guessed && !CONSTRAINED);
      rejected.set(l, false); bad.set(l, step[l] == 0); unstable.set(l, false);
      jump[l] = jumps_end[l] = a.stuck[l] = false;
      for (int i = 0; i < COUNTS; i++) a.counts[i][l] = starts.a.counts[i][j];
      a.last_h[l] = looked[l] = 0;
      error1[l] = error2[l] = 1;
      for (int n = 0; n < N; n++) {
        put(y[n], l, get(starts.y[n], j)); put(k1[n], l, get(starts.slope[n], j));
        put(error[n], l, R(0)); put(size[n], l, R(1));
        if (CONSTRAINED) put(a.left[n], l, (R)BD(fabs)(get(y[n], l)));
        if (q.watched) put(probe[n], l, drawn(n, l));
        if (q.keep_states) q.states[r * N + n] = get(y[n], l);
      }
      to_next_anchor(l);
      to_next_sample(l);
      while (due[l] <= sign[l] * t[l]) {
#if IMPLICIT
        if (q.slopes) for (int n = 0; n < N; n++) slope_of_sample(l)[n] = q.first_slope[r * N + n];
#endif
        write_sample(l, y, 0);
      }
#if EVENTS > 0
      watch[l].begin(q, r);
      for (int i = 0; i < EVENTS; i++) watch[l].values[i] = get(starts.events[i], j);
#endif
#if SWITCHES
      handover.begin(l, largest);
#endif
      if ((MULTISTEP && span[l] == 0) || (q.idle && q.idle[r])) {  // nothing is done
        while (next[l] < q.n_samples) write_sample(l, y, 0);
        finish(l, 0);
      }
#if MULTISTEP
      else past.begin(*this, l);
#endif
    }
  }

  // where the coming steps end, of the lanes that are on
  void aim() {
    DV s = step.v, end_at = target.v;
    if (q.max_step < BEYOND_ALL) s = d_least(s, d_all(q.max_step));
    if (q.accept_smallest) s = d_most(s, d_all(q.min_step));
#if EVENTS > 0
    Doubles ends = target;
    for (int l = 0; l < W; l++) if ((aiming[l] = watch[l].aim == watch[l].aim)) ends[l] = watch[l].aim;
    end_at = ends.v;
#endif
    const DV remaining = d_abs(end_at - t.v);
    LV there = q.adaptive ? THAT(s * 1.01 >= remaining) : THAT(s >= remaining * (1 - 1e-10));
    if (q.adaptive && q.max_step < BEYOND_ALL) there = there & THAT(remaining <= d_all(q.max_step));
    LV tiny = THAT(s <= RESOLVED * d_abs(t.v));
    if (q.min_step) tiny = tiny | THAT(s < d_all(q.min_step));
    const LV spent = THAT(attempts.v >= l_all(q.max_steps)), none = live.v & (spent | (tiny & ~there));
    if (some(none)) for (int l = 0; l < W; l++) if (((Flags&)none)[l]) finish(l, ((Flags&)spent)[l] ? -1 : bad[l] ? -3 : -2);
    on = live;
    wanted.v = s;
    h.v = d_sel(on.v, d_sel(there, end_at - t.v, sign.v * s), DV{});
    end.v = d_sel(there, end_at, t.v + h.v);
    lands.v = there;
#if EVENTS > 0
    for (int l = 0; l < W; l++) if (aiming[l]) lands.set(l, false);
#endif
    if (q.shift) for (int l = 0; l < W; l++) jumps_end[l] = on[l] && (q.shift == 2 || (lands[l] && segment[l] < q.n_anchors - 2));
    attempts.v -= on.v;
  }

  // the error test, and the sizes of the next steps; true: accepted
#if MULTISTEP
  LV judge(DV e) { level.v = e; return past.judge(*this); }
#else
  LV judge(DV e) {
    const DV length = d_abs(h.v), one = d_all(1);
    const LV smallest = q.accept_smallest ? THAT(length <= d_all(q.min_step)) : flag(false);
    const double order = ERROR_ORDER + 1;
    bad.v = ~d_finite(e);
    const LV passed = THAT(e <= one) | (~bad.v & smallest);
    const DV level = d_sel(bad.v, d_all(1e30), d_least(d_most(e, d_all(1e-10)), d_all(1e30)));
    const DV factor = q.safety * d_power(level, -1.0 / order);
    DV up = factor, down = d_least(d_most(factor, d_all(q.min_factor)), d_all(q.safety));
    if (q.remembers || q.icoeff != 1.0) {
      up = q.safety * d_power(level, -(q.pcoeff + q.icoeff + q.dcoeff) / order);
      if (q.predictive) {
        const DV less = d_least(one, length / -error2.v * d_power(error1.v / level, 1.0 / order));
        up *= d_sel(THAT(error2.v < DV{}), less, one);
      }
      if (q.pcoeff || q.dcoeff) up *= d_power(error1.v, (q.pcoeff + 2 * q.dcoeff) / order);
      if (q.dcoeff) up *= d_power(error2.v, -q.dcoeff / order);
    }
    up = d_least(d_most(up, d_all(q.shrink_accepted ? q.min_factor : 1.0)), d_all(q.max_factor));
    up = d_sel(rejected.v, d_least(up, one), up);
    DV proposal = length * up;
    proposal = d_sel(lands.v & ~rejected.v, d_most(proposal, wanted.v), proposal);
    Doubles shorter;
    shorter.v = d_sel(bad.v, d_all(q.min_factor), down);
    for (int l = 0; RECORDED && l < W; l++) if (bad[l] && a.stuck[l]) shorter[l] = most(q.min_factor, 0.5);
    step.v = d_sel(passed, proposal, length * shorter.v);
    if (q.remembers) {
      const DV before = error1.v;
      error1.v = d_sel(passed, q.predictive ? d_most(level, d_all(1e-2)) : level, error1.v);
      error2.v = d_sel(passed, q.predictive ? -length : before, error2.v);
    }
    const LV hopeless = on.v & bad.v & (THAT(step.v <= RESOLVED * d_abs(t.v)) | smallest);
    rejected.v = ~passed;
    if (some(hopeless)) for (int l = 0; l < W; l++) if (((Flags&)hopeless)[l]) finish(l, -3);
    return passed & on.v;
  }
#endif

  void run() {
    S times[TIMES];
    for (int i = 0; i < TIMES; i++) times[i] = K(0);
    a.times = times;
    refill();
    for (;;) {
#if DEVICE
      if (live[0] && accepted[0] >= q.room) return;
#endif
      for (int l = 0; RECORDED && l < W; l++) a.again[l] = rejected[l];
      aim();
      if (!some(on.v)) {
        refill();
        if (!some(live.v)) return;
        continue;
      }
      a.h = narrow(h.v);
#if MULTISTEP
      past.fit(on, h, step);
      for (int l = 0; l < W; l++) put(times[0], l, moved((R)end[l], jumps_end[l], -sign[l] * BEYOND_ALL));
#else
      stage_times(&t[0], &h[0], &sign[0], jump, jumps_end, times);
#endif
      for (int l = 0; RECORDED && l < W; l++) { a.on[l] = on[l]; a.stuck[l] = a.stuck[l] && !on[l]; }
      step_forward(a);
      bool end_known = FSAL || MULTISTEP, dense = q.keep_stages || q.interval;
      Flags passed;
      S* k_end = FSAL ? ks + (STAGES - 1) * N : NEXT_FIRST ? ks + STAGES * N : other;
      if (ERROR_USES_END) { f.fun(&c, times + STAGES, y1, k_end); end_known = true; }
      n_fun.v += on.v & (l_all(EVALUATIONS));
      if (q.adaptive) {
        S level = K(0);
        step_error(a);
        for (int n = 0; n < N; n++) size[n] = m_max(m_abs(y[n]), m_abs(y1[n]));
#if CONSTRAINED && !MULTISTEP
        inner_error(a, &t[0], &h[0], &span[0], size);
#endif
        scaled_norm(error, size, rtol, atol, &level);
        DV e = d_of(level);
#if SWITCHES && !RECORDED
        if (q.watched && q.interval) e = handover.bounded(*this, e);
#endif
        passed.v = judge(e);
      } else {
        passed = on;
        for (int l = 0; l < W; l++) if (on[l]) {
          for (int n = 0; n < N; n++) if (!finite(get(y1[n], l))) passed.set(l, false);
          if (!passed[l]) { bad.set(l, true); finish(l, -3); }
        }
      }
      dense = dense || EVENTS > 0 || some(passed.v & THAT(due.v < sign.v * end.v));
      if (some(passed.v)) accept(passed, times, k_end, end_known, dense);
    }
  }

  // the state within the step of a lane, in the place of that lane in z
  void within(int l, double theta, S* z) const {
    double w[ALL];
    dense_weights(theta, w);
    for (int n = 0; n < N; n++) {
      R v = get(y[n], l);
      for (int s = 0; s < ALL; s++) if (w[s]) v += (R)(w[s] * h[l]) * get(ks[s * N + n], l);
      put(z[n], l, v);
    }
  }

#if EVENTS > 0
  // what there is to be noted of an event of a lane
  Noted* noted(int l, int i, double when) {
    Noted* to = Noted::made();
    S *z = inside, at = K(0), g[EVENTS];
    const double theta = (when - t[l]) / h[l];
    within(l, theta, z);
    put(at, l, (R)when);
    events(&c, &at, z, g);
    to->value = get(g[i], l); to->jumps = 0;
    R *y_there = to->y(), *slope = y_there + N;
    for (int n = 0; n < N; n++) y_there[n] = get(z[n], l);
    write_slope(l, theta, slope);
    // steps end just before a terminal one
    if (q.noting < 2 || (q.terminal[i] && q.terminal[i] == watch[l].counts[i])) return to;
    // As `event_jumps.py` does: a gap between the sides that is much wider than what a side varies by
    const double third = BD(pow)(REAL_EPSILON, 1.0 / 3), distance = h[l] * third + sign_of(h[l]) * 64 * REAL_EPSILON * BD(fabs)(when), shares[4] = {-1.0, -0.25, 0.25, 1.0};
    Memory<4 * N + ARGUMENTS_OF_FUN> room;
    S *sides = room, *pair = sides + 4 * N;
    for (int e = 0; e < ARGUMENTS_OF_FUN; e++) pair[e] = K(0);
    for (int k = 0; k < 4; k++) {
      const double there = when + shares[k] * distance;
      within(l, (there - t[l]) / h[l], pair);
      if (IMPLICIT) for (int n = 0; n < N; n++) put(pair[N + n], l, slope[n]);
      put(at, l, (R)there);
      f.fun(&c, &at, pair, sides + k * N);
    }
    for (int n = 0; n < N; n++) {
      double v[4];
      for (int k = 0; k < 4; k++) v[k] = get(sides[k * N + n], l);
      const double gap = BD(fabs)(v[2] - v[1]), size = most(BD(fabs)(v[1]), BD(fabs)(v[2])), varies = BD(fabs)(v[1] - v[0]) + BD(fabs)(v[3] - v[2]);
      if (!(gap <= 10 * varies || gap <= BD(sqrt)(REAL_EPSILON) * size)) to->jumps = 1;
    }
    return to;
  }

  // the events of the steps that passed, whose stages are all known: where trajectories stop, and which did not pass after all, as they are to be taken again
  void events_of(Flags& passed) {
    S *z = inside, at = K(0), g[3][EVENTS];
    double inner[2][ALL];
    const double grid[2] = {1.0 / 3, 2.0 / 3};
    for (int p = 0; p < 2; p++) {
      dense_weights(grid[p], inner[p]);
      for (int l = 0; l < W; l++) put(at, l, (R)(t[l] + grid[p] * h[l]));
      for (int n = 0; n < N; n++) {
        S v = K(0);
        for (int s = 0; s < ALL; s++) v += K(R(inner[p][s])) * ks[s * N + n];
        z[n] = y[n] + a.h * v;
      }
      events(&c, &at, z, g[p]);
    }
    for (int l = 0; l < W; l++) put(at, l, (R)end[l]);
    events(&c, &at, y1, g[2]);
    for (int n = 0; n < N; n++) z[n] = y[n];
    for (int l = 0; l < W; l++) {
      stop[l] = NONE;
      if (!passed[l]) continue;
      Watch& w = watch[l];
      const bool aimed = end[l] == w.aim;
      if (aimed) w.aim = NONE;
      double values[EVENTS][5], places[5] = {0, grid[0], grid[1], 1, 1}, before[EVENTS];
      bool possible = aimed;
      for (int i = 0; i < EVENTS; i++) {
        values[i][0] = before[i] = w.values[i];
        for (int p = 0; p < 3; p++) values[i][p + 1] = get(g[p][i], l);
        w.values[i] = values[i][3];
        possible |= may_cross(values[i], 4);
      }
      if (!possible) continue;
      auto value = [&](int i, double theta) {
        S e[EVENTS], when = K(0);
        put(when, l, (R)(theta == 1 ? end[l] : t[l] + theta * h[l]));
        if (theta == 0 || theta == 1) for (int n = 0; n < N; n++) put(z[n], l, get(theta == 0 ? y[n] : y1[n], l));
        else within(l, theta, z);
        events(&c, &when, z, e);
        return (double)get(e[i], l);
      };
      int count = 4;
      if (aimed) {
        // how far beyond its end the dense output is searched
        places[4] = FARTHEST * (1 + 4 * w.margin / (1 - w.margin));
        for (int i = 0; i < EVENTS; i++) values[i][4] = value(i, places[4]);
        count = 5;
      }
      auto add = [&](int i, double when) { tape.log.add({i, row[l], accepted[l], when, q.noting ? noted(l, i, when) : nullptr}); };
      const Outcome out = locate(value, add, w, values, places, count, aimed, accepted[l] == 0 && !q.event_counts, t[l], h[l], end[l], q.adaptive, q.directions, q.terminal);
      stop[l] = out.stop;
      if (!out.again) continue;
      passed.set(l, false);
      for (int i = 0; i < EVENTS; i++) w.values[i] = before[i];
      step[l] = most(step[l], BD(fabs)(w.aim - t[l]));
    }
  }
#endif

  // Steps go by the error of the state. Where that moves along a slow manifold they may be longer than a displacement bears: derivatives
  // would be those of unstable steps. A few products with the Jacobian, by differences, tell its size (Sommeijer, Shampine & Verwer 1997),
  // at steps longer than any before and once in a while. reached: the times of the states, which may lie before an event that ends a solve.
  void look(const Flags& passed, const DV reached) {
    Flags due_;
    due_.v = passed.v & ~unstable.v;
    // behind a jump the slope is still that before it
    if (q.shift == 1) for (int l = 0; l < W; l++) if (jump[l]) due_.set(l, false);
    const DV length = d_abs(h.v);
    since.v -= due_.v;
    // all at once, as a look costs the same for one lane and for all
    if (!some(due_.v & (THAT(length > looked.v) | THAT(since.v >= l_all(32))))) return;
    looked.v = d_sel(due_.v, d_most(looked.v, 1.25 * length), looked.v);
    since.v = since.v & ~due_.v;
    S at = narrow(reached), *v = looking, *f1 = v + N, rate = K(0);
    for (int n = 0; n < N; n++) v[n] = probe[n];
    // well within the tolerance, and well above rounding
    auto unit = [&](int n) { return m_abs(y[n]) * (rtol[n] + K(R(SHIFT))) + atol[n] + K(R(SMALLEST)); };
    // one product grows by more than the modes do where components have different sizes: where three say too much, four more are had for
    // their mean
    LV far = flag(false);
    S mean = K(1);
    for (int k = 0; k < 7; k++) {
      if (k == 3) {
        far = due_.v & THAT(length * d_of(rate) > d_all(1.5 * INTERVAL));
        if (!some(far)) break;
      }
      S before = K(0), after = K(0);
      for (int n = 0; n < N; n++) {
        before += v[n] * v[n];
        inside[n] = y[n] + unit(n) * v[n];
      }
      f.fun(&c, &at, inside, f1);
      for (int n = 0; n < N; n++) {
        v[n] = (f1[n] - k1[n]) / unit(n);
        after += v[n] * v[n];
      }
      rate = m_sqrt(after / before);
      if (k >= 3) mean = mean * m_sqrt(m_sqrt(rate));
      const S scale = m_sqrt(K(R(N)) / after);
      for (int n = 0; n < N; n++) v[n] = v[n] * scale;
    }
    n_fun.v += (due_.v & l_all(3)) + (far & l_all(4));
    // not a number: beside the state there is none, or nothing moves
    unstable.v = unstable.v | (far & THAT(length * d_of(mean) > d_all(1.5 * INTERVAL)));
    for (int l = 0; l < W; l++) if (due_[l]) {
      bool fine = true;
      for (int n = 0; n < N; n++) fine = fine && finite(get(v[n], l));
      due_.set(l, fine);
    }
    const M kept = mask_of(due_);
    for (int n = 0; n < N; n++) probe[n] = m_sel(kept, v[n], probe[n]);
  }

#if DISPLACED && !RECORDED && !MULTISTEP
  // The displacement never falls below half of what the error test sees, whatever the steps have damped: so it finds, as by power iteration
  // with the steps themselves, modes that would be unstable in longer ones.
  void nudge(const M taken, const Flags& passed) {
    S at = K(0), *anew = looking;
    for (int n = N / 2; n < N; n++) y[n] += m_sel(taken, K(R(0.5 * scattered(n))) * atol[n], K(0));
    for (int l = 0; l < W; l++) put(at, l, (R)t[l]);
    f.fun(&c, &at, y, anew);
    for (int n = 0; n < N; n++) k1[n] = m_sel(taken, anew[n], k1[n]);
    n_fun.v -= passed.v;
  }
#endif

  void accept(Flags& passed, S* times, S* k_end, bool end_known, bool dense) {
    const bool going = some(passed.v & (flag(EVENTS > 0) | ~(lands.v & THAT(segment.v >= l_all(q.n_anchors - 2)))));
    if (!end_known && (going || q.watched || (dense && NEXT_FIRST))) {
      end_known = true;
      S at = K(0);
      if (TIMED) for (int l = 0; l < W; l++) put(at, l, moved((R)(t[l] + h[l]), jumps_end[l], -sign[l] * BEYOND_ALL));
      f.fun(&c, &at, y1, k_end);
    }
    // what a step costs beside its stages: a look at its dense output, and the slope where the next one starts, unless it is known
    Flags looked;
    looked.v = q.keep_stages || q.interval || EVENTS > 0 ? passed.v : passed.v & THAT(due.v < sign.v * end.v);
    if (dense && (ALL > STAGES || LEGENDRE)) {
      dense_stages<STAGES>(a);
      n_fun.v += looked.v & (l_all(ALL - STAGES - (NEXT_FIRST && ERROR_USES_END)));
    }
    bool ended = false, jumped = false;
    Flags over;
    over.v = flag(false);
#if EVENTS > 0
    events_of(passed);
#endif
#if MULTISTEP
    past.arrive(*this, passed, k_end);
#endif
#if SWITCHES
    if (q.interval) {
      for (int l = 0; l < W; l++) over.set(l, passed[l] && !lands[l] && !(EVENTS > 0 && stop[l] == stop[l]));
      over.v = handover.over(*this, over.v);
    }
#endif
    const M taken = mask_of(passed);
    const DV reached = end.v;
    for (int l = 0; l < W; l++) {
      if (!passed[l]) continue;
      const bool stops = EVENTS > 0 && stop[l] == stop[l];
      while (due[l] <= sign[l] * (stops ? stop[l] : end[l])) {
        const double when = sample_time(l, next[l]);
        if (when != end[l]) within(l, (when - t[l]) / h[l], inside);
#if IMPLICIT
        if (q.slopes) write_slope(l, when == end[l] ? 1.0 : (when - t[l]) / h[l], slope_of_sample(l));
#endif
        write_sample(l, when == end[l] ? y1 : inside, accepted[l]);
      }
#if IMPLICIT
      if (q.final_slope && lands[l] && segment[l] >= q.n_anchors - 2) write_slope(l, 1.0, q.final_slope + row[l] * N);
#endif
      if (q.keep_grid) {
        const Place p = place_of(q, tape, accepted[l], row[l]);
        *p.t = t[l]; *p.h = h[l];
        if (q.n_anchors > 2) { *p.segment = segment[l]; *p.lands = lands[l]; }
        if (q.keep_states) for (int n = 0; n < N; n++) p.state[n] = get(y1[n], l);
        if (W > 1) {
          // where the next step goes lies far away in memory
          PREFETCH(p.t + q.rows, 1); PREFETCH(p.h + q.rows, 1);
          if (q.keep_states) for (int n = 0; n < N && n < 64; n += 64 / sizeof(R)) PREFETCH(p.state + q.rows * N + n, 1);
        }
        if (q.keep_stages) for (int s = 0; s < ALL; s++) for (int n = 0; n < N; n++) p.stages[s * q.rows * N + n] = get(ks[s * N + n], l);
#if MULTISTEP
        past.note(l, p.extra, q.rows);
#endif
      }
      if (RECORDED && !MULTISTEP && a.guesses) { a.last_h[l] = h[l]; for (int n = 0; n < ALL * N; n++) put(a.last_ks[n], l, get(ks[n], l)); }
      jumped |= jump[l] = jumps_end[l];
      if (stops) end[l] = stop[l];
    }
    if (q.covered) for (int l = 0; l < W; l++) if (passed[l]) q.covered[row[l]] = end[l];
    accepted.v -= passed.v;
    t.v = d_sel(passed.v, end.v, t.v);
    for (int n = 0; n < N; n++) { y[n] = m_sel(taken, y1[n], y[n]); k1[n] = m_sel(taken, k_end[n], k1[n]); }
    if (CONSTRAINED && q.adaptive) for (int n = 0; n < N; n++) a.left[n] = m_sel(taken, size[n], a.left[n]);
#if DISPLACED && !RECORDED && !MULTISTEP
    if (going) nudge(taken, passed);
#endif
    if (some(passed.v & lands.v)) for (int l = 0; l < W; l++) {
      if (!passed[l] || !lands[l] || (EVENTS > 0 && stop[l] == stop[l])) continue;
      segment[l]++;
      to_next_anchor(l);
    }
    if (!MULTISTEP && (!(FSAL || ERROR_USES_END) || jumped)) for (int l = 0; l < W; l++) {
      const bool ends = (EVENTS > 0 && stop[l] == stop[l]) || over[l] || segment[l] >= q.n_anchors - 1;
      if (passed[l] && !ends) n_fun[l] += FSAL || ERROR_USES_END ? jump[l] && !IMPLICIT : jump[l] || !(NEXT_FIRST && looked[l]);
    }
    // where a solve ends at once its end is its only step
    if (q.watched && !q.interval && end_known) look(passed, reached);
    if (EVENTS > 0 || some(over.v | (passed.v & THAT(segment.v >= l_all(q.n_anchors - 1))))) for (int l = 0; l < W; l++) {
      const bool stops = EVENTS > 0 && stop[l] == stop[l];
      if (passed[l] && (stops || over[l] || segment[l] >= q.n_anchors - 1)) { finish(l, stops ? 1 : over[l] ? 2 : 0); ended = true; }
    }
#if MULTISTEP
    past.take(*this, taken, passed);
    past.follow(*this, passed);
#else
    if (jumped) {
      // after a discontinuity the first stage is taken anew, from the far side of it
      Memory<N> anew;
      S at = K(0);
      for (int l = 0; l < W; l++) put(at, l, moved((R)t[l], jump[l], sign[l] * BEYOND_ALL));
#if IMPLICIT
      double width[W], fast[W];
      bool wanted[W];
      for (int l = 0; l < W; l++) {
        wanted[l] = passed[l] && jump[l];
        const double room = wanted[l] ? BD(fabs)(target[l] - t[l]) : 0;
        width[l] = 1e-3 * (room > 0 ? room : span[l]);
      }
      find_slopes(a, at, &sign[0], width, wanted, anew, fast);
#else
      f.fun(&c, &at, y, anew);
#endif
      for (int l = 0; l < W; l++) if (passed[l] && jump[l]) for (int n = 0; n < N; n++) put(k1[n], l, get(anew[n], l));
    }
#endif
    if (ended) refill();
  }
};

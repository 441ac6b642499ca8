// The adaptive loop: W trajectories side by side; a lane whose trajectory has ended takes the next one. The rules are those of
// `integrate/clock.py`, `controller.py`, `initial_step.py` and the samplers.

// steps behind those for which there was room at first, of all trajectories
struct Chunk { long from, length; R* states; R* stages; double *t, *h; long* segment; unsigned char* lands; Chunk* next; };
struct Tape {
  Chunk* first; pthread_mutex_t lock;
#if EVENTS > 0
  Log log;
#endif
};
struct Place { R *state, *stages; double *t, *h; long* segment; unsigned char* lands; };

static Chunk* chunk_at(const Forward& q, Tape& tape, long k) {
  pthread_mutex_lock(&tape.lock);
  Chunk** at = &tape.first; long from = q.room;
  while (*at && k >= (*at)->from + (*at)->length) { from = (*at)->from + (*at)->length; at = &(*at)->next; }
  while (!*at) {
    // each as long as all that is there already
    const long length = from > 0 ? from : 1, n = length * q.rows;
    Chunk* c = (Chunk*)calloc(1, sizeof(Chunk));
    c->from = from; c->length = length;
    if (q.keep_states) c->states = (R*)malloc(n * N * sizeof(R));
    if (q.keep_stages) c->stages = (R*)malloc(n * ALL * N * sizeof(R));
    c->t = (double*)malloc(n * sizeof(double)); c->h = (double*)malloc(n * sizeof(double));
    c->segment = (long*)malloc(n * sizeof(long)); c->lands = (unsigned char*)malloc(n);
    *at = c;
    if (k < from + length) break;
    from += length; at = &c->next;
  }
  Chunk* found = *at;
  pthread_mutex_unlock(&tape.lock);
  return found;
}
// where step k of a row is written, and the state at its end
static Place place_of(const Forward& q, Tape& tape, long k, long row) {
  const long B_ = q.rows;
  if (k < q.room) {
    const long i = k * B_ + row;
    return {q.keep_states ? q.states + (i + B_) * N : nullptr, q.keep_stages ? q.stages + (k * ALL * B_ + row) * N : nullptr, q.t + i, q.h + i, q.segment + i, q.lands + i};
  }
  Chunk* c = chunk_at(q, tape, k);
  const long j = k - c->from, i = j * B_ + row;
  return {q.keep_states ? c->states + i * N : nullptr, q.keep_stages ? c->stages + (j * ALL * B_ + row) * N : nullptr, c->t + i, c->h + i, c->segment + i, c->lands + i};
}

static void scaled_norm(const S* e, const S* size, const S* rtol, const S* atol, S* out) {
  S total = K(0);
  if (N == 1) { *out = m_abs(e[0] / (size[0] * rtol[0] + atol[0])); return; }
  for (int n = 0; n < N; n++) { S x = e[n] / (size[n] * rtol[n] + atol[n]); total += x * x; }
  *out = m_sqrt(total) * K(R(ROOT));
}

struct Loop {
  const Forward& q; Tape& tape; const Functions f;
  long from, to, waiting;
  Own own; Ctx c; S* memory;
  S *y, *y1, *k1, *ks, *rtol, *atol, *size, *error, *other, *srtol, *satol;
  Attempt a;
  double t[W], step[W], wanted[W], target[W], end[W], h[W], error1[W], error2[W], sign[W];
  double span[W];
  double due[W];  // the time of the next sample, in the direction of integration
  long row[W], segment[W], attempts[W], accepted[W], n_fun[W], next[W];
#if EVENTS > 0
  Watch watch[W];
  EventFunctions events;
#endif
  S *probe, *inside;
  double looked[W];  // the longest step, a little more, that was looked at, and how long ago
  long since[W];
  bool unstable[W];
  double stop[W];  // where a terminal event ends a trajectory in this step
  bool aiming[W];  // the step is to end just before a terminal event
  bool live[W], lands[W], rejected[W], bad[W], jump[W], jumps_end[W];

  Loop(const Forward& q, Tape& tape, long from, long to) : q(q), tape(tape), f(functions_of(q)), from(from), to(to), waiting(from), a{f, c} {
    const long numbers = (12 + 2 * ALL + 4 * CONSTRAINED) * (long)N + ROOM_OF_STEP;
    memory = lanes_of(numbers);
    S* at = memory;
    y = at; y1 = (at += N); k1 = (at += N); rtol = (at += N); atol = (at += N); size = (at += N); error = (at += N); other = (at += N);
    srtol = (at += N); satol = (at += N); probe = (at += N); inside = (at += N); ks = (at += N);
    a.y = y; a.k1 = k1; a.rtol = srtol; a.atol = satol; a.ks = ks; a.y1 = y1; a.error = error; a.step_rtol = rtol; a.step_atol = atol;
    a.last_ks = at + ALL * N; a.work = at + 2 * ALL * N; a.beside = a.work + ROOM_OF_STEP; a.guesses = q.guesses; a.adaptive = q.adaptive;
    for (long i = 0; i < numbers; i++) memory[i] = K(0);
    c = {q.inputs, own.a, q.tables, nullptr};
#if EVENTS > 0
    events = (EventFunctions)q.events;
    for (int l = 0; l < W; l++) watch[l].begin();
#endif
    for (int l = 0; l < W; l++) { live[l] = aiming[l] = false; row[l] = from; t[l] = q.anchors[from]; h[l] = span[l] = 0; jump[l] = jumps_end[l] = a.on[l] = a.again[l] = a.stuck[l] = false; sign[l] = 1; fill(l, from); }
  }
  ~Loop() { free(memory); }

  void fill(int l, long r) {
    own.load(q.inputs, l, r);
    for (int n = 0; n < N; n++) {
      put(y[n], l, q.y0[r * N + n]);
      put(rtol[n], l, q.rtol[r * q.rtol_row + n * q.rtol_column]);
      put(atol[n], l, q.atol[r * q.atol_row + n * q.atol_column]);
      // however loose those of the steps are, stages are roots, and no tighter than rounding allows
      put(srtol[n], l, most(least(get(rtol[n], l), LOOSEST_RTOL), q.least_rtol));
      put(satol[n], l, least(get(atol[n], l), LOOSEST_ATOL));
    }
  }
  double anchor(int l, long i) const { return q.anchors[i * q.rows + row[l]]; }
  long sample(int l, long i) const { return q.order ? q.order[i * q.rows + row[l]] : i; }
  double sample_time(int l, long i) const { return q.t_eval[sample(l, i) * q.rows + row[l]]; }
  void to_next_sample(int l) { due[l] = next[l] < q.n_samples ? sign[l] * sample_time(l, next[l]) : __builtin_inf(); }
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

  void finish(int l, long status) {
    const long r = row[l];
    live[l] = false;
    if (status == -3 && a.stuck[l]) status = -4;
    for (; next[l] < q.n_samples;) {
      const long i = sample(l, next[l]++) * q.rows + r;
      for (int n = 0; n < N; n++) q.samples[i * N + n] = R(__builtin_nan(""));
      q.sample_step[i] = -1;
    }
    for (int n = 0; n < N; n++) {
      q.last[r * N + n] = get(y[n], l);
      q.final[r * N + n] = status < 0 ? R(__builtin_nan("")) : get(y[n], l);
      q.scaled[r * N + n] = __builtin_fabs(get(error[n], l) / (get(size[n], l) * get(rtol[n], l) + get(atol[n], l)));
    }
    q.n_steps[r] = attempts[l]; q.n_accepted[r] = accepted[l]; q.n_fun[r] = n_fun[l] + a.counts[EVALUATED][l]; q.status[r] = status;
    q.t_final[r] = t[l]; q.next_step[r] = step[l];
    q.unstable[r] = unstable[l];
    for (int i = 0; i < EVALUATED; i++) q.work[i * q.rows + r] = a.counts[i][l];
  }


  // lanes without a trajectory take one; slopes and first steps are computed for all lanes at once and kept for the new ones
  void refill() {
    bool fresh[W], some = false;
    for (int l = 0; l < W; l++) {
      fresh[l] = !live[l] && waiting < to;
      if (!fresh[l]) continue;
      some = live[l] = true;
      row[l] = waiting++;
      fill(l, row[l]);
      t[l] = anchor(l, 0);
      sign[l] = anchor(l, q.n_anchors - 1) >= t[l] ? 1.0 : -1.0;
      span[l] = __builtin_fabs(anchor(l, q.n_anchors - 1) - t[l]);
      attempts[l] = accepted[l] = next[l] = segment[l] = 0;
      n_fun[l] = 1;
      rejected[l] = bad[l] = jump[l] = jumps_end[l] = a.stuck[l] = false;
      for (int i = 0; i < COUNTS; i++) a.counts[i][l] = 0;
      a.last_h[l] = 0;
      looked[l] = 0; since[l] = 0; unstable[l] = false;
      for (int n = 0; n < N; n++) put(probe[n], l, (R)__builtin_copysign(1.5 + __builtin_cos((n + 1.0) * (n + 1.0)), get(y[n], l)));
      error1[l] = error2[l] = 1;
      for (int n = 0; n < N; n++) { put(error[n], l, R(0)); put(size[n], l, R(1)); }
      to_next_anchor(l);
      to_next_sample(l);
      for (int n = 0; n < N && q.keep_states; n++) q.states[row[l] * N + n] = get(y[n], l);
    }
    if (!some) return;
#if EVENTS > 0
    {
      S at, g[EVENTS];
      for (int l = 0; l < W; l++) put(at, l, (R)t[l]);
      events(&c, &at, y, g);
      for (int l = 0; l < W; l++) if (fresh[l]) { watch[l].begin(); for (int i = 0; i < EVENTS; i++) watch[l].values[i] = get(g[i], l); }
    }
#endif
    S now, *f0 = y1;
    for (int l = 0; l < W; l++) put(now, l, moved((R)t[l], q.shift == 2, sign[l] * __builtin_inf()));
    f.fun(&c, &now, y, f0);
    double first[W];
    const bool guess = q.adaptive && !q.first_step;
    if (guess) {
#if MASS
      first_steps(a, t, sign, span, fresh, first);
#else
      hairer(f0, fresh, first);
#endif
    }
    for (int l = 0; l < W; l++) if (fresh[l]) {
      if (guess) step[l] = first[l] >= q.min_step || first[l] != first[l] ? first[l] : q.min_step;
      else step[l] = q.first_step ? q.first_step[q.first_step_row * row[l]] : __builtin_inf();
      for (int n = 0; n < N; n++) {
        put(k1[n], l, get(f0[n], l));
        // nothing goes on from a state that is not finite: a step of no size says so at once
        if (!finite(get(y[n], l))) { step[l] = 0; bad[l] = true; }
      }
    }
  }

  // the sizes of first steps, from the slopes at their start: `integrate/initial_step.py`
  void hairer(const S* f0, const bool* fresh, double* first) {
    S there_, *z = lanes_of(2 * N), *f1 = z + N, room_, h0_, a0, a1;
    double h0[W], d1[W];
    S* s = f1;
    for (int n = 0; n < N; n++) s[n] = m_abs(y[n]);
    scaled_norm(y, s, rtol, atol, &a0);
    scaled_norm(f0, s, rtol, atol, &a1);
    for (int l = 0; l < W; l++) {
      double nearest = 0, room = __builtin_inf();
      for (long i = 1; i < q.n_anchors; i++) {
        const double ahead = anchor(l, i) - anchor(l, 0);
        if (sign[l] * ahead > 0 && __builtin_fabs(ahead) < room) { room = __builtin_fabs(ahead); nearest = anchor(l, i); }
      }
      if (!finite(room)) { room = 0; nearest = anchor(l, q.n_anchors > 1 ? 1 : 0); }
      const double d0 = get(a0, l);
      d1[l] = get(a1, l);
      double g = (d0 < 1e-5 || d1[l] < 1e-5) ? 1e-6 : 0.01 * d0 / d1[l];
      g = least(finite(g) ? g : 1e-6, q.max_step);
      put(there_, l, (R)(g < room ? anchor(l, 0) + sign[l] * g : nearest));
      h0[l] = least(g, room);
      put(h0_, l, (R)(sign[l] * h0[l]));
    }
    for (int n = 0; n < N; n++) z[n] = y[n] + h0_ * f0[n];
    f.fun(&c, &there_, z, f1);
    for (int n = 0; n < N; n++) f1[n] = f1[n] - f0[n];
    for (int n = 0; n < N; n++) z[n] = m_abs(y[n]);
    scaled_norm(f1, z, rtol, atol, &room_);
    for (int l = 0; l < W; l++) if (fresh[l]) {
      const double worst = most(d1[l], (double)get(room_, l) / h0[l]);
      const double next_guess = worst <= 1e-15 ? most(h0[l] * 1e-3, 1e-6) : __builtin_pow(0.01 / worst, 1.0 / (ERROR_ORDER + 1));
      const double x = least(100 * h0[l], next_guess);
      first[l] = finite(x) && x > 0 ? x : h0[l];
      n_fun[l]++;
    }
    free(z);
  }

  // where the coming step of a lane ends; false: it has none
  bool aim(int l) {
    h[l] = 0; jumps_end[l] = false;
    if (!live[l]) return false;
    double s = step[l];
    if (q.max_step < __builtin_inf()) s = least(s, q.max_step);
    if (q.accept_smallest) s = most(s, q.min_step);
    double end_at = target[l];
#if EVENTS > 0
    aiming[l] = watch[l].aim == watch[l].aim;
    if (aiming[l]) end_at = watch[l].aim;
#endif
    const double remaining = __builtin_fabs(end_at - t[l]);
    bool on = q.adaptive ? s * 1.01 >= remaining : s >= remaining * (1 - 1e-10);
    if (q.adaptive && q.max_step < __builtin_inf()) on = on && remaining <= q.max_step;
    bool tiny = s <= 16 * 2.220446049250313e-16 * __builtin_fabs(t[l]);
    if (q.min_step) tiny = tiny || s < q.min_step;
    const bool spent = attempts[l] >= q.max_steps;
    if (spent || (tiny && !on)) { finish(l, spent ? -1 : bad[l] ? -3 : -2); return false; }
    wanted[l] = s;
    h[l] = on ? end_at - t[l] : sign[l] * s;
    end[l] = on ? end_at : t[l] + h[l];
    on = on && !aiming[l];
    lands[l] = on;
    jumps_end[l] = q.shift == 2 || (q.shift == 1 && on && segment[l] < q.n_anchors - 2);
    attempts[l]++;
    return true;
  }

  // powers of doubles are slow: of many trajectories they are taken in single precision
  static double power(double x, double p) { return W == 1 ? __builtin_pow(x, p) : (double)__builtin_powf((float)x, (float)p); }
  // the error test, and the size of the next step; true: accepted
  bool judge(int l, double e) {
    const double length = __builtin_fabs(h[l]);
    const bool smallest = q.accept_smallest && length <= q.min_step;
    bad[l] = !finite(e);
    const bool passed = e <= 1.0 || (!bad[l] && smallest);
    const double level = bad[l] ? 1e30 : least(most(e, 1e-10), 1e30);
    const double order = ERROR_ORDER + 1;
    const double factor = q.safety * power(level, -1.0 / order);
    double up = factor;
    const double down = least(most(factor, q.min_factor), q.safety);
    if (q.remembers || q.icoeff != 1.0) {
      up = q.safety * power(level, -(q.pcoeff + q.icoeff + q.dcoeff) / order);
      if (q.predictive && error2[l] < 0) up *= least(1.0, length / -error2[l] * power(error1[l] / level, 1.0 / order));
      if (q.pcoeff || q.dcoeff) up *= power(error1[l], (q.pcoeff + 2 * q.dcoeff) / order);
      if (q.dcoeff) up *= power(error2[l], -q.dcoeff / order);
    }
    up = least(most(up, q.shrink_accepted ? q.min_factor : 1.0), q.max_factor);
    if (rejected[l]) up = least(up, 1.0);
    double proposal = length * up;
    if (lands[l] && !rejected[l]) proposal = most(proposal, wanted[l]);
    step[l] = passed ? proposal : length * (!bad[l] ? down : a.stuck[l] ? most(q.min_factor, 0.5) : q.min_factor);
    if (passed && q.remembers) {
      const double before = error1[l];
      error1[l] = q.predictive ? most(level, 1e-2) : level;
      error2[l] = q.predictive ? -length : before;
    }
    const bool hopeless = bad[l] && (step[l] <= 16 * 2.220446049250313e-16 * __builtin_fabs(t[l]) || smallest);
    rejected[l] = !passed;
    if (hopeless) finish(l, -3);
    return passed;
  }

  void run() {
    S times[TIMES], hs = K(0);
    for (int i = 0; i < TIMES; i++) times[i] = K(0);
    a.times = times;
    refill();
    for (;;) {
      bool any = false;
      for (int l = 0; l < W; l++) { a.again[l] = rejected[l]; any |= a.on[l] = aim(l); }
      if (!any) {
        refill();
        bool some = false;
        for (int l = 0; l < W; l++) some |= live[l];
        if (!some) return;
        continue;
      }
      for (int l = 0; l < W; l++) put(hs, l, (R)h[l]);
      stage_times(t, h, sign, jump, jumps_end, times);
      a.h = hs;
      for (int l = 0; l < W; l++) if (a.on[l]) a.stuck[l] = false;
      step_forward(a);
      bool end_known = FSAL, passed[W], dense = q.keep_stages;
      S* k_end = FSAL ? ks + (STAGES - 1) * N : NEXT_FIRST ? ks + STAGES * N : other;
      S level = K(0);
      if (ERROR_USES_END) { f.fun(&c, times + STAGES, y1, k_end); end_known = true; }
      if (q.adaptive) {
        step_error(a);
        for (int n = 0; n < N; n++) size[n] = m_max(m_abs(y[n]), m_abs(y1[n]));
#if CONSTRAINED
        inner_error(a, t, h, span, size, q.power, q.skipped);
#endif
        scaled_norm(error, size, rtol, atol, &level);
      }
      any = false;
      for (int l = 0; l < W; l++) {
        passed[l] = false;
        if (!live[l]) continue;
        n_fun[l] += EVALUATIONS;
        if (q.adaptive) passed[l] = judge(l, get(level, l));
        else {
          passed[l] = true;
          for (int n = 0; n < N; n++) if (!finite(get(y1[n], l))) passed[l] = false;
          if (!passed[l]) { bad[l] = true; finish(l, -3); }
        }
        if (!passed[l]) continue;
        any = true;
        if (EVENTS > 0 || due[l] < sign[l] * end[l]) dense = true;
      }
      if (any) accept(passed, times, hs, k_end, end_known, dense);
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
  // the events of the steps that passed, whose stages are all known: where trajectories stop, and which did not pass after all, as they are to be taken again
  void events_of(bool* passed) {
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
      const Outcome out = locate(value, w, values, places, count, aimed, accepted[l] == 0, t[l], h[l], end[l], q.adaptive, q.directions, q.terminal, row[l],
                                 accepted[l], tape.log);
      stop[l] = out.stop;
      if (!out.again) continue;
      passed[l] = false;
      for (int i = 0; i < EVENTS; i++) w.values[i] = before[i];
      step[l] = most(step[l], __builtin_fabs(w.aim - t[l]));
    }
  }
#endif

  // Steps go by the error of the state. Where that moves along a slow manifold they may be longer than a displacement bears: derivatives
  // would be those of unstable steps. A few products with the Jacobian, by differences, tell its size (Sommeijer, Shampine & Verwer 1997),
  // at steps longer than any before and once in a while.
  void look(const bool* passed) {
    bool due_[W], some = false;
    for (int l = 0; l < W; l++) {
      const double size = __builtin_fabs(h[l]);
      // behind a jump the slope is still that before it
      some |= due_[l] = passed[l] && !unstable[l] && !(q.shift == 1 && jump[l]) && (size > looked[l] || ++since[l] >= 32);
      if (due_[l]) { looked[l] = most(looked[l], 1.25 * size); since[l] = 0; }
    }
    if (!some) return;
    S at = K(0), *v = lanes_of(2 * (long)N), *f1 = v + N, rate = K(0);
    for (int l = 0; l < W; l++) put(at, l, (R)t[l]);
    for (int n = 0; n < N; n++) v[n] = probe[n];
    // well within the tolerance, and well above rounding
    auto unit = [&](int n) { return m_abs(y[n]) * (rtol[n] + K(R(SHIFT))) + atol[n] + K(R(SMALLEST)); };
    for (int k = 0; k < 3; k++) {
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
      const S scale = m_sqrt(K(R(N)) / after);
      for (int n = 0; n < N; n++) v[n] = v[n] * scale;
    }
    for (int l = 0; l < W; l++) if (due_[l]) {
      n_fun[l] += 3;
      // not a number: beside the state there is none, or nothing moves
      if (__builtin_fabs(h[l]) * get(rate, l) > 1.5 * INTERVAL) unstable[l] = true;
      bool fine = true;
      for (int n = 0; n < N; n++) fine = fine && finite(get(v[n], l));
      due_[l] = fine;
    }
    const M kept = mask_of(due_);
    for (int n = 0; n < N; n++) probe[n] = m_sel(kept, v[n], probe[n]);
    free(v);
  }

  void accept(bool* passed, S* times, const S& hs, S* k_end, bool end_known, bool dense) {
    bool going = false;
    for (int l = 0; l < W; l++) going |= passed[l] && (EVENTS > 0 || !(lands[l] && segment[l] >= q.n_anchors - 2));
    if (!end_known && (going || q.watched || (dense && NEXT_FIRST))) {
      end_known = true;
      S at = K(0);
      if (TIMED) for (int l = 0; l < W; l++) put(at, l, moved((R)(t[l] + h[l]), jumps_end[l], -sign[l] * __builtin_inf()));
      f.fun(&c, &at, y1, k_end);
      for (int l = 0; l < W; l++) n_fun[l] += passed[l];
    }
    if (dense && ALL > STAGES) {
      dense_stages<STAGES>(a);
      for (int l = 0; l < W; l++) if (passed[l]) n_fun[l] += ALL - STAGES - NEXT_FIRST;
    }
    bool ended = false, jumped = false;
#if EVENTS > 0
    events_of(passed);
#else
    for (int l = 0; l < W; l++) stop[l] = __builtin_nan("");
#endif
    const M on = mask_of(passed);
    for (int l = 0; l < W; l++) {
      if (!passed[l]) continue;
      const bool stops = stop[l] == stop[l];
      while (due[l] <= sign[l] * (stops ? stop[l] : end[l])) {
        const double when = sample_time(l, next[l]);
        if (when != end[l]) within(l, (when - t[l]) / h[l], inside);
        write_sample(l, when == end[l] ? y1 : inside, accepted[l]);
      }
      if (q.keep_grid) {
        Place p = place_of(q, tape, accepted[l], row[l]);
        *p.t = t[l]; *p.h = h[l];
        if (q.n_anchors > 2) { *p.segment = segment[l]; *p.lands = lands[l]; }
        if (q.keep_states) for (int n = 0; n < N; n++) p.state[n] = get(y1[n], l);
        if (q.keep_stages) for (int s = 0; s < ALL; s++) for (int n = 0; n < N; n++) p.stages[s * q.rows * N + n] = get(ks[s * N + n], l);
      }
      accepted[l]++;
      t[l] = stops ? stop[l] : end[l];
      if (RECORDED && a.guesses) { a.last_h[l] = h[l]; for (int n = 0; n < ALL * N; n++) put(a.last_ks[n], l, get(ks[n], l)); }
      jump[l] = jumps_end[l];
      jumped |= jump[l];
      if (!lands[l] || stops) continue;
      segment[l]++;
      to_next_anchor(l);
    }
    for (int n = 0; n < N; n++) { y[n] = m_sel(on, y1[n], y[n]); k1[n] = m_sel(on, k_end[n], k1[n]); }
    // where a solve ends at once its end is its only step
    if (q.watched && end_known) look(passed);
    for (int l = 0; l < W; l++) if (passed[l] && (stop[l] == stop[l] || segment[l] >= q.n_anchors - 1)) { finish(l, stop[l] == stop[l] ? 1 : 0); ended = true; }
    if (jumped) {
      // after a discontinuity the first stage is taken anew, from the far side of it
      S at = K(0), *anew = lanes_of(N);
      for (int l = 0; l < W; l++) put(at, l, moved((R)t[l], jump[l], sign[l] * __builtin_inf()));
      f.fun(&c, &at, y, anew);
      for (int l = 0; l < W; l++) if (passed[l] && jump[l]) {
        n_fun[l]++;
        for (int n = 0; n < N; n++) put(k1[n], l, get(anew[n], l));
      }
      free(anew);
    }
    if (ended) refill();
  }
};

struct Whole { const Forward* q; Tape* tape; };
static void block_forward(void* p, long b) {
  Whole& w = *(Whole*)p;
  const long from = b * w.q->block, to = least(from + w.q->block, w.q->rows);
  Loop loop(*w.q, *w.tape, from, to);
  loop.run();
}
extern "C" void* forward(const Forward* q) {
  Tape* tape = (Tape*)calloc(1, sizeof(Tape));
  pthread_mutex_init(&tape->lock, nullptr);
#if EVENTS > 0
  pthread_mutex_init(&tape->log.lock, nullptr);
#endif
  Whole w{q, tape};
  together(q->threads, (q->rows + q->block - 1) / q->block, block_forward, &w);
  return tape;
}
#if EVENTS > 0
extern "C" long count_events(void* p) { return ((Tape*)p)->log.n; }
extern "C" void take_events(void* p, long* id, long* row, long* step, double* t) {
  Log& log = ((Tape*)p)->log;
  for (long i = 0; i < log.n; i++) { id[i] = log.found[i].id; row[i] = log.found[i].row; step[i] = log.found[i].step; t[i] = log.found[i].t; }
  free(log.found);
}
#endif
// from what was written as the solve went to tensors of ``steps`` steps; rows with fewer go on with steps of size zero. ``to`` has room for all
struct Sealing { const Forward* q; const Forward* to; Tape* tape; long steps; };
static void block_seal(void* p, long b) {
  Sealing& s = *(Sealing*)p;
  const Forward &q = *s.q, &to = *s.to;
  const long end = least((b + 1) * q.block, q.rows);
  for (long r = b * q.block; r < end; r++) for (long k = q.n_accepted[r]; k < s.steps; k++) {
    const long i = k * q.rows + r;
    to.t[i] = q.t_final[r]; to.h[i] = 0;
    if (q.n_anchors > 2) { to.segment[i] = 0; to.lands[i] = 0; }
    if (q.keep_states) for (int n = 0; n < N; n++) to.states[(i + q.rows) * N + n] = q.last[r * N + n];
    if (q.keep_stages) for (int a = 0; a < ALL; a++) for (int n = 0; n < N; n++) to.stages[((k * ALL + a) * q.rows + r) * N + n] = 0;
  }
}
extern "C" void seal(void* p, const Forward* q, const Forward* to, long steps) {
  Tape* tape = (Tape*)p;
  if (to != q) {
    const long n = q->room * q->rows;
    memcpy(to->t, q->t, n * 8); memcpy(to->h, q->h, n * 8);
    if (q->n_anchors > 2) { memcpy(to->segment, q->segment, n * 8); memcpy(to->lands, q->lands, n); }
    if (q->keep_states) memcpy(to->states, q->states, (n + q->rows) * N * sizeof(R));
    if (q->keep_stages) memcpy(to->stages, q->stages, n * ALL * N * sizeof(R));
  }
  for (Chunk* c = tape->first; c; c = c->next) {
    const long count = least(c->length, steps - c->from), n = count * q->rows, at = c->from * q->rows;
    if (count <= 0) break;
    memcpy(to->t + at, c->t, n * 8); memcpy(to->h + at, c->h, n * 8);
    if (q->n_anchors > 2) { memcpy(to->segment + at, c->segment, n * 8); memcpy(to->lands + at, c->lands, n); }
    if (q->keep_states) memcpy(to->states + (at + q->rows) * N, c->states, n * N * sizeof(R));
    if (q->keep_stages) memcpy(to->stages + at * ALL * N, c->stages, n * ALL * N * sizeof(R));
  }
  if (q->keep_grid) {
    Sealing s{q, to, tape, steps};
    together(q->threads, (q->rows + q->block - 1) / q->block, block_seal, &s);
  }
  for (Chunk* c = tape->first; c;) { Chunk* next = c->next; free(c->states); free(c->stages); free(c->t); free(c->h); free(c->segment); free(c->lands); free(c); c = next; }
  pthread_mutex_destroy(&tape->lock);
  free(tape);
}

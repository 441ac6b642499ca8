// The way back through the recorded steps, or those from q.first up to q.n_steps: W trajectories side by side, each from its own last step; the formulas of `sensitivity/discrete.py`.

struct Back_ {
  const Backward& q; const Functions f;
  long from, to, waiting;
  static constexpr long SIZE = (6 + 2 * ALL + CARRIED) * (long)N + ROOM_OF_STEP;
  Own own; Ctx c; Memory<SIZE> memory; Memory<OWNED> own_bars; S* bars[INPUTS + 1];
  S *y, *bar, *start, *ybar, *ks, *kbar, *first_bar, *handed, *work;
  double t[W], h[W], sign[W];
  long row[W], k[W], first[W], sampled[W], behind[W];
  bool live[W], jump[W], jumps_end[W];
#if MULTISTEP
  Before before;
#endif

  // totals (SHARED): where the cotangents of shared inputs are added up in this block
  Back_(const Backward& q, long from, long to, S* totals) : q(q), f(functions_of(q)), from(from), to(to), waiting(from) {
    S* at = memory;
    y = at; bar = (at += N); start = (at += N); ybar = (at += N); ks = (at += N); kbar = (at += ALL * N); first_bar = (at += ALL * N); handed = (at += N); work = (at += N);
    for (long i = 0; i < SIZE; i++) memory[i] = K(0);
#if MULTISTEP
    before.carried = work + ROOM_OF_STEP;
#endif
    S* next = own_bars;
    for (int i = 0; i < INPUTS; i++) {
      if (OWN[i]) { bars[i] = next; for (long e = 0; e < OWN[i]; e++) next[e] = K(0); next += OWN[i]; }
      else { bars[i] = totals; totals += NUMBERS[i]; }
    }
    c = {q.inputs, own.a, q.tables, bars};
    for (int l = 0; l < W; l++) { live[l] = false; row[l] = from; t[l] = q.n_steps ? q.t[from] : 0; h[l] = 0; jump[l] = jumps_end[l] = false; sign[l] = 1; own.load(q.inputs, l, from);
      for (int n = 0; n < N; n++) put(y[n], l, q.states[(q.first * q.rows + from) * N + n]); }
  }

  long sample(int l, long i) const { return (q.order ? q.order[i * q.rows + row[l]] : i) * q.rows + row[l]; }
  bool weighs(int l, const R* x) const { for (int n = 0; n < N; n++) if (x[n] != 0) return true; return false; }
  void add(S* to, int l, const R* x) const { for (int n = 0; n < N; n++) put(to[n], l, get(to[n], l) + x[n]); }

  void refill() {
    for (int l = 0; l < W; l++) {
      while (!live[l] && waiting < to) {
        const long r = row[l] = waiting++;
        live[l] = true;
        own.load(q.inputs, l, r);
        for (int i = 0; i < INPUTS; i++) for (long e = 0; e < OWN[i]; e++) put(bars[i][e], l, R(0));
        for (int n = 0; n < N; n++) { put(bar[n], l, R(0)); put(ybar[n], l, R(0)); put(handed[n], l, q.handed_bar ? q.handed_bar[r * N + n] : R(0)); }
        if (q.final_bar && (!q.status || q.status[r] >= 0)) add(bar, l, q.final_bar + r * N);
        sign[l] = q.anchors[(q.n_anchors - 1) * q.rows + r] >= q.anchors[r] ? 1.0 : -1.0;
        sampled[l] = q.samples_bar ? q.n_samples - 1 : -1;
        while (sampled[l] >= 0 && (q.sample_step[sample(l, sampled[l])] < 0 || (q.n_steps && q.sample_step[sample(l, sampled[l])] >= q.n_steps))) sampled[l]--;
        k[l] = q.n_steps - 1;
        while (k[l] >= q.first && q.h[k[l] * q.rows + r] == 0) {
          if (q.states_bar) add(bar, l, q.states_bar + ((k[l] + 1) * q.rows + r) * N);
          k[l]--;
        }
        while (k[l] < 0 && sampled[l] >= 0) add(bar, l, q.samples_bar + sample(l, sampled[l]--) * N);
        // where nothing comes back there is nothing to multiply with derivatives, which may be no numbers
        if (!q.states_bar && !q.stages_bar) while (k[l] >= q.first) {
          bool any = false;
          for (int n = 0; n < N; n++) any |= get(bar[n], l) != 0 || get(handed[n], l) != 0;
          for (long s = sampled[l]; s >= 0 && q.sample_step[sample(l, s)] >= k[l]; s--) any |= weighs(l, q.samples_bar + sample(l, s) * N);
          if (any) break;
          while (sampled[l] >= 0 && q.sample_step[sample(l, sampled[l])] >= k[l]) sampled[l]--;
          k[l]--;
        }
        if (k[l] < q.first) done(l);
      }
    }
  }
  void done(int l) {
    const long r = row[l];
    live[l] = false;
    for (int n = 0; n < N; n++) {
      R x = get(bar[n], l);
      if (q.states_bar) x += q.states_bar[r * N + n];
      if (q.initial_bar) x += q.initial_bar[r * N + n];
      q.y0_bar[r * N + n] = x;
      if (q.handed_bar) q.handed_bar[r * N + n] = get(handed[n], l);
      put(bar[n], l, R(0)); put(handed[n], l, R(0));
    }
#if MULTISTEP
    for (int e = 0; e < CARRIED * N; e++) put(before.carried[e], l, R(0));
#endif
    for (int i = 0; i < INPUTS; i++) if (OWN[i]) for (long e = 0; e < OWN[i]; e++) q.input_bars[i][r * OWN[i] + e] = get(bars[i][e], l);
  }

  // lanes without a trajectory take the step of another one: zero times a derivative that is no number, or the inverse of a singular matrix,
  // would be none in their sums
  void rest() {
    int other = -1;
    for (int l = 0; l < W; l++) if (live[l]) other = l;
    for (int l = 0; l < W; l++) if (!live[l]) {
      if (row[l] != row[other]) { row[l] = row[other]; own.load(q.inputs, l, row[l]); }
      t[l] = t[other]; h[l] = h[other];
#if MULTISTEP
      before.same(l, other);
#endif
      for (int n = 0; n < N; n++) put(y[n], l, get(y[n], other));
      if (RECORDED) for (int n = 0; n < ALL * N; n++) put(ks[n], l, get(ks[n], other));
    }
  }

  // of the slope that the step began with: what the step before handed on, or at the start and behind a jump f itself
  void handed_back(Return& r) {
    bool anew[W], some = false;
    for (int l = 0; l < W; l++) some |= anew[l] = live[l] && (k[l] == 0 || jump[l]);
    const M on = mask_of(anew);
    for (int n = 0; n < N; n++) handed[n] = m_sel(on, K(0), first_bar[n]);
    if (!some) return;
    Memory<2 * N> room;
    S *v = room, *u = v + N, tb = K(0);
    for (int n = 0; n < N; n++) v[n] = m_sel(on, first_bar[n], K(0));
    f.vjp(&c, r.times, y, v, u, &tb);
    for (int n = 0; n < N; n++) ybar[n] += u[n];
    if (q.timed) r.tbar += tb;
  }

#if MULTISTEP
  // of the differences with which trajectories began
  void begin_back(Return& r) {
    bool which[W], some = false;
    S start_ = K(0);
    for (int l = 0; l < W; l++) some |= which[l] = live[l] && k[l] == 0;
    if (!some) return;
    for (int l = 0; l < W; l++) {
      put(start_, l, (R)t[l]);
      for (int n = 0; n < N; n++) put(handed[n], l, which[l] ? q.states[row[l] * N + n] : get(y[n], l));
    }
    begun(r, start_, handed, which);
  }
#endif

  void run() {
    S times[TIMES], hs = K(0);
    for (int i = 0; i < TIMES; i++) times[i] = K(0);
    refill();
    for (;;) {
      bool any = false, dense = q.stages_bar != nullptr;
      for (int l = 0; l < W; l++) any |= live[l];
      if (!any) return;
      for (int n = 0; n < N; n++) start[n] = K(0);
      bool clear = false;
      if (dense || HANDS_ON) { for (int n = 0; n < ALL * N; n++) kbar[n] = K(0); clear = true; }
      if (HANDS_ON) for (int n = 0; n < N; n++) kbar[(STAGES - 1) * N + n] = handed[n];
      for (int l = 0; l < W; l++) {
        h[l] = 0;
        if (!live[l]) continue;
        const long i = k[l] * q.rows + row[l];
        t[l] = q.t[i]; h[l] = q.h[i];
        // the steps before lie far apart in memory
        if (k[l] > 1) {
          const long before = i - 2 * q.rows;
          PREFETCH(q.t + before); PREFETCH(q.h + before);
          for (int n = 0; n < N && n < 64; n += 64 / sizeof(R)) PREFETCH(q.states + before * N + n);
        }
        if (q.jumps) {
          jump[l] = q.jumps == 2 || (k[l] && q.segment[i] > q.segment[i - q.rows]);
          jumps_end[l] = q.jumps == 2 || (q.lands[i] && q.segment[i] < q.n_anchors - 2);
        }
        // the state where the equations of a step are: at its end, of multistep methods
        for (int n = 0; n < N; n++) put(y[n], l, q.states[(i + MULTISTEP * q.rows) * N + n]);
#if MULTISTEP
        before.load(l, q.extra + k[l] * EXTRA * q.rows + row[l], q.rows, q.n_anchors > 2 && q.lands[i] && q.segment[i] < q.n_anchors - 2);
        put(before.after, l, moved((R)(t[l] + h[l]), jumps_end[l], sign[l] * BEYOND_ALL));
#endif
        if (RECORDED && (BY_STAGES || q.timed)) for (int s = 0; s < ALL; s++) for (int n = 0; n < N; n++) put(ks[s * N + n], l, q.stages[((k[l] * ALL + s) * q.rows + row[l]) * N + n]);
        if (q.states_bar) add(bar, l, q.states_bar + (i + q.rows) * N);
        if (q.stages_bar) for (int s = 0; s < ALL; s++) add(kbar + s * N, l, q.stages_bar + ((k[l] * ALL + s) * q.rows + row[l]) * N);
        first[l] = sampled[l];
        for (; sampled[l] >= 0 && q.sample_step[sample(l, sampled[l])] == k[l]; sampled[l]--) {
          const long at = sample(l, sampled[l]);
          const R* v = q.samples_bar + at * N;
          const double theta = (q.t_eval[at] - t[l]) / h[l];
          if (theta == 1.0 && !q.timed) { add(bar, l, v); continue; }
          add(start, l, v);
          if (theta == 0.0 && !q.timed) continue;
          if (!clear) { clear = true; for (int n = 0; n < ALL * N; n++) kbar[n] = K(0); }
          dense = true;
          double w[ALL];
          dense_weights(theta, w);
          for (int s = 0; s < ALL; s++) if (w[s]) {
            const R x = (R)(w[s] * h[l]);
            for (int n = 0; n < N; n++) put(kbar[s * N + n], l, get(kbar[s * N + n], l) + x * v[n]);
          }
        }
      }
      if (W > 1) rest();
      for (int l = 0; l < W; l++) put(hs, l, (R)h[l]);
      stage_times(t, h, sign, jump, jumps_end, times);
      Return r{f, c, times, hs, y, bar, clear ? kbar : nullptr, ks, ybar, first_bar, work, (bool)q.timed, K(0), K(0)};
#if MULTISTEP
      r.before = &before;
#endif
      if (dense) step_back<true>(r);
      else step_back<false>(r);
      if (HANDS_ON) handed_back(r);
#if MULTISTEP
      begin_back(r);
#endif
      const S tbar = r.tbar, hbar = r.hbar;
      bool ended = false;
      const M going = mask_of(live);
      for (int n = 0; n < N; n++) bar[n] = m_sel(going, ybar[n] + start[n], K(0));
#if MULTISTEP
      for (int e = 0; e < CARRIED * N; e++) before.carried[e] = m_sel(going, before.carried[e], K(0));
#endif
      for (int l = 0; l < W; l++) {
        if (!live[l]) continue;
        const long i = k[l] * q.rows + row[l];
        if (q.timed) {
          double t_bar = get(tbar, l), h_bar = get(hbar, l);
          for (long s = first[l]; s > sampled[l]; s--) {
            const long at = sample(l, s);
            const double theta = (q.t_eval[at] - t[l]) / h[l];
            double w[ALL], d[ALL], slope = 0, size = 0;
            dense_weights(theta, w);
            dense_slopes(theta, d);
            for (int a = 0; a < ALL; a++) {
              double product = 0;
              for (int n = 0; n < N; n++) product += get(ks[a * N + n], l) * q.samples_bar[at * N + n];
              slope += d[a] * product; size += w[a] * product;
            }
            q.t_eval_bar[at] = slope;
            t_bar -= slope; h_bar += size - theta * slope;
          }
          q.t_bar[i] = t_bar; q.h_bar[i] = h_bar;
        }
        if (--k[l] < q.first) { done(l); ended = true; }
      }
      if (ended) refill();
    }
  }
};

#if !DEVICE
struct Sweep { const Backward* q; S* totals; };
static long infinite(const R* x, long count) { long found = 0; for (long i = 0; i < count; i++) found += !finite(x[i]); return found; }
static void block_back(void* p, long b) {
  Sweep& s = *(Sweep*)p;
  const long from = b * s.q->block, to = least(from + s.q->block, s.q->rows);
  Back_ back(*s.q, from, to, s.totals + b * SHARED);
  back.run();
}
#if EVENTS > 0
// of the state, as one of the functions whose number comes first
typedef void (*EventsVjp)(const Ctx*, const S* t, const S* y, long which, const S* v, S* yb, S* tb);
// Of events r(t, y(t), p) = 0, whose times move by dt = -(r_y dy + r_p dp) / (r_y y' + r_t), dy being what moves the state at a fixed time: what
// comes to that, and to the inputs.
struct EventsBack {
  const Backward& q; R* of_inputs[INPUTS + 1];
  EventsBack(const Backward& q) : q(q) {
    for (int i = 0; i < INPUTS; i++) of_inputs[i] = q.n_events ? (R*)calloc(size(i) + 1, sizeof(R)) : nullptr;
    if (!q.n_events) return;
    Own own; Memory<OWNED + SHARED + N> room; S* bars[INPUTS + 1];
    S *at = room, *gy = at + OWNED + SHARED, *const first = at;
    for (int i = 0; i < INPUTS; i++) { bars[i] = at; at += OWN[i] ? OWN[i] : NUMBERS[i]; }
    Ctx c{q.inputs, own.a, q.tables, bars};
    for (long e = 0; e < q.n_events; e++) {
      const long r = q.event_row[e];
      const R *v = q.event_y_bar + e * N, *slope = q.event_slope + e * N;
      R* to = q.event_bar + e * N;
      double along = q.event_t_bar[e], rate = 0;
      bool any = along != 0;
      for (int n = 0; n < N; n++) { along += (double)v[n] * slope[n]; any = any || v[n] != 0; to[n] = v[n]; }
      if (!any) continue;
      for (S* x = first; x < gy; x++) *x = K(0);
      for (int l = 0; l < W; l++) own.load(q.inputs, l, r);
      S now = K((R)q.event_t[e]), gt = K(0), one = K(1), y[N];
      for (int n = 0; n < N; n++) y[n] = K(q.event_y[e * N + n]);
      ((EventsVjp)q.events_vjp)(&c, &now, y, q.event_id[e], &one, gy, &gt);
      rate = get(gt, 0);
      for (int n = 0; n < N; n++) rate += (double)get(gy[n], 0) * slope[n];
      // at a jump there is a slope perhaps, but no root
      const double h = q.h[q.event_step[e] * q.rows + r], close = 1e-3 * BD(fabs)(h) + BD(sqrt)(REAL_EPSILON) * BD(fabs)(q.event_t[e]);
      if (!(finite(rate) && rate != 0 && BD(fabs)(q.event_value[e] / rate) <= close)) { ++*q.flat; continue; }
      const double by = -along / rate;
      for (int n = 0; n < N; n++) to[n] += (R)(by * get(gy[n], 0));
      for (int i = 0; i < INPUTS; i++) for (long k = 0; k < (OWN[i] ? OWN[i] : NUMBERS[i]); k++) of_inputs[i][OWN[i] ? r * OWN[i] + k : k] += (R)(by * get(bars[i][k], 0));
    }
  }
  long size(int i) const { return OWN[i] ? q.rows * OWN[i] : NUMBERS[i]; }
  void add() const { for (int i = 0; i < INPUTS && q.n_events; i++) for (long k = 0; k < size(i); k++) q.input_bars[i][k] += of_inputs[i][k]; }
  ~EventsBack() { for (int i = 0; i < INPUTS; i++) free(of_inputs[i]); }
};
#endif
extern "C" void backward(const Backward* q) {
#if EVENTS > 0
  const EventsBack events(*q);
#endif
  const long blocks = (q->rows + q->block - 1) / q->block;
  S* totals = lanes_of(blocks * SHARED);
  for (long e = 0; e < blocks * SHARED; e++) totals[e] = K(0);
  Sweep s{q, totals};
  together(q->threads, q->team, blocks, block_back, &s);
  long at = 0;
  for (int i = 0; i < INPUTS; i++) if (!OWN[i]) {
    for (long e = 0; e < NUMBERS[i]; e++) {
      R total = 0;
      for (long b = 0; b < blocks; b++) for (int l = 0; l < W; l++) total += get(totals[b * SHARED + at + e], l);
      q->input_bars[i][e] = total;
    }
    at += NUMBERS[i];
  }
  free(totals);
#if EVENTS > 0
  events.add();
#endif
  if (!q->infinite) return;
  *q->infinite = infinite(q->y0_bar, q->rows * N);
  for (int i = 0; i < INPUTS; i++) *q->infinite += infinite(q->input_bars[i], OWN[i] ? q->rows * OWN[i] : NUMBERS[i]);
}
#endif

// Recorded steps taken once more, from the states at the start of the first of them: with their sizes, so without an error test, W trajectories side
// by side. The steps from q.first up to q.until are numbered as in the record, and so are the states and stages that are written where they are kept.
// q.y0 and q.first_slope: what the first one starts from, the slope of methods that hand their last one on, nothing at the start of a solve;
// q.final and q.final_slope: what the last one leaves. With a tangent in the second half of states (ALONG), implicit stages of the first half are
// those of the record, q.known, where there are any, and the states behind steps of several steps, q.known_states.
struct Again : Loop {
  Again(const Forward& q, Tape& tape, long from, long to) : Loop(q, tape, from, to) {}

  // one step of all lanes; false: they have none any more
  bool step_of_all(long k, bool begun, S* times) {
    bool any = false, fresh = false, anew[W];
    for (int l = 0; l < W; l++) {
      const long i = k * q.rows + row[l];
      on.set(l, waiting + l < to && q.h[i] != 0);
      t[l] = q.t[i]; h[l] = on[l] ? q.h[i] : 0;
      jump[l] = q.shift == 2 || (q.shift && k && q.segment[i] > q.segment[i - q.rows]);
      jumps_end[l] = q.shift == 2 || (q.shift && q.lands[i] && q.segment[i] < q.n_anchors - 2);
      anew[l] = on[l] && (!FSAL || !begun || jump[l]);
      any |= on[l]; fresh |= anew[l];
      a.on[l] = on[l];
    }
    if (!any) return false;
    if (fresh && !IMPLICIT && !MULTISTEP) {
      S at = K(0);
      for (int l = 0; l < W; l++) put(at, l, moved((R)t[l], jump[l], sign[l] * BEYOND_ALL));
      f.fun(&c, &at, y, other);
      const M those = mask_of(anew);
      for (int n = 0; n < N; n++) k1[n] = m_sel(those, other[n], k1[n]);
    }
    a.h = narrow(h.v);
    stage_times(&t[0], &h[0], &sign[0], jump, jumps_end, times);
    if (ALONG && q.known) for (int l = 0; l < W; l++) if (on[l]) for (int s = 0; s < ALL; s++) for (int n = 0; n < N / 2; n++)
      put(ks[s * N + n], l, q.known[((k * ALL + s) * q.rows + row[l]) * (N / 2) + n]);
#if MULTISTEP
    for (int l = 0; l < W; l++) if (on[l]) for (int n = 0; n < N / 2; n++) put(y1[n], l, q.known_states[((k + 1) * q.rows + row[l]) * (N / 2) + n]);
    past.recall(q.extra + k * EXTRA * q.rows, q.rows, row);
#endif
    step_forward(a);
#if MULTISTEP
    const M those = mask_of(on);
    for (int e = 0; e < DIFFERENCES * N; e++) past.D[e] = m_sel(those, past.following[e], past.D[e]);
#endif
    if (q.keep_stages) dense_stages<STAGES, true>(a);
    for (int l = 0; l < W; l++) if (on[l]) {
      const long i = k * q.rows + row[l];
      if (q.keep_states) for (int n = 0; n < N; n++) q.states[(i + q.rows) * N + n] = get(y1[n], l);
      if (q.keep_stages) for (int s = 0; s < ALL; s++) for (int n = 0; n < N; n++) q.stages[((k * ALL + s) * q.rows + row[l]) * N + n] = get(ks[s * N + n], l);
    }
    const M taken = mask_of(on);
    for (int n = 0; n < N; n++) y[n] = m_sel(taken, y1[n], y[n]);
    if (FSAL) for (int n = 0; n < N; n++) k1[n] = m_sel(taken, ks[(STAGES - 1) * N + n], k1[n]);
    return true;
  }

  void run() {
    S times[TIMES];
    for (int i = 0; i < TIMES; i++) times[i] = K(0);
    a.times = times;
    for (; waiting < to; waiting += W) {
      for (int l = 0; l < W; l++) {
        const long r = row[l] = waiting + l < to ? waiting + l : to - 1;
        own.load(q.inputs, l, r);
        load_tolerances(q, rtol, atol, l, r);
        of_stages(l);
        sign[l] = anchor(l, q.n_anchors - 1) >= anchor(l, 0) ? 1.0 : -1.0;
        for (int n = 0; n < N; n++) {
          put(y[n], l, q.y0[r * N + n]);
          put(k1[n], l, q.first_slope ? q.first_slope[r * N + n] : R(0));
        }
#if MULTISTEP
        for (int e = 0; e < DIFFERENCES * N; e++) put(past.D[e], l, e < N ? get(y[e], l) : R(0));
#endif
      }
      for (long k = q.first; k < q.until; k++) if (!step_of_all(k, k > q.first || q.first_slope, times)) break;
      for (int l = 0; l < W && waiting + l < to; l++) for (int n = 0; n < N; n++) {
        q.final[row[l] * N + n] = get(y[n], l);
        if (q.final_slope) q.final_slope[row[l] * N + n] = get(k1[n], l);
      }
    }
  }
};
extern "C" void again(const Forward* q) {
  Tape tape = {};
  in_blocks<Again>(q, &tape);
}

// What a solve writes as it goes: for so many steps as there was room for at first into tensors, beyond that into memory of its own.

#if DEVICE
// its steps go in rounds, of which each has tensors of its own: addresses are such that steps count from the first round on
struct Tape {};
#else
// steps behind those for which there was room at first, of all trajectories
struct Chunk { long from, length; R* states; R* stages; double *t, *h, *extra; long* segment; unsigned char* lands; Chunk* next; };
struct Tape {
  Chunk* first; pthread_mutex_t lock;
#if EVENTS > 0
  Log log;
#endif
};
#endif
struct Place { R *state, *stages; double *t, *h; long* segment; unsigned char* lands; double* extra; };

#if !DEVICE
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
    if (EXTRA) c->extra = (double*)malloc(n * EXTRA * sizeof(double));
    *at = c;
    if (k < from + length) break;
    from += length; at = &c->next;
  }
  Chunk* found = *at;
  pthread_mutex_unlock(&tape.lock);
  return found;
}
#endif
// where step k of a row is written, and the state at its end
static Place place_of(const Forward& q, Tape& tape, long k, long row) {
  const long B_ = q.rows;
  if (DEVICE || k < q.room) {
    const long i = k * B_ + row;
    return {q.keep_states ? q.states + (i + B_) * N : nullptr, q.keep_stages ? q.stages + (k * ALL * B_ + row) * N : nullptr, q.t + i, q.h + i, q.segment + i, q.lands + i,
            q.extra + k * EXTRA * B_ + row};
  }
#if !DEVICE
  Chunk* c = chunk_at(q, tape, k);
  const long j = k - c->from, i = j * B_ + row;
  return {q.keep_states ? c->states + i * N : nullptr, q.keep_stages ? c->stages + (j * ALL * B_ + row) * N : nullptr, c->t + i, c->h + i, c->segment + i, c->lands + i,
          c->extra + j * EXTRA * B_ + row};
#endif
}

// rows with fewer steps than there are go on with steps of size zero; step by step, as rows lie side by side in memory
static void pad(const Forward& q, const Forward& to, long steps, long from, long end) {
  long first = steps;
  for (long r = from; r < end; r++) if (q.n_accepted[r] < first) first = q.n_accepted[r];
  for (long k = first; k < steps; k++) for (long r = from; r < end; r++) {
    if (k < q.n_accepted[r]) continue;
    const long i = k * q.rows + r;
    to.t[i] = q.t_final[r]; to.h[i] = 0;
    for (int e = 0; e < EXTRA; e++) to.extra[(k * EXTRA + e) * q.rows + r] = IDLE[e];
    if (q.n_anchors > 2) { to.segment[i] = 0; to.lands[i] = 0; }
    if (q.keep_states) for (int n = 0; n < N; n++) to.states[(i + q.rows) * N + n] = q.last[r * N + n];
    if (q.keep_stages) for (int a = 0; a < ALL; a++) for (int n = 0; n < N; n++) to.stages[((k * ALL + a) * q.rows + r) * N + n] = 0;
  }
}
#if !DEVICE
// from what was written as the solve went to tensors of ``steps`` steps. ``to`` has room for all
struct Sealing { const Forward* q; const Forward* to; Tape* tape; long steps; };
static void block_seal(void* p, long b) {
  Sealing& s = *(Sealing*)p;
  pad(*s.q, *s.to, s.steps, b * s.q->block, least((b + 1) * s.q->block, s.q->rows));
}
extern "C" void seal(void* p, const Forward* q, const Forward* to, long steps) {
  Tape* tape = (Tape*)p;
  if (to != q) {
    const long n = q->room * q->rows;
    memcpy(to->t, q->t, n * 8); memcpy(to->h, q->h, n * 8);
    if (q->n_anchors > 2) { memcpy(to->segment, q->segment, n * 8); memcpy(to->lands, q->lands, n); }
    if (q->keep_states) memcpy(to->states, q->states, (n + q->rows) * N * sizeof(R));
    if (q->keep_stages) memcpy(to->stages, q->stages, n * ALL * N * sizeof(R));
    if (EXTRA) memcpy(to->extra, q->extra, n * EXTRA * 8);
  }
  for (Chunk* c = tape->first; c; c = c->next) {
    const long count = least(c->length, steps - c->from), n = count * q->rows, at = c->from * q->rows;
    if (count <= 0) break;
    memcpy(to->t + at, c->t, n * 8); memcpy(to->h + at, c->h, n * 8);
    if (q->n_anchors > 2) { memcpy(to->segment + at, c->segment, n * 8); memcpy(to->lands + at, c->lands, n); }
    if (q->keep_states) memcpy(to->states + (at + q->rows) * N, c->states, n * N * sizeof(R));
    if (q->keep_stages) memcpy(to->stages + at * ALL * N, c->stages, n * ALL * N * sizeof(R));
    if (EXTRA) memcpy(to->extra + at * EXTRA, c->extra, n * EXTRA * 8);
  }
  if (q->keep_grid) {
    Sealing s{q, to, tape, steps};
    together(q->threads, q->team, (q->rows + q->block - 1) / q->block, block_seal, &s);
  }
  for (Chunk* c = tape->first; c;) { Chunk* next = c->next; free(c->states); free(c->stages); free(c->t); free(c->h); free(c->segment); free(c->lands); free(c->extra); free(c); c = next; }
  pthread_mutex_destroy(&tape->lock);
  free(tape);
}
// solves of all rows, each block by a loop of its own
struct Whole { const Forward* q; Tape* tape; };
template <class L> static void block_of_rows(void* p, long b) {
  Whole& w = *(Whole*)p;
  const long from = b * w.q->block, to = least(from + w.q->block, w.q->rows);
  L loop(*w.q, *w.tape, from, to);
  loop.run();
}
template <class L> static void in_blocks(const Forward* q, Tape* tape) {
  Whole w{q, tape};
  together(q->threads, q->team, (q->rows + q->block - 1) / q->block, block_of_rows<L>, &w);
}
#endif

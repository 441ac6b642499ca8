// A whole solve, in blocks of rows, and what was found in it.
// what is asked of all trajectories together
enum { MOST_ACCEPTED, MOST_REJECTED, ENDED_OTHERWISE, UNSTABLE_ONES, AT_REST };
static void sum_up(const Forward& q) {
  long* found = q.summary;
  for (int i = 0; i <= AT_REST; i++) found[i] = 0;
  for (long r = 0; r < q.rows; r++) {
    const long rejected = q.n_steps[r] - q.n_accepted[r];
    if (q.n_accepted[r] > found[MOST_ACCEPTED]) found[MOST_ACCEPTED] = q.n_accepted[r];
    if (rejected > found[MOST_REJECTED]) found[MOST_REJECTED] = rejected;
    found[ENDED_OTHERWISE] += q.status[r] != 0;
    found[UNSTABLE_ONES] += q.unstable[r] != 0;
  }
  for (long i = 0; i < q.rows * N; i++) found[AT_REST] += q.last[i] == q.y0[i];
}
// what `seal` is to be called with, or nothing where that has been done
extern "C" void* forward(const Forward* q) {
  Tape* tape = (Tape*)calloc(1, sizeof(Tape));
  pthread_mutex_init(&tape->lock, nullptr);
#if EVENTS > 0
  pthread_mutex_init(&tape->log.lock, nullptr);
#endif
  in_blocks<Loop>(q, tape);
  sum_up(*q);
  if (q->initial) memcpy(q->initial, q->y0, q->rows * N * sizeof(R));
  const long steps = q->keep_grid ? q->summary[MOST_ACCEPTED] : 0;
  if (EVENTS > 0 || steps > q->room) return tape;
  seal(tape, q, q, steps);
  return nullptr;
}
#if EVENTS > 0
extern "C" long count_events(void* p) { return ((Tape*)p)->log.n; }
// by function, in the order in which they were found, where more was noted than times: then value and what follows are written too
extern "C" void take_events(void* p, long* id, long* row, long* step, double* t, double* value, R* y, R* slope, long* jumps) {
  Log& log = ((Tape*)p)->log;
  long k = 0;
  for (int kind = 0; kind < (value ? EVENTS : 1); kind++) for (long i = 0; i < log.n; i++) {
    const Found& x = log.found[i];
    if (value && x.id != kind) continue;
    id[k] = x.id; row[k] = x.row; step[k] = x.step; t[k] = x.t;
    if (value) {
      value[k] = x.noted->value; *jumps += x.noted->jumps;
      memcpy(y + k * N, x.noted->y(), N * sizeof(R)); memcpy(slope + k * N, x.noted->y() + N, N * sizeof(R));
    }
    k++;
  }
  for (long i = 0; i < log.n; i++) free(log.found[i].noted);
  free(log.found);
}
#endif
